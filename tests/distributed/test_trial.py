"""What a trial of a sweep does when it is tried again."""

from __future__ import annotations

import queue
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from retinaray.assembly.job_plan_workers import WorkerPlan
from retinaray.config.loading import to_dict
from retinaray.config.schema import TrainJob
from retinaray.errors import DivergenceError


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, in the trial `t1`."""
    from retinaray.distributed import trial

    context = SimpleNamespace(get_trial_id=lambda: "t1")
    monkeypatch.setattr(trial.tune, "get_context", lambda: context)
    monkeypatch.setattr(trial, "_TellScores", object)
    return trial


def test_run_trial_does_not_train_again_what_has_diverged(
    trial: Any,
    make_train_job: Callable[..., TrainJob],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = trial.TrialTask(
        tree=to_dict(make_train_job(tmp_path / "model.pth")),
        folder=str(tmp_path / "sweep"),
        workers=WorkerPlan(1, 1, 0, 1),
    )
    causes = [ConnectionError("gone"), DivergenceError("no finite gradient in 20 steps")]
    failures = iter(causes)

    def fail(*args: Any, **options: Any) -> None:
        raise next(failures)

    monkeypatch.setattr(trial, "run_workers", fail)
    with pytest.raises(ConnectionError):
        trial.run_trial({"optim.peak_lr": 0.1}, task)
    # Another failure than a divergence is worth a try; the third is not made.
    for _ in range(2):
        with pytest.raises(DivergenceError, match="no finite gradient in 20 steps"):
            trial.run_trial({"optim.peak_lr": 0.1}, task)
    assert list(failures) == []


def test_trial_tells_tune_only_what_was_validated() -> None:
    from retinaray.distributed import trial

    # Its constructor wants a session of Tune.
    callback = object.__new__(trial._TellScores)
    told: queue.Queue[dict[str, Any]] = queue.Queue()
    callback._training_actor_item_queue = told
    for step, score in ((2, 0.25), (3, -1e9), (4, -1.0)):
        callback.after_report(SimpleNamespace(), [{"step": step, "score": score}], None)
    # The last one's objective had no ground truth.
    assert [told.get_nowait()["step"] for _ in range(told.qsize())] == [2, 4]
