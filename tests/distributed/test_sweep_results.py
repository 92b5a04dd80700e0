"""What a sweep's trials came to, from stand-ins for Ray Tune's results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from retinaray.assembly.job_plan_workers import WorkerPlan
from retinaray.assembly.training import hash_settings, make_anchor_spec
from retinaray.config.loading import to_dict
from retinaray.config.schema import TrainJob
from retinaray.data.coco import CocoDataset, load_coco
from retinaray.detector.anchors import hash_anchors, make_anchors
from retinaray.distributed.sweep_results import (
    TrialRecord,
    check_applied,
    choose_best,
    collect_trials,
    expect_proof,
)
from retinaray.distributed.trial import CHECKPOINT_PATH, TrialTask
from retinaray.errors import ClusterError


@dataclass
class FakeResult:
    """The parts of `ray.tune.Result` that are read."""

    path: str
    config: dict[str, Any]
    metrics_dataframe: pd.DataFrame | None = None
    metrics: dict[str, Any] = dataclass_field(default_factory=lambda: {"time_total_s": 12.5})
    error: Exception | None = None


@pytest.fixture
def task(make_train_job: Callable[..., TrainJob], tmp_path: Path) -> TrialTask:
    """Trials of a training of six steps: eight images, batches of four, three epochs."""
    tree = to_dict(make_train_job(tmp_path / "best.pth"))
    return TrialTask(tree=tree, folder=str(tmp_path), workers=WorkerPlan(1, 1, 0, 1))


@pytest.fixture
def train(task: TrialTask) -> CocoDataset:
    """The training set of the task."""
    return load_coco(Path(task.tree["data"]["annotations"]))


@pytest.fixture
def make_result(task: TrialTask, train: CocoDataset, tmp_path: Path) -> Callable[..., FakeResult]:
    """make_result(trial_id, point, rows): rows of step, score and whether weights are there."""

    def make(
        trial_id: str,
        point: dict[str, Any],
        rows: list[tuple[int, float, bool]],
        *,
        start: float = 1000.0,
        **changes: Any,
    ) -> FakeResult:
        proof = expect_proof(task.make_job(point, trial_id), train)
        table = []
        for step, score, is_kept in rows:
            folder = tmp_path / trial_id / f"checkpoint_{step}"
            if is_kept:
                folder.mkdir(parents=True)
            entry = {"step": step, "score": score, "AP": score, CHECKPOINT_PATH: str(folder)}
            table.append({**entry, "AP_large": None, "timestamp": start + step, **proof})
        frame = pd.DataFrame(table) if table else None
        return FakeResult(f"{tmp_path}/ray_tune/{trial_id}", point, frame, **changes)

    return make


def _record(trial_id: str, score: float | None, **changes: Any) -> TrialRecord:
    values = {
        "point": {},
        "status": "done",
        "metrics": {},
        "steps": 6,
        "seconds": 1.0,
        "checkpoint": Path("kept"),
    }
    return TrialRecord(trial_id=trial_id, score=score, **{**values, **changes})


def test_make_job_gives_each_trial_its_point_and_its_folder(task: TrialTask) -> None:
    point = {"anchors.base_scale": 2.0, "anchors.ratios": "[1, 3]", "optim.peak_lr": 0.01}
    job = task.make_job(point, "t7")
    assert job.anchors.scales == (2.0, 2 * 2 ** (1 / 3), 2 * 2 ** (2 / 3))
    assert job.anchors.ratios == (1.0, 3.0)
    assert job.optim.peak_lr == 0.01
    assert job.output == f"{task.folder}/trials/t7/model.pth"
    assert job.data.annotations == task.tree["data"]["annotations"]


def test_expect_proof_is_what_a_worker_of_that_job_computes(
    task: TrialTask, train: CocoDataset
) -> None:
    job = task.make_job({"anchors.base_scale": 2.0}, "t0")
    anchors = make_anchors(make_anchor_spec(job.anchors), 64, 96)
    assert expect_proof(job, train) == {
        "settings_sha256": hash_settings(job),
        "anchors_sha256": hash_anchors(anchors),
    }
    other = expect_proof(task.make_job({"anchors.base_scale": 4.0}, "t0"), train)
    assert all(other[key] != value for key, value in expect_proof(job, train).items())


def test_collect_trials_gives_the_best_validation_whose_weights_are_there(
    task: TrialTask, train: CocoDataset, make_result: Callable[..., FakeResult], tmp_path: Path
) -> None:
    rows = [(2, 0.5, False), (4, 0.4, True), (6, 0.3, True)]
    (trial,) = collect_trials([make_result("t0", {"run.seed": 3}, rows)], task, train)
    assert (trial.trial_id, trial.status, trial.steps) == ("t0", "done", 6)
    assert trial.score == 0.4
    assert trial.checkpoint == tmp_path / "t0" / "checkpoint_4"
    assert trial.metrics["step"] == 4
    assert trial.metrics["AP_large"] is None
    assert (trial.point, trial.seconds, trial.error) == ({"run.seed": 3}, 12.5, "")
    assert trial.coverage is not None
    assert 0 <= trial.coverage <= 1


def test_collect_trials_measures_the_coverage_of_each_trial_s_anchors(
    task: TrialTask, train: CocoDataset, make_result: Callable[..., FakeResult]
) -> None:
    # The scenes have objects of 64x96 pictures: anchors of 64 strides overlap none by half.
    points = [{"anchors.base_scale": 2.0}, {"anchors.base_scale": 64.0}]
    results = [make_result(f"t{n}", point, [(6, 0.1, True)]) for n, point in enumerate(points)]
    small, huge = collect_trials(results, task, train)
    assert small.coverage is not None
    assert huge.coverage == 0
    assert small.coverage > 0


@pytest.mark.parametrize(
    ("rows", "error", "status", "score"),
    [
        ([(2, 0.2, True), (6, 0.3, True)], None, "done", 0.3),
        ([(2, 0.2, True), (4, 0.1, True)], None, "stopped", 0.2),
        ([(2, 0.2, True)], RuntimeError("Traceback ...\n\nout of memory\n"), "failed", 0.2),
        ([], RuntimeError("worker died"), "failed", None),
        ([], None, "stopped", None),
        ([(2, -0.3, True), (6, -0.5, True)], None, "done", -0.3),
    ],
    ids=["done", "stopped", "failed late", "failed at once", "never ran", "score below zero"],
)
def test_collect_trials_says_how_each_ended(
    task: TrialTask,
    train: CocoDataset,
    make_result: Callable[..., FakeResult],
    rows: list[tuple[int, float, bool]],
    error: Exception | None,
    status: str,
    score: float | None,
) -> None:
    (trial,) = collect_trials([make_result("t0", {}, rows, error=error)], task, train)
    assert (trial.status, trial.score) == (status, score)
    assert (trial.checkpoint is None) == (score is None)
    assert trial.error == (str(error).strip().splitlines()[-1] if error else "")


def test_collect_trials_has_no_checkpoint_when_all_are_gone(
    task: TrialTask, train: CocoDataset, make_result: Callable[..., FakeResult]
) -> None:
    (trial,) = collect_trials([make_result("t0", {}, [(6, 0.3, False)])], task, train)
    assert (trial.score, trial.checkpoint) == (0.3, None)


def test_collect_trials_skips_reports_that_are_no_validation(
    task: TrialTask, train: CocoDataset, make_result: Callable[..., FakeResult]
) -> None:
    result = make_result("t0", {}, [(6, 0.3, True)])
    started = pd.DataFrame([{"step": None, "score": None, "epoch": 0}])
    result.metrics_dataframe = pd.concat([started, result.metrics_dataframe])
    (trial,) = collect_trials([result], task, train)
    assert (trial.score, trial.steps) == (0.3, 6)
    result.metrics_dataframe = started[["epoch"]]
    (trial,) = collect_trials([result], task, train)
    assert (trial.score, trial.steps) == (None, 0)


def test_collect_trials_goes_by_the_first_report(
    task: TrialTask, train: CocoDataset, make_result: Callable[..., FakeResult]
) -> None:
    results = [
        make_result("silent", {}, []),
        make_result("third", {}, [(2, 0.5, True)], start=30.0),
        make_result("first", {}, [(2, 0.1, True), (6, 0.1, True)], start=10.0),
        make_result("mute", {}, []),
        make_result("second", {}, [(2, 0.3, True)], start=12.0),
    ]
    trials = collect_trials(results, task, train)
    assert [trial.trial_id for trial in trials] == ["first", "second", "third", "silent", "mute"]


def test_collect_trials_reads_lists(
    task: TrialTask, train: CocoDataset, make_result: Callable[..., FakeResult]
) -> None:
    points = [{"anchors.ratios": "[1, 3]"}, {"anchors.ratios": "[1, 2, 0.5]"}]
    results = [make_result(f"t{n}", point, []) for n, point in enumerate(points)]
    trials = collect_trials(results, task, train)
    assert [trial.point["anchors.ratios"] for trial in trials] == [[1, 3], [1, 2, 0.5]]


def test_collect_trials_refuses_a_trial_that_trained_with_other_anchors(
    task: TrialTask, train: CocoDataset, make_result: Callable[..., FakeResult]
) -> None:
    result = make_result("t3", {"anchors.base_scale": 2.0}, [(6, 0.3, True)])
    result.config = {"anchors.base_scale": 4.0}
    with pytest.raises(ClusterError, match=r"trial t3 trained with other settings than were drawn"):
        collect_trials([result], task, train)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"settings_sha256": "a", "anchors_sha256": "x"}, "other anchors .* is x, expected b"),
        ({"settings_sha256": "x", "anchors_sha256": "b"}, "other settings .* is x, expected a"),
        ({"settings_sha256": "a"}, "other anchors .* is None, expected b"),
    ],
)
def test_check_applied_refuses_when_a_hash_differs(metrics: dict[str, str], message: str) -> None:
    with pytest.raises(ClusterError, match=f"^trial t1 trained with {message}; nodes may run"):
        check_applied("t1", metrics, {"settings_sha256": "a", "anchors_sha256": "b"})


def test_check_applied_is_silent_when_all_hashes_agree() -> None:
    proof = {"settings_sha256": "a", "anchors_sha256": "b"}
    check_applied("t1", {**proof, "AP": 0.3}, proof)


@pytest.mark.parametrize(
    ("trials", "best"),
    [
        ([_record("a", 0.2), _record("b", 0.4), _record("c", 0.3)], "b"),
        ([_record("a", 0.2, status="stopped"), _record("b", 0.1)], "a"),
        ([_record("a", 0.2), _record("b", 0.9, checkpoint=None)], "a"),
        ([_record("a", None, status="failed"), _record("b", -0.5)], "b"),
        ([_record("a", -0.5), _record("b", -0.1), _record("c", -1.0)], "b"),
        ([_record("a", 0.0), _record("b", -0.1)], "a"),
        ([_record("a", 0.3), _record("b", 0.3)], "a"),
    ],
    ids=["highest", "stopped", "weights gone", "one failed", "below zero", "zero", "equal"],
)
def test_choose_best_takes_the_highest_score_with_weights(
    trials: list[TrialRecord], best: str
) -> None:
    assert choose_best(trials).trial_id == best


def test_choose_best_says_why_there_is_none() -> None:
    trials = [
        _record("t0", None, status="failed", error="out of memory", checkpoint=None),
        _record("t1", None, status="failed", error="node lost", checkpoint=None),
        _record("t2", 0.4, checkpoint=None),
    ]
    with pytest.raises(
        ClusterError, match=r"^none of 3 trials left weights: t0: out of memory; t1: node lost$"
    ):
        choose_best(trials)
    with pytest.raises(ClusterError, match=r"none of 0 trials .*: none was validated in time"):
        choose_best(iter([]))


def test_collect_trials_shows_a_point_that_is_no_training_as_failed(
    task: TrialTask, train: CocoDataset
) -> None:
    error = RuntimeError("trace\nconfig: run.batch=3 does not divide")
    result = FakeResult("x/t1", {"run.batch": 0}, error=error)
    (trial,) = collect_trials([result], task, train)
    assert (trial.status, trial.score, trial.checkpoint) == ("failed", None, None)
    assert trial.error == "config: run.batch=3 does not divide"
    assert trial.point == {"run.batch": 0}


def test_choose_best_leaves_out_what_failed() -> None:
    trials = [_record("late", 0.9, status="failed", error="lost"), _record("good", 0.5)]
    assert choose_best(trials).trial_id == "good"
