"""What a sweep's trials came to: scores, proof that their settings applied, kept checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from retinaray.anchoring.coverage import measure_coverage, select_boxes
from retinaray.assembly.training import (
    choose_job_canvas,
    count_steps,
    hash_settings,
    make_anchor_spec,
)
from retinaray.config.schema import TrainJob
from retinaray.config.search_space import decode_point
from retinaray.data.coco import CocoDataset
from retinaray.detector.anchors import hash_anchors, make_anchors
from retinaray.distributed.trial import CHECKPOINT_PATH, TrialTask
from retinaray.errors import ClusterError, ConfigError

Status = Literal["done", "stopped", "failed"]


@dataclass(frozen=True)
class TrialRecord:
    """One trial.

    Attributes:
        trial_id: Its name in the sweep.
        point: The drawn values, by key of the space.
        status: `stopped` by the scheduler, the time budget or its own patience before its last
            step.
        score: The best objective; none when it never validated.
        metrics: Of the best validation; empty when there was none.
        steps: Steps taken.
        seconds: Time that it took.
        checkpoint: Folder of the best weights that are still there; none when there are none.
        coverage: Share of the training set's boxes that its anchors reach at IoU 0.5.
        error: Why it failed, in one line; empty when it did not.
    """

    trial_id: str
    point: Mapping[str, object]
    status: Status
    score: float | None
    metrics: Mapping[str, Any]
    steps: int
    seconds: float
    checkpoint: Path | None
    coverage: float | None = None
    error: str = ""


def collect_trials(
    results: Iterable[Any], task: TrialTask, train: CocoDataset
) -> list[TrialRecord]:
    """Every trial of a sweep by the time of its first report, those without one last.

    Args:
        results: Of Ray Tune.
        task: What the trials share.
        train: The training set.

    Raises:
        ClusterError: If a trial trained with other settings or anchors than were drawn.
    """
    ordered = sorted(results, key=_first_report)
    return [_collect(result, task, train) for result in ordered]


def _first_report(result: Any) -> float:
    rows = _history(result)
    return float(rows[0]["timestamp"]) if rows else math.inf


def _collect(result: Any, task: TrialTask, train: CocoDataset) -> TrialRecord:
    trial_id = Path(result.path).name
    rows = _history(result)
    error = str(result.error).strip().splitlines()[-1] if result.error else ""
    try:
        job = task.make_job(result.config, trial_id)
    except ConfigError as fault:
        # Values that are valid each and in pairs, but not all together.
        return _refused(trial_id, result.config, error or str(fault))
    if rows:
        check_applied(trial_id, rows[-1], expect_proof(job, train))
    kept = [row for row in rows if row.get(CHECKPOINT_PATH) and Path(row[CHECKPOINT_PATH]).is_dir()]
    best = max(kept or rows, key=lambda row: row["score"], default={})
    steps = int(rows[-1]["step"]) if rows else 0
    is_complete = steps >= count_steps(job, len(train))
    return TrialRecord(
        trial_id=trial_id,
        point=decode_point(result.config),
        status="failed" if error else "done" if is_complete else "stopped",
        score=best.get("score"),
        metrics=best,
        steps=steps,
        seconds=float((result.metrics or {}).get("time_total_s") or 0.0),
        checkpoint=Path(best[CHECKPOINT_PATH]) if kept else None,
        coverage=_measure_coverage(job, train),
        error=error,
    )


def _refused(trial_id: str, point: Mapping[str, Any], error: str) -> TrialRecord:
    """A trial whose settings were no valid training."""
    return TrialRecord(
        trial_id=trial_id,
        point=decode_point(point),
        status="failed",
        score=None,
        metrics={},
        steps=0,
        seconds=0.0,
        checkpoint=None,
        error=error.splitlines()[0],
    )


def _measure_coverage(job: TrainJob, train: CocoDataset) -> float | None:
    boxes = select_boxes(train, choose_job_canvas(job, train))
    return measure_coverage(boxes, make_anchor_spec(job.anchors)).all.share_iou_50


def expect_proof(job: TrainJob, train: CocoDataset) -> dict[str, str]:
    """What workers report when they train with these settings on these data, and no others."""
    anchors = make_anchors(make_anchor_spec(job.anchors), *choose_job_canvas(job, train))
    return {"settings_sha256": hash_settings(job), "anchors_sha256": hash_anchors(anchors)}


def _history(result: Any) -> list[dict[str, Any]]:
    """All validations that Tune has on record, oldest first; what pandas calls NaN is absent."""
    frame = result.metrics_dataframe
    if frame is None or "step" not in frame:
        return []
    rows = frame[frame["step"].notna()].astype(object)
    return list(rows.where(rows.notna(), None).to_dict(orient="records"))


def check_applied(trial_id: str, metrics: Mapping[str, Any], expected: Mapping[str, str]) -> None:
    """Hold what the workers trained with to what was drawn.

    Args:
        trial_id: For the message.
        metrics: As the workers reported them.
        expected: Hashes of the settings and of the anchors.

    Raises:
        ClusterError: If they differ.
    """
    for key, value in expected.items():
        if metrics.get(key) != value:
            raise ClusterError(
                f"trial {trial_id} trained with other {key.removesuffix('_sha256')} than were "
                f"drawn: {key} is {metrics.get(key)}, expected {value}; nodes may run different "
                "versions of retinaray or of the data set"
            )


def choose_best(trials: Iterable[TrialRecord]) -> TrialRecord:
    """The trial with the best objective among those that did not fail and whose weights are there.

    Raises:
        ClusterError: If there is none; says why the trials failed.
    """
    trials = list(trials)
    usable = [
        trial
        for trial in trials
        if trial.score is not None and trial.checkpoint is not None and trial.status != "failed"
    ]
    if not usable:
        reasons = "; ".join(f"{t.trial_id}: {t.error}" for t in trials if t.error)
        raise ClusterError(
            f"none of {len(trials)} trials left weights: {reasons or 'none was validated in time'}"
        )
    return max(usable, key=lambda trial: trial.score or 0.0)
