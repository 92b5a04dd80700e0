"""A sweep and its trials at a real MLflow server, from the files that trials leave."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retinaray.assembly.job_plan_workers import WorkerPlan
from retinaray.config.loading import to_dict
from retinaray.config.schema import TrainJob
from retinaray.config.training_schema import TrackingConfig
from retinaray.distributed.run_settings import compare_settings
from retinaray.distributed.sweep_results import TrialRecord
from retinaray.distributed.train_records import FREE_SETTINGS as _FREE_IN_TRAINING
from retinaray.distributed.trial import TrialTask
from retinaray.distributed.trial_tracking import SweepTracking
from retinaray.distributed.tune import _FREE_SETTINGS as _FREE_IN_SWEEP
from retinaray.errors import StorageError
from retinaray.reporting.mlflow_logger import MlflowLogger

VERSIONS = {"torch": "2.14.1", "commit": "unknown"}


@pytest.fixture
def task(make_train_job: Callable[..., TrainJob], tmp_path: Path) -> TrialTask:
    """A sweep of learning rates in `tmp_path/sweep`."""
    folder = tmp_path / "sweep"
    job = make_train_job(folder / "best.pth")
    return TrialTask(to_dict(job), str(folder), WorkerPlan(1, 1, 0, 1))


@pytest.fixture
def trials(task: TrialTask) -> list[TrialRecord]:
    """One that ended, one that failed before it said anything."""
    folder = task.trial_folder("t1")
    folder.mkdir(parents=True)
    events: list[dict[str, Any]] = [
        {"kind": "progress", "step": 1, "class_loss": 0.5},
        {"kind": "validation", "step": 2, "AP": 0.25, "AP_small": None},
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, events)) + "\n")
    point = {"optim.peak_lr": 0.5}
    return [
        TrialRecord("t1", point, "stopped", 0.25, {"AP": 0.25}, 2, 1.0, folder),
        TrialRecord("t2", {"optim.peak_lr": 0.1}, "failed", None, {}, 0, 1.0, None, error="x"),
    ]


def _make(task: TrialTask, **tracking: Any) -> SweepTracking:
    settings = {"space": {"optim.peak_lr": [0.1, 0.5]}, "run": {"batch": 4}}
    record = {"settings": settings, "versions": VERSIONS}
    return SweepTracking(TrackingConfig(**tracking), record, Path(task.folder))


def test_sweep_tracking_leaves_trials_below_the_sweep(
    mlflow_server: Any, task: TrialTask, trials: list[TrialRecord]
) -> None:
    tracking = {"mlflow": True, "mlflow_uri": mlflow_server.uri, "experiment": "tuned"}
    # Twice, as after a sweep that was resumed when all its trials had ended.
    for _ in range(2):
        sweep = _make(task, **tracking)
        with sweep.run:
            sweep.tell_trials(trials, task)
            sweep.run.write({"kind": "best", "step": 0, "trial": "t1", "AP": 0.25})
    runs = {run["info"]["run_name"]: run for run in mlflow_server.find_runs("tuned")}
    assert runs.keys() == {"sweep", "sweep-t1", "sweep-t2"}
    parent = runs["sweep"]
    assert parent["params"] == {"space.optim.peak_lr": "[0.1, 0.5]", "run.batch": "4"}
    assert parent["metrics"] == {"best/AP": 0.25}
    assert parent["info"]["status"] == "FINISHED"
    for name, status, rate in (("sweep-t1", "FINISHED", "0.5"), ("sweep-t2", "FAILED", "0.1")):
        assert runs[name]["tags"]["mlflow.parentRunId"] == parent["info"]["run_id"]
        assert runs[name]["info"]["status"] == status
        assert runs[name]["params"]["optim.peak_lr"] == rate
    first = runs["sweep-t1"]["info"]["run_id"]
    assert mlflow_server.history(first, "progress/class_loss") == [(1, 0.5)]
    assert mlflow_server.history(first, "validation/AP") == [(2, 0.25)]
    assert mlflow_server.history(first, "trial/score") == [(2, 0.25)]
    assert mlflow_server.list_files(first).keys() == {"metrics.jsonl"}


def test_sweep_tracking_does_nothing_without_trackers(
    task: TrialTask, trials: list[TrialRecord]
) -> None:
    sweep = _make(task)
    with sweep.run:
        sweep.tell_trials(trials, task)
    assert not list(Path(task.folder).rglob("mlflow.json"))


def test_sweep_tracking_warns_when_a_tracker_goes_away(
    task: TrialTask,
    trials: list[TrialRecord],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*arguments: object) -> None:
        raise StorageError("no answer")

    monkeypatch.setattr(MlflowLogger, "begin", refuse)
    sweep = _make(task, mlflow=True, mlflow_uri="http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING):
        sweep.tell_trials(trials, task)
    assert caplog.messages == ["no answer; trials.csv has all trials"]


@pytest.mark.parametrize("free", [_FREE_IN_TRAINING, _FREE_IN_SWEEP], ids=["train", "tune"])
def test_a_run_without_trackers_may_go_on_with_some(
    make_train_job: Callable[..., TrainJob], tmp_path: Path, free: tuple[str, ...]
) -> None:
    plain = to_dict(make_train_job(tmp_path / "m.pth"))
    before = {name: section for name, section in plain.items() if name != "tracking"}
    assert compare_settings(before, plain, free=free) == []
    tracked = to_dict(make_train_job(tmp_path / "m.pth", tracking__wandb=True, run__seed=3))
    if free is _FREE_IN_TRAINING:
        assert compare_settings(plain, tracked, free=free) == ["run.seed: 0 -> 3"]
