"""COCO's average precision under many thresholds and caps, from one matching.

Exactly pycocotools' numbers (area range "all", 100 detections per class and image), each for a
cumulative sum instead of a whole evaluation. What holds, and what does not:

- A threshold that is the same for all classes, and a cap on detections per image, keep the best of
  each image's list. Suppression, too, is decided by higher scores alone. So candidates that were
  suppressed and matched once, at the lowest threshold and without a cap, contain every such
  setting as a subset, whatever the NMS kind.
- Thresholds that differ between classes do so only under `class` or `none` suppression and without
  a cap that binds. With `agnostic` suppression a box that its own class's threshold removes no
  longer suppresses another's, and under a cap it makes room: apply such settings anew with
  `apply_setting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from retinaray.evaluation.detection_matches import (
    COCO_IOUS,
    COCO_MAX_DETECTIONS,
    MatchedDetections,
)

_RECALLS: Float[np.ndarray, " 101"] = np.linspace(
    0.0, 1.00, int(np.round((1.00 - 0.0) / 0.01)) + 1, endpoint=True
)
_IOU_50, _IOU_75 = 0, 5


@dataclass(frozen=True)
class AveragePrecision:
    """COCO's AP of one setting; None where there is no ground truth.

    Attributes:
        AP: Mean over IoU 0.50:0.95 and classes.
        AP50: At IoU 0.50.
        AP75: At IoU 0.75.
        per_class: Mean over IoU of each class.
        num_detections: Detections under this setting, whether AP looks at them or not.
    """

    AP: float | None
    AP50: float | None
    AP75: float | None
    per_class: tuple[float | None, ...]
    num_detections: int


def average_precision(
    matched: MatchedDetections,
    *,
    score_thresholds: Sequence[float] | None = None,
    max_detections: int | None = None,
) -> AveragePrecision:
    """AP of the matched detections that a setting keeps.

    Args:
        matched: At COCO's ten overlaps.
        score_thresholds: K values in the order of the ground truth's classes; a detection must
            score above its class's. None = all are kept. When they differ between classes see the
            module's text.
        max_detections: Cap per image over all classes; none = no other cap than COCO's.

    Raises:
        ValueError: If the detections were matched at other overlaps, or there are not K thresholds.
    """
    num_classes = len(matched.truth.names)
    if matched.is_hit.shape[0] != len(COCO_IOUS):
        raise ValueError(
            f"expected detections matched at COCO's {len(COCO_IOUS)} overlaps, got "
            f"{matched.is_hit.shape[0]}"
        )
    if score_thresholds is not None and len(score_thresholds) != num_classes:
        raise ValueError(f"{len(score_thresholds)} score thresholds for {num_classes} classes")
    is_kept = select_kept(matched, score_thresholds, max_detections)
    is_looked_at = is_kept & (matched.class_ranks < COCO_MAX_DETECTIONS)
    present = [k for k in range(num_classes) if matched.truth.num_boxes[k]]
    curves = {k: _interpolate_class(matched, k, is_looked_at) for k in present}
    stacked = np.stack(list(curves.values())) if curves else np.zeros((0, len(COCO_IOUS), 101))
    return AveragePrecision(
        AP=_mean(stacked),
        AP50=_mean(stacked[:, _IOU_50]),
        AP75=_mean(stacked[:, _IOU_75]),
        per_class=tuple(_mean(curves[k]) if k in curves else None for k in range(num_classes)),
        num_detections=int(np.count_nonzero(is_kept)),
    )


def select_kept(
    matched: MatchedDetections,
    score_thresholds: Sequence[float] | None,
    max_detections: int | None,
) -> Bool[np.ndarray, " D"]:
    """Which detections pass thresholds (one per class) and a cap per image; see the module."""
    is_kept = np.ones(len(matched.scores), dtype=bool)
    if score_thresholds is not None:
        # Suppression compares in float32, so a threshold is rounded to it first.
        lowest = np.asarray(score_thresholds, dtype=np.float32)
        is_kept &= matched.raw_scores > np.repeat(lowest, np.diff(matched.starts))
    if max_detections is not None:
        is_kept &= matched.ranks < max_detections
    return is_kept


def _interpolate_class(
    matched: MatchedDetections, label: int, is_looked_at: Bool[np.ndarray, " D"]
) -> Float[np.ndarray, "10 101"]:
    """Precision at 101 recalls for each overlap, 0 where the recall is not reached.

    Source: pycocotools' COCOeval.accumulate.
    """
    columns = slice(int(matched.starts[label]), int(matched.starts[label + 1]))
    kept = np.flatnonzero(is_looked_at[columns]) + columns.start
    is_hit, is_ignored = matched.is_hit[:, kept], matched.is_ignored[:, kept]
    num_hits = np.cumsum(is_hit & ~is_ignored, axis=1).astype(float)
    num_false = np.cumsum(~is_hit & ~is_ignored, axis=1).astype(float)
    recalls = num_hits / matched.truth.num_boxes[label]
    precisions = num_hits / (num_false + num_hits + np.spacing(1))
    envelope = np.maximum.accumulate(precisions[:, ::-1], axis=1)[:, ::-1]
    # One more column for recalls that are never reached.
    envelope = np.concatenate([envelope, np.zeros((len(envelope), 1))], axis=1)
    return np.stack(
        [
            row[np.searchsorted(reached, _RECALLS, side="left")]
            for row, reached in zip(envelope, recalls, strict=True)
        ]
    )


def _mean(values: Float[np.ndarray, ...]) -> float | None:
    return float(values.mean()) if values.size else None
