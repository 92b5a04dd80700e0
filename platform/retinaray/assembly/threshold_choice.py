"""From cached raw detections to one choice: suppression by AP, a threshold per class by a rule."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from retinaray.artifact import ModelCard
from retinaray.data.coco import CategoryTable
from retinaray.detector.postprocess import NmsKind
from retinaray.evaluation.candidates import CandidateSet, DetectionSetting, apply_setting
from retinaray.evaluation.detection_matches import index_ground_truth, match_candidates
from retinaray.evaluation.operating_points import (
    OperatingPoint,
    choose_operating_points,
    parse_rule,
    score_operating_points,
    thresholds_of,
)
from retinaray.evaluation.pr_curves import PrecisionRecallCurve, precision_recall_curves
from retinaray.evaluation.threshold_sweep import SweepTable, default_grid, sweep_thresholds

# Far below any cap, so that the threshold of one class does not make room for another.
_UNCAPPED = 1_000_000


@dataclass(frozen=True, eq=False)
class ThresholdChoice:
    """What was chosen for a model on one set of images.

    Attributes:
        table: Every setting that was tried; its best row is the suppression that was chosen.
        curves: Precision and recall of each class under that suppression.
        points: The operating points, as measured with all chosen thresholds together.
        setting: Suppression and thresholds as inference takes them.
        rule: How the points were chosen.
        sweep_s: Seconds of the sweep.
    """

    table: SweepTable
    curves: tuple[PrecisionRecallCurve, ...]
    points: tuple[OperatingPoint, ...]
    setting: DetectionSetting
    rule: str
    sweep_s: float

    def apply_to(self, card: ModelCard) -> ModelCard:
        """The card with the choice inside."""
        return replace(
            card,
            score_thresholds=self.setting.score_thresholds,
            nms_iou=self.setting.nms_iou,
            nms_kind=self.setting.nms_kind,
            max_detections=self.setting.max_detections,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values: number of settings, the best, and each class's point by its name."""
        return {
            "num_settings": len(self.table.rows),
            "best": asdict(self.table.best_row),
            "rule": self.rule,
            "classes": {point.name: describe_point(point) for point in self.points},
        }


def describe_point(point: OperatingPoint) -> dict[str, Any]:
    """A class's point as plain values."""
    return {
        "threshold": point.threshold,
        "precision": point.precision,
        "recall": point.recall,
        "f1": point.f1,
        "fppi": point.false_positives_per_image,
        "num_ground_truth": point.num_ground_truth,
        "is_met": point.is_met,
        "note": point.note,
    }


def choose_thresholds(
    candidates: CandidateSet,
    truth: Mapping[str, Any],
    categories: CategoryTable,
    *,
    rule: str,
    nms_kind: NmsKind | None = None,
) -> ThresholdChoice:
    """Sweep suppression by AP, then choose each class's threshold under the best.

    Args:
        candidates: Raw detections of a validation set.
        truth: Its ground truth.
        categories: The model's classes.
        rule: See `parse_rule`.
        nms_kind: The only kind of suppression that is tried; none = see `default_grid`.

    Raises:
        ValueError: If the rule cannot be read, the ground truth has no boxes, or lacks what was
            detected.
    """
    start = time.monotonic()
    grid = default_grid(len(categories), floor=candidates.floor, nms_kind=nms_kind)
    table = sweep_thresholds(candidates, truth, categories, grid)
    sweep_s = time.monotonic() - start
    best = table.best_row
    if best.AP is None:
        raise ValueError(
            "the ground truth has no boxes to choose thresholds by: give annotations of images "
            "that show the model's classes"
        )
    widest = DetectionSetting(
        score_thresholds=(candidates.floor,) * len(categories),
        nms_iou=best.nms_iou,
        nms_kind=best.nms_kind,
        max_detections=_UNCAPPED,
    )
    matched = match_candidates(
        candidates, widest, categories, index_ground_truth(truth), ious=np.array([0.5])
    )
    curves = precision_recall_curves(matched, floor=candidates.floor)
    chosen = choose_operating_points(curves, parse_rule(rule))
    setting = replace(
        widest,
        score_thresholds=thresholds_of(chosen, categories),
        max_detections=best.max_detections,
    )
    points = score_operating_points(
        chosen, apply_setting(candidates, setting, categories), truth, rule=parse_rule(rule)
    )
    return ThresholdChoice(
        table=table, curves=curves, points=points, setting=setting, rule=rule, sweep_s=sweep_s
    )
