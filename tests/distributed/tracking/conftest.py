"""A real MLflow server, and what it was told."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Imports of a busy machine's disk.
PATIENCE_S = 600.0


class MlflowServer:
    """Answers by MLflow's REST API, read here without MLflow's client."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def ask(self, path: str, /, **question: object) -> dict[str, Any]:
        """GET a question."""
        query = urllib.parse.urlencode(question)
        with urllib.request.urlopen(f"{self.uri}/api/2.0/mlflow/{path}?{query}") as answer:
            content: dict[str, Any] = json.loads(answer.read())
        return content

    def post(self, path: str, /, **question: object) -> dict[str, Any]:
        """POST a question."""
        request = urllib.request.Request(
            f"{self.uri}/api/2.0/mlflow/{path}",
            json.dumps(question).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            content: dict[str, Any] = json.loads(answer.read())
        return content

    def find_runs(self, experiment: str) -> list[dict[str, Any]]:
        """Runs of an experiment with info, params, metrics and tags as mappings, oldest first."""
        found = self.ask("experiments/get-by-name", experiment_name=experiment)
        ids = [found["experiment"]["experiment_id"]]
        answer = self.post("runs/search", experiment_ids=ids, order_by=["start_time ASC"])
        return [
            {
                "info": run["info"],
                **{
                    kind: {entry["key"]: entry["value"] for entry in run["data"].get(kind, ())}
                    for kind in ("params", "metrics", "tags")
                },
            }
            for run in answer.get("runs", ())
        ]

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """Steps and values of one metric, as they were logged."""
        answer = self.ask("metrics/get-history", run_id=run_id, metric_key=metric)
        return [(int(entry["step"]), float(entry["value"])) for entry in answer["metrics"]]

    def list_files(self, run_id: str, folder: str = "") -> dict[str, int]:
        """Lengths of a run's files by path."""
        answer = self.ask("artifacts/list", run_id=run_id, path=folder)
        files: dict[str, int] = {}
        for entry in answer.get("files", ()):
            if entry["is_dir"]:
                files |= self.list_files(run_id, entry["path"])
            else:
                files[entry["path"]] = int(entry["file_size"])
        return files


@pytest.fixture(scope="session")
def mlflow_server(
    tmp_path_factory: pytest.TempPathFactory, wait_until: Callable[..., None]
) -> Iterator[MlflowServer]:
    """A server of its own with files and a SQLite store."""
    for package in ("mlflow", "flask"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the server of the package mlflow; {package} is not installed")
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder / 'store.db'}"]
    command += ["--artifacts-destination", str(folder / "files")]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    uri = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, TimeoutError):
            threading.Event().wait(0.5)
            return False

    try:
        wait_until(answers, "MLflow's server answers")
        yield MlflowServer(uri)
    finally:
        # Its workers are processes of its own group.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE_S)


@pytest.fixture
def reports(tmp_path: Path) -> list[Path]:
    """Two small files."""
    paths = [tmp_path / "loss.png", tmp_path / "run.json"]
    for path in paths:
        path.write_bytes(path.name.encode())
    return paths
