"""What is found of small and of large objects: recall and AP50 by size.

Finer than COCO's small, medium and large, because what an anchor set cannot reach lies within
"small". The size of a box is the square root of its area, in original pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool

from retinaray.evaluation.confusion import OverlapTable, match_classes, spread_thresholds
from retinaray.evaluation.error_taxonomy import average_precisions

DEFAULT_EDGES_PX = (0.0, 8.0, 16.0, 32.0, 64.0, 96.0, 192.0)
"""COCO's edges, 32 and 96, are among them. The last bin has no end."""


@dataclass(frozen=True)
class SizeBin:
    """Ground truth with sizes in [lowest_px, highest_px).

    Attributes:
        lowest_px: Square root of the least area.
        highest_px: Not included; None = no end.
        num_ground_truth: Boxes that are not ignored.
        num_found: Those that are hit at any score.
        num_found_above: Those that are hit by a detection above the score thresholds.
        recall: num_found / num_ground_truth; None without ground truth.
        recall_above: num_found_above / num_ground_truth; None without ground truth.
        ap50: COCO's AP at overlap 0.5 with this area range, mean over the classes that have ground
            truth in it; None without.
    """

    lowest_px: float
    highest_px: float | None
    num_ground_truth: int
    num_found: int
    num_found_above: int
    recall: float | None
    recall_above: float | None
    ap50: float | None


@dataclass(frozen=True)
class SizeReport:
    """All sizes.

    Attributes:
        bins: By rising size.
        score_thresholds: K values, for `num_found_above`.
        iou: Overlap from which a detection hits.
    """

    bins: tuple[SizeBin, ...]
    score_thresholds: tuple[float, ...]
    iou: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def measure_by_size(
    table: OverlapTable,
    *,
    edges_px: Sequence[float] = DEFAULT_EDGES_PX,
    score_thresholds: float | Sequence[float] = 0.3,
    iou: float = 0.5,
) -> SizeReport:
    """Score each size for itself.

    Args:
        table: Detections and ground truth.
        edges_px: Lower ends of the bins, rising; sizes below the first are in no bin.
        score_thresholds: For `num_found_above`: one for all classes, or K.
        iou: Overlap from which a detection hits.

    Raises:
        ValueError: If the edges do not rise, or the number of thresholds is neither 1 nor K.
    """
    lowest = [float(edge) for edge in edges_px]
    if not lowest or lowest[0] < 0 or any(b <= a for a, b in pairwise(lowest)):
        raise ValueError(f"expected rising sizes from 0 px, got {tuple(edges_px)}")
    thresholds = spread_thresholds(score_thresholds, len(table.dataset.categories))
    is_above = table.scores > thresholds[table.class_indices]
    highest = [*lowest[1:], np.inf]
    return SizeReport(
        bins=tuple(
            _measure_bin(table, low, high, is_above, iou)
            for low, high in zip(lowest, highest, strict=True)
        ),
        score_thresholds=tuple(thresholds.tolist()),
        iou=iou,
    )


def _measure_bin(
    table: OverlapTable, low: float, high: float, is_above: Bool[np.ndarray, " D"], iou: float
) -> SizeBin:
    dataset = table.dataset
    matches = match_classes(table, iou=iou, area_range=(low**2, high**2))
    area = dataset.area.astype(np.float64)
    is_inside = ~table.is_truth_ignored & (area >= low**2) & (area < high**2)
    num_truths = np.bincount(dataset.class_indices[is_inside], minlength=len(dataset.categories))
    is_kept = ~matches.is_ignored
    averages = average_precisions(
        table.scores[is_kept], table.class_indices[is_kept], matches.is_hit[is_kept], num_truths
    )
    num_all = int(num_truths.sum())
    num_found = int(np.count_nonzero(matches.is_found))
    num_found_above = int(np.count_nonzero(matches.is_hit & is_above))
    return SizeBin(
        lowest_px=low,
        highest_px=high if np.isfinite(high) else None,
        num_ground_truth=num_all,
        num_found=num_found,
        num_found_above=num_found_above,
        recall=num_found / num_all if num_all else None,
        recall_above=num_found_above / num_all if num_all else None,
        ap50=float(averages[num_truths > 0].mean()) if num_all else None,
    )
