"""Which share of a data set's ground truth its anchors can reach, by class, size and aspect.

A box that no anchor overlaps by the foreground IoU is learnt only through the rule that its best
anchor is foreground whatever its IoU (`match_anchors`), and not at all without that rule. Crowd
regions are no objects and count nowhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from retinaray.anchoring.best_iou import best_iou_of, place_boxes
from retinaray.anchoring.unmatched import count_unmatched
from retinaray.data.coco import CategoryTable, CocoDataset
from retinaray.detector.anchors import AnchorSpec, count_level_anchors

__all__ = [
    "RATIO_BINS",
    "SIZE_BINS",
    "CoverageReport",
    "CoverageRow",
    "LearnableBoxes",
    "best_iou_of",
    "count_unmatched",
    "describe_coverage",
    "measure_coverage",
    "poorly_covered",
    "select_boxes",
]

SIZE_BINS = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, np.inf)}
"""COCO's areas in original square pixels, lower end included."""
RATIO_BINS = {
    "<1:4": (0.0, 0.25),
    "1:4-1:2": (0.25, 0.5),
    "1:2-1:1": (0.5, 1.0),
    "1:1-2:1": (1.0, 2.0),
    "2:1-4:1": (2.0, 4.0),
    ">=4:1": (4.0, np.inf),
}
"""Height to width in network pixels, lower end included; a square is the first of 1:1-2:1."""


@dataclass(frozen=True)
class CoverageRow:
    """Coverage of one group of boxes.

    Attributes:
        count: Boxes; everything below is 0 or None when there are none.
        num_iou_50: Boxes whose best anchor has IoU >= 0.5.
        num_iou_40: Likewise >= 0.4: the anchor is not called background.
        mean_best_iou: Mean over the boxes of the best IoU.
        num_only_by_best_anchor: Boxes whose best IoU is above 0 but below the foreground IoU: only
            the best-anchor rule teaches them.
        num_out_of_reach: Boxes that no anchor touches: never learnt.
    """

    count: int
    num_iou_50: int
    num_iou_40: int
    mean_best_iou: float | None
    num_only_by_best_anchor: int
    num_out_of_reach: int

    @property
    def share_iou_50(self) -> float | None:
        """Share of the boxes in [0, 1] that reach IoU 0.5; None without boxes."""
        return self.num_iou_50 / self.count if self.count else None

    @property
    def share_iou_40(self) -> float | None:
        """Share of the boxes in [0, 1] that reach IoU 0.4; None without boxes."""
        return self.num_iou_40 / self.count if self.count else None

    def to_dict(self) -> dict[str, int | float | None]:
        """Plain values for JSON."""
        return {
            "count": self.count,
            "share_iou_0.5": self.share_iou_50,
            "share_iou_0.4": self.share_iou_40,
            "mean_best_iou": self.mean_best_iou,
            "only_by_best_anchor": self.num_only_by_best_anchor,
            "out_of_reach": self.num_out_of_reach,
        }


@dataclass(frozen=True)
class CoverageReport:
    """Coverage of a data set.

    Attributes:
        all: Every box.
        by_class: By category name in the table's order; a name that occurs twice has its id in
            brackets.
        by_size: By `SIZE_BINS` of the annotation's area in original pixels, as COCO's AP_small.
        by_ratio: By `RATIO_BINS`.
        anchors_per_image: Anchors of one image.
        foreground_iou: IoU from which on an anchor learns a box.
    """

    all: CoverageRow
    by_class: Mapping[str, CoverageRow]
    by_size: Mapping[str, CoverageRow]
    by_ratio: Mapping[str, CoverageRow]
    anchors_per_image: int
    foreground_iou: float


@dataclass(frozen=True, eq=False)
class LearnableBoxes:
    """The boxes of a data set that are no crowd regions, on the canvas.

    Attributes:
        boxes_xyxy: Network pixels, float32 [M, 4].
        class_indices: int64 [M], in [0, K).
        area: The annotations' areas in original square pixels, float32 [M].
        categories: The K classes.
        canvas: Network height and width.
    """

    boxes_xyxy: NDArray[np.float32]
    class_indices: NDArray[np.int64]
    area: NDArray[np.float32]
    categories: CategoryTable
    canvas: tuple[int, int]

    def __len__(self) -> int:
        return len(self.boxes_xyxy)

    @cached_property
    def sides_px(self) -> NDArray[np.float32]:
        """Square root of each box's area in network pixels, [M]."""
        width, height = (self.boxes_xyxy[:, 2:] - self.boxes_xyxy[:, :2]).T
        return np.asarray(np.sqrt(width * height))

    @cached_property
    def ratios(self) -> NDArray[np.float32]:
        """Height over width of each box, [M]; infinite for a box without width."""
        width, height = (self.boxes_xyxy[:, 2:] - self.boxes_xyxy[:, :2]).T
        ratios = np.full(len(self), np.inf, np.float32)
        np.divide(height, width, out=ratios, where=width > 0)
        return ratios


def select_boxes(dataset: CocoDataset, canvas: tuple[int, int]) -> LearnableBoxes:
    """The boxes that training learns, resized to a canvas (height, width) as training does it."""
    is_object = ~dataset.is_crowd
    return LearnableBoxes(
        boxes_xyxy=place_boxes(dataset, canvas)[is_object],
        class_indices=dataset.class_indices[is_object],
        area=dataset.area[is_object],
        categories=dataset.categories,
        canvas=canvas,
    )


def measure_coverage(
    boxes: LearnableBoxes, spec: AnchorSpec, *, foreground_iou: float = 0.5
) -> CoverageReport:
    """Compare every box with its best anchor.

    Args:
        boxes: What is to be learnt; may be empty.
        spec: The anchors.
        foreground_iou: IoU in (0, 1] from which on an anchor learns a box.
    """
    best_iou = best_iou_of(boxes.boxes_xyxy, spec, boxes.canvas)

    def row(is_member: Bool[np.ndarray, " M"]) -> CoverageRow:
        return _make_row(best_iou[is_member], foreground_iou)

    return CoverageReport(
        all=_make_row(best_iou, foreground_iou),
        by_class={
            name: row(boxes.class_indices == index)
            for index, name in enumerate(_distinct_names(boxes.categories))
        },
        by_size={
            name: row((boxes.area >= low) & (boxes.area < high))
            for name, (low, high) in SIZE_BINS.items()
        },
        by_ratio={
            name: row((boxes.ratios >= low) & (boxes.ratios < high))
            for name, (low, high) in RATIO_BINS.items()
        },
        anchors_per_image=sum(count_level_anchors(spec, *boxes.canvas)),
        foreground_iou=foreground_iou,
    )


def _make_row(best_iou: Float[np.ndarray, " M"], foreground_iou: float) -> CoverageRow:
    return CoverageRow(
        count=len(best_iou),
        num_iou_50=int(np.count_nonzero(best_iou >= 0.5)),
        num_iou_40=int(np.count_nonzero(best_iou >= 0.4)),
        mean_best_iou=float(best_iou.mean(dtype=np.float64)) if len(best_iou) else None,
        num_only_by_best_anchor=int(np.count_nonzero((best_iou > 0) & (best_iou < foreground_iou))),
        num_out_of_reach=int(np.count_nonzero(best_iou <= 0)),
    )


def _distinct_names(categories: CategoryTable) -> list[str]:
    counts = Counter(categories.names)
    return [
        category.name if counts[category.name] == 1 else f"{category.name} ({category.id})"
        for category in categories.categories
    ]


def describe_coverage(report: CoverageReport) -> str:
    """The whole in one line."""
    row = report.all
    if not row.count:
        return f"no boxes to reach; {report.anchors_per_image:,} anchors per image"
    text = (
        f"anchors reach {row.num_iou_50 / row.count:.1%} of {row.count:,} boxes at IoU 0.5 "
        f"({row.num_iou_40 / row.count:.1%} at 0.4), "
        f"{row.num_only_by_best_anchor:,} only through the best-anchor rule"
    ).replace("%", " %")
    if row.num_out_of_reach:
        text += f", {row.num_out_of_reach:,} not at all"
    return f"{text}; {report.anchors_per_image:,} anchors per image"


def poorly_covered(
    report: CoverageReport, max_share: float = 0.01
) -> tuple[tuple[str, int, int], ...]:
    """The classes that lose boxes, when the whole set loses too many.

    Args:
        report: What was measured.
        max_share: Share in [0, 1] of all boxes that may stay below IoU 0.5 without a word.

    Returns:
        Name, boxes, and boxes below IoU 0.5, of every class that has any such; most first. Empty
        when the whole set has no more than `max_share` of them.
    """
    if report.all.count - report.all.num_iou_50 <= max_share * report.all.count:
        return ()
    missed = [
        (name, row.count, row.count - row.num_iou_50)
        for name, row in report.by_class.items()
        if row.num_iou_50 < row.count
    ]
    return tuple(sorted(missed, key=lambda entry: -entry[2]))
