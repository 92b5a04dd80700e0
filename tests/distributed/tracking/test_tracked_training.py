"""A real training that reports to a real MLflow server, and one whose server is not there."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retinaray.config.schema import TrainJob
from retinaray.distributed.train import run_training
from retinaray.errors import StorageError

pytestmark = [pytest.mark.local_ray, pytest.mark.usefixtures("ray_cluster")]

MakeJob = Callable[..., TrainJob]


def test_run_training_reports_to_mlflow_and_goes_on_with_the_same_run(
    mlflow_server: Any,
    make_train_job: MakeJob,
    tmp_path: Path,
    read_events: Callable[[Path, str], list[dict[str, Any]]],
) -> None:
    changes = {
        "tracking__mlflow": True,
        "tracking__mlflow_uri": mlflow_server.uri,
        "tracking__experiment": "scenes",
    }
    outcome = run_training(make_train_job(tmp_path / "model.pth", **changes))
    folder = Path(outcome.run_folder)
    (run,) = mlflow_server.find_runs("scenes")
    run_id = run["info"]["run_id"]
    record = json.loads((folder / "run.json").read_text())
    assert run["info"]["status"] == "FINISHED"
    assert run["info"]["run_name"] == record["run_id"]
    assert run["params"]["run.batch"] == "4"
    assert run["params"]["model.backbone"] == "ResNet10FPN"
    assert run["tags"]["version.torch"] == record["versions"]["torch"]
    for kind, name in (
        ("progress", "class_loss"),
        ("progress", "images_per_s"),
        ("validation", "AP"),
    ):
        told = mlflow_server.history(run_id, f"{kind}/{name}")
        kept = [(event["step"], event[name]) for event in read_events(folder, kind)]
        assert told == kept
    assert run["metrics"]["kept/AP"] == outcome.metrics["AP"]
    files = mlflow_server.list_files(run_id)
    assert files == {
        "loss.png": (folder / "loss.png").stat().st_size,
        "metrics.jsonl": (folder / "metrics.jsonl").stat().st_size,
        "run.json": (folder / "run.json").stat().st_size,
        "model/model.pth": Path(outcome.model).stat().st_size,
    }
    # The same command again has nothing to train, and another server's address is no other run.
    again = run_training(make_train_job(tmp_path / "model.pth", **changes, run__log_every=2))
    assert again.metrics == outcome.metrics
    (run,) = mlflow_server.find_runs("scenes")
    assert (run["info"]["run_id"], run["info"]["status"]) == (run_id, "FINISHED")
    assert run["tags"]["resumed.run.log_every"] == "2"


def test_run_training_stops_before_a_worker_starts_when_the_server_is_not_there(
    make_train_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="needs the package mlflow-skinny, which is not installed")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    job = make_train_job(tmp_path / "model.pth", tracking__mlflow=True, tracking__mlflow_uri=uri)
    with pytest.raises(StorageError, match=r"MLflow at http://127\.0\.0\.1:\d+ did not open"):
        run_training(job)
    assert not (tmp_path / "model_run" / "ray_train").exists()
