"""train, export, infer, evaluate and tune as submitted jobs; train and infer are stopped once."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.local_ray

Command = Callable[..., subprocess.CompletedProcess[str]]
WaitUntil = Callable[[Callable[[], object], str], None]
ReadResult = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Stopped:
    """A job that was stopped in the middle, and the same command again.

    Attributes:
        folder: The run.
        state: How the cluster saw the first job at its end.
        log: What the first job wrote.
        kept: Files that were there after the first job, with their content.
        again: The second job.
    """

    folder: Path
    state: str
    log: str
    kept: dict[str, bytes]
    again: subprocess.CompletedProcess[str]


def _training(workplace: Path) -> tuple[str, ...]:
    data = workplace / "data"
    return (
        *("--images", str(data / "images"), "--annotations", str(data / "train.json")),
        *("--val-images", str(data / "images"), "--val-annotations", str(data / "val.json")),
        *("--backbone", "ResNet10FPN", "--fpn-channels", "16", "--head-depth", "0"),
        *("--size", "64", "96", "--batch", "4", "--precision", "fp32", "--log-every", "1"),
    )


@contextmanager
def _hold(image: Path) -> Iterator[Callable[[], bool]]:
    """Make every reader of an image wait; yields what lets one of them go, if there is one."""
    content = image.read_bytes()
    image.unlink()
    os.mkfifo(image)

    def feed() -> bool:
        try:
            descriptor = os.open(image, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return False
        os.set_blocking(descriptor, True)
        with os.fdopen(descriptor, "wb") as writer:
            writer.write(content)
        return True

    try:
        yield feed
    finally:
        image.unlink()
        image.write_bytes(content)


@pytest.fixture(scope="module")
def stop_and_repeat(
    submit: Command,
    ray_job: Command,
    fetch_json: Callable[..., Any],
    wait_until: WaitUntil,
) -> Callable[..., Stopped]:
    """Submit a command, stop it when it waits for an image at some point, submit it again."""

    def run(
        name: str,
        command: tuple[str, ...],
        *,
        image: Path,
        num_readings: int,
        folder: Path,
        is_there: Callable[[], bool],
        options: tuple[str, ...] = (),
    ) -> Stopped:
        def is_alive() -> bool:
            job = fetch_json(f"/api/jobs/{name}")
            assert job["status"] in ("PENDING", "RUNNING"), job["message"]
            return True

        with _hold(image) as feed:
            started = submit(name, *command, options=("--no-wait", *options))
            assert started.returncode == 0, started.stderr
            for number in range(num_readings):
                wait_until(lambda: is_alive() and feed(), f"reading {number}")
            wait_until(lambda: is_alive() and is_there(), f"{name} is half done")
            assert ray_job("stop", name).returncode == 0
            state = fetch_json(f"/api/jobs/{name}")["status"]
            log = ray_job("logs", name).stdout
            kept = {str(p.relative_to(folder)): p.read_bytes() for p in _files(folder)}
        return Stopped(folder, state, log, kept, submit(f"{name}-again", *command))

    return run


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def training(stop_and_repeat: Callable[..., Stopped], workplace: Path) -> Stopped:
    """Three epochs of two steps; stopped after the first checkpoint."""
    folder = workplace / "submitted_run"
    command = ("jobs/train.py", str(workplace / "submitted.pth"), *_training(workplace))
    return stop_and_repeat(
        "train",
        (*command, "--epochs", "3", "--workers", "1"),
        # The first epoch gets the image; the second waits for it in vain.
        image=min((workplace / "data" / "images").glob("train*")),
        num_readings=1,
        folder=folder,
        is_there=lambda: any("step_00000002" in p.read_text() for p in folder.rglob("*snap*.json")),
    )


def test_train_leaves_its_checkpoint_when_stopped(training: Stopped) -> None:
    assert training.state == "STOPPED"
    assert "8 training images, 3 validation images, 10 classes" in training.log
    assert "SIGTERM: a checkpoint is kept after the present step" in training.log
    assert "Traceback" not in training.log
    checkpoints = [name for name in training.kept if name.endswith("training.pth")]
    assert [Path(name).parent.name for name in checkpoints] == ["step_00000002"]


def test_train_goes_on_at_its_checkpoint_when_submitted_again(
    training: Stopped, read_result: ReadResult, workplace: Path
) -> None:
    assert training.again.returncode == 0, training.again.stdout
    assert "resuming run" in training.again.stdout
    result = read_result(training.again.stdout)
    assert result["model"] == str(workplace / "submitted.pth")
    assert result["steps"] == 6
    lines = (training.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    assert [e["step"] for e in events if e["kind"] == "validation"] == [2, 4, 6]


def test_logs_link_to_the_dashboard_and_keep_its_token(training: Stopped, head: Any) -> None:
    assert f"this job {head.dashboard}/#/jobs/train-again" in training.again.stdout
    assert head.token not in training.again.stdout + training.log


@pytest.fixture(scope="module")
def exported(training: Stopped, submit: Command, workplace: Path) -> Path:
    """The trained model as ONNX."""
    model = workplace / "submitted.onnx"
    answer = submit("export", "jobs/export.py", str(workplace / "submitted.pth"), str(model))
    assert answer.returncode == 0, training.again.stdout + answer.stdout
    return model


def test_export_writes_a_model(exported: Path) -> None:
    assert exported.stat().st_size > 10_000


@pytest.fixture(scope="module")
def inference(stop_and_repeat: Callable[..., Stopped], exported: Path, workplace: Path) -> Stopped:
    """Six images in three parts; stopped while the last part waits for its image."""
    folder = workplace / "detected_run"
    command = (
        *("jobs/infer.py", str(exported), "--images", str(workplace / "data" / "images")),
        *("--annotations", str(workplace / "data" / "test.json"), "--score-threshold", "0"),
        *("--output", str(workplace / "detected.json"), "--part-size", "2", "--workers", "1"),
    )
    return stop_and_repeat(
        "infer",
        command,
        image=max((workplace / "data" / "images").glob("test*")),
        num_readings=0,
        folder=folder,
        is_there=lambda: len(_parts(_files(folder))) >= 2,
        # By default Ray kills after 3 s, which on busy cores is too short to give back the lock.
        options=("--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "300"}}'),
    )


def _parts(files: list[Path]) -> list[Path]:
    return [path for path in files if path.parent.name == "parts"]


@pytest.mark.slow
def test_infer_keeps_its_finished_parts_when_stopped(inference: Stopped) -> None:
    assert inference.state == "STOPPED"
    assert "3 of 3 parts to do" in inference.log
    # Before that, a thread of Ray Data may have reported an InterruptedError of its own.
    _, notice, rest = inference.log.partition("stopped by SIGTERM; the same command goes on")
    assert notice
    assert "Traceback" not in rest
    assert "_SUCCESS" not in inference.kept
    # The lock is given back, so that nobody waits for a driver that is gone.
    assert [name for name in inference.kept if name.startswith("lock")] == []


@pytest.mark.slow
def test_infer_does_the_rest_when_submitted_again(
    inference: Stopped, read_result: ReadResult
) -> None:
    assert inference.again.returncode == 0, inference.again.stdout
    assert "1 of 3 parts to do" in inference.again.stdout
    totals = read_result(inference.again.stdout)["totals"]
    assert (totals["num_parts"], totals["num_images"], totals["num_errors"]) == (3, 6, 0)
    kept = [name for name in inference.kept if name.startswith("parts/")]
    assert kept
    for name in kept:
        assert (inference.folder / name).read_bytes() == inference.kept[name]
    assert (inference.folder / "_SUCCESS").exists()


@pytest.mark.slow
def test_evaluate_gives_the_scores_that_infer_printed(
    inference: Stopped, submit: Command, read_result: ReadResult, workplace: Path
) -> None:
    truth = str(workplace / "data" / "test.json")
    answer = submit(
        "evaluate", "jobs/evaluate.py", str(workplace / "detected.json"), "--annotations", truth
    )
    assert answer.returncode == 0, answer.stdout
    scores = read_result(inference.again.stdout)["scores"]
    assert scores["num_detections"] > 0
    assert {key: read_result(answer.stdout)[key] for key in scores} == scores


@pytest.mark.slow
def test_tune_leaves_its_best_model(
    submit: Command, read_result: ReadResult, workplace: Path
) -> None:
    sweep = workplace / "submitted.yaml"
    sweep.write_text(
        "space: {anchors.base_scale: [4.0]}\n"
        "sweep: {search: grid, grace_epochs: 1, retries: 0, concurrent: 1}\n",
        encoding="utf-8",
    )
    folder = workplace / "submitted_sweep"
    answer = submit(
        *("tune", "jobs/tune.py", str(folder), "--config", str(sweep)),
        *(*_training(workplace), "--epochs", "1", "--workers", "1"),
    )
    assert answer.returncode == 0, answer.stdout
    result = read_result(answer.stdout)
    assert result["trials"]["done"] == 1
    assert Path(result["model"]).parent == folder
    assert "Traceback" not in answer.stdout


def test_submitter_shows_one_line_when_a_setting_is_wrong(
    submit: Command, fetch_json: Callable[..., Any], workplace: Path
) -> None:
    command = ("jobs/train.py", str(workplace / "never.pth"), *_training(workplace))
    answer = submit("fault", *command, "--epochs", "many")
    assert answer.returncode != 0
    assert "Traceback" not in answer.stdout + answer.stderr
    errors = {line for line in answer.stdout.splitlines() if "error: " in line}
    assert len(errors) == 1, answer.stdout
    assert "run.epochs" in errors.pop()
    assert fetch_json("/api/jobs/fault")["driver_exit_code"] == 2
    assert not (workplace / "never_run").exists()
