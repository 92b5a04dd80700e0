"""AP of hundreds of detection settings from one pass of the network, and the best of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from retinaray.data.coco import CategoryTable
from retinaray.detector.postprocess import NMS_KINDS, NmsKind
from retinaray.evaluation.ap_curves import average_precision
from retinaray.evaluation.candidates import DEFAULT_FLOOR, CandidateSet, DetectionSetting
from retinaray.evaluation.detection_matches import (
    GroundTruth,
    index_ground_truth,
    match_candidates,
)

_NMS_IOUS = (0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)
_CAPS = (30, 100, 300)
_THRESHOLDS = (0.02, 0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7)
# APs that agree to here are equal: the rest is the order of a sum.
_AP_DIGITS = 9


@dataclass(frozen=True)
class SweepGrid:
    """Settings to try: each suppression with each cap and each threshold.

    Attributes:
        nms: NMS kinds with their IoU.
        max_detections: Caps per image.
        score_thresholds: One for all classes, in [0, 1).
    """

    nms: tuple[tuple[NmsKind, float], ...]
    max_detections: tuple[int, ...]
    score_thresholds: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.nms) * len(self.max_detections) * len(self.score_thresholds)


@dataclass(frozen=True)
class SweepRow:
    """One setting and what it scores.

    Attributes:
        nms_kind: Which boxes compete.
        nms_iou: IoU above which the worse goes.
        max_detections: Cap per image.
        score_threshold: Detections score above it, whatever their class.
        AP: Mean over IoU 0.50:0.95 and classes; None without ground truth.
        AP50: At IoU 0.50.
        AP75: At IoU 0.75.
        num_detections: In all images together.
    """

    nms_kind: NmsKind
    nms_iou: float
    max_detections: int
    score_threshold: float
    AP: float | None
    AP50: float | None
    AP75: float | None
    num_detections: int


@dataclass(frozen=True)
class SweepTable:
    """All rows of a sweep, in the order of its grid; at least one."""

    rows: tuple[SweepRow, ...]

    @property
    def best_row(self) -> SweepRow:
        """The row of the highest AP.

        Among equals class NMS before agnostic before none, then the highest threshold, then the
        fewest detections, then the NMS IoU nearest to 0.5, then the smallest cap.
        """
        return min(self.rows, key=_rank)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Plain values by column, for CSV or Parquet."""
        return [asdict(row) for row in self.rows]


def _rank(row: SweepRow) -> tuple[float, ...]:
    return (
        -round(row.AP or 0.0, _AP_DIGITS),
        NMS_KINDS.index(row.nms_kind),
        -row.score_threshold,
        row.num_detections,
        round(abs(row.nms_iou - 0.5), _AP_DIGITS),
        row.max_detections,
    )


def default_grid(
    num_classes: int, *, floor: float = DEFAULT_FLOOR, nms_kind: NmsKind | None = None
) -> SweepGrid:
    """Several hundred settings around those that detectors are run with.

    Args:
        num_classes: With one class, agnostic suppression is class suppression and is left out.
        floor: Of the candidates: the lowest threshold that is tried.
        nms_kind: The only kind that is tried; none = both that suppress.
    """
    kinds: tuple[NmsKind, ...] = ("class",) if num_classes == 1 else ("class", "agnostic")
    if nms_kind is not None:
        kinds = (nms_kind,)
    # Where nothing is suppressed the IoU says nothing.
    ious = _NMS_IOUS if nms_kind != "none" else (0.5,)
    return SweepGrid(
        nms=tuple((kind, iou) for kind in kinds for iou in ious),
        max_detections=_CAPS,
        score_thresholds=(floor, *(value for value in _THRESHOLDS if value > floor)),
    )


def sweep_thresholds(
    candidates: CandidateSet,
    truth: Mapping[str, Any],
    categories: CategoryTable,
    grid: SweepGrid | None = None,
) -> SweepTable:
    """AP of every setting of a grid.

    Args:
        candidates: Of all images; images of the ground truth that are not there count as images
            without detections.
        truth: A COCO file's content.
        categories: The model's classes.
        grid: Settings; none = `default_grid`.

    Raises:
        ValueError: If the grid is empty or goes below the candidates' floor, or the ground truth
            lacks a class or an image that has detections.
    """
    if grid is None:
        grid = default_grid(len(categories), floor=candidates.floor)
    if not len(grid):
        raise ValueError(f"expected a grid with at least one setting, got {grid}")
    indexed = index_ground_truth(truth)
    return SweepTable(
        tuple(
            row
            for nms_kind, nms_iou in grid.nms
            for row in _sweep_one(candidates, indexed, categories, grid, nms_kind, nms_iou)
        )
    )


def _sweep_one(
    candidates: CandidateSet,
    truth: GroundTruth,
    categories: CategoryTable,
    grid: SweepGrid,
    nms_kind: NmsKind,
    nms_iou: float,
) -> Iterator[SweepRow]:
    """Rows of one suppression, whose detections are matched once."""
    widest = DetectionSetting(
        score_thresholds=(min(grid.score_thresholds),) * len(categories),
        nms_iou=nms_iou,
        nms_kind=nms_kind,
        max_detections=max(grid.max_detections),
    )
    matched = match_candidates(candidates, widest, categories, truth)
    for cap in grid.max_detections:
        for threshold in grid.score_thresholds:
            scores = average_precision(
                matched,
                score_thresholds=(threshold,) * len(truth.names),
                max_detections=cap,
            )
            yield SweepRow(
                nms_kind=nms_kind,
                nms_iou=nms_iou,
                max_detections=cap,
                score_threshold=threshold,
                AP=scores.AP,
                AP50=scores.AP50,
                AP75=scores.AP75,
                num_detections=scores.num_detections,
            )
