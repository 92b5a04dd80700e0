"""Precision and recall of one class under every threshold that makes a difference.

A threshold here is what inference applies (`score > threshold`), and lies between two scores, so
that it accepts exactly the detections of its point. P points of a curve.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from retinaray.evaluation.detection_matches import MatchedDetections

# Digits of a threshold, fewest first: what people read, as far as there is room between scores.
_DIGITS = (4, 6, 8)


@dataclass(frozen=True, eq=False)
class PrecisionRecallCurve:
    """What each possible threshold of one class accepts; thresholds fall, so recall rises.

    Attributes:
        category_id: The class.
        name: Its name.
        thresholds: float64 [P], each exactly representable as a choice; P = 0 without detections.
        num_hits: int64 [P], detections above the threshold that hit a box.
        num_false: int64 [P], that hit nothing. Those that hit an ignored region are in neither.
        num_ground_truth: Boxes that are not ignored.
        num_images: Images of the ground truth.
    """

    category_id: int | str
    name: str
    thresholds: Float[np.ndarray, " P"]
    num_hits: Int[np.ndarray, " P"]
    num_false: Int[np.ndarray, " P"]
    num_ground_truth: int
    num_images: int

    @property
    def precision(self) -> Float[np.ndarray, " P"]:
        """In [0, 1]; 0 where nothing but ignored regions was hit."""
        return np.asarray(self.num_hits / np.maximum(self.num_hits + self.num_false, 1))

    @property
    def recall(self) -> Float[np.ndarray, " P"]:
        """In [0, 1]; 0 without ground truth."""
        return np.asarray(self.num_hits / max(self.num_ground_truth, 1))

    @property
    def f1(self) -> Float[np.ndarray, " P"]:
        """Harmonic mean of precision and recall, in [0, 1]."""
        total = self.num_hits + self.num_false + self.num_ground_truth
        return np.asarray(2 * self.num_hits / np.maximum(total, 1))

    @property
    def false_positives_per_image(self) -> Float[np.ndarray, " P"]:
        """Of this class, over all images."""
        return np.asarray(self.num_false / max(self.num_images, 1))


def precision_recall_curves(
    matched: MatchedDetections, *, floor: float = 0.0, row: int = 0
) -> tuple[PrecisionRecallCurve, ...]:
    """The curve of each class.

    Args:
        matched: Suppressed once at the lowest threshold, without a cap that binds.
        floor: That lowest threshold; no threshold of a curve is below it.
        row: Which of the overlaps of `matched`; the first is 0.5 by default.

    Returns:
        K curves. For `class` and `none` suppression each holds whatever the thresholds of the
        other classes; for `agnostic` it holds while those are at the floor, see `ap_curves`.
    """
    truth = matched.truth
    ids = list(truth.class_index)
    return tuple(
        _draw_curve(matched, label, identity, floor=floor, row=row)
        for label, identity in enumerate(ids)
    )


def _draw_curve(
    matched: MatchedDetections, label: int, identity: int | str, *, floor: float, row: int
) -> PrecisionRecallCurve:
    columns = slice(int(matched.starts[label]), int(matched.starts[label + 1]))
    raw = matched.raw_scores[columns]
    order = np.argsort(-raw, kind="stable")
    scores = raw[order]
    is_hit = matched.is_hit[row, columns][order]
    is_counted = ~matched.is_ignored[row, columns][order]
    # Equal scores are accepted together or not at all.
    last = np.flatnonzero(np.append(scores[1:] < scores[:-1], True)[: len(scores)])
    next_lower = np.append(scores, np.float32(floor))[last + 1]
    return PrecisionRecallCurve(
        category_id=identity,
        name=matched.truth.names[label],
        thresholds=np.maximum(_choose_between(next_lower, scores[last]), floor),
        num_hits=np.cumsum(is_hit & is_counted)[last],
        num_false=np.cumsum(~is_hit & is_counted)[last],
        num_ground_truth=int(matched.truth.num_boxes[label]),
        num_images=len(matched.truth.image_index),
    )


def _choose_between(
    lower: Float[np.ndarray, " P"], upper: Float[np.ndarray, " P"]
) -> Float[np.ndarray, " P"]:
    """Thresholds in [lower, upper): the middle with few digits where there is room for it.

    Inference rounds thresholds to float32, so they are checked as float32.
    """
    middle = (lower.astype(np.float64) + upper.astype(np.float64)) / 2
    chosen = lower.astype(np.float64)
    is_open = np.ones(len(chosen), dtype=bool)
    for digits in _DIGITS:
        rounded = middle.round(digits)
        narrow = rounded.astype(np.float32)
        fits = is_open & (lower <= narrow) & (narrow < upper)
        chosen = np.where(fits, rounded, chosen)
        is_open &= ~fits
    return chosen
