"""Whether a score says how likely a detection is right: histograms, reliability, calibration error.

A model whose hits all score 0.3 ("everything scores 0.3") is found here: see
`ScoreCalibration.share_of_hits_below`. B bins of scores, D detections, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from retinaray.evaluation.error_taxonomy import ErrorLabels, Verdict

DEFAULT_NUM_BINS = 20
LOW_SCORES = (0.3, 0.5)
"""Scores below which hits are counted."""


@dataclass(frozen=True)
class ScoreCalibration:
    """Scores of the detections of one class, or of all; ignored detections are left out.

    Bin b holds scores in (edges[b], edges[b + 1]]; a score of 0 is in the first.

    Attributes:
        category_id: The class; None for all classes together.
        name: Its name; "all classes" for all.
        edges: B + 1 rising scores from 0 to 1.
        num_hits: B counts of detections that hit.
        num_false: B counts of detections that did not (false positives of any kind).
        mean_scores: B mean scores: the reliability curve's x; None for empty bins.
        precisions: B shares of hits: its y, equal to x if scores are probabilities; None for empty
            bins.
        expected_calibration_error: Mean over the detections of |precision - mean score| of their
            bin, in [0, 1]; None without detections. The detection ECE with the score alone.
        median_hit_score: None without hits.
        share_of_hits_below: Share of the hits that score at most 0.3 and 0.5, by "0.3" and "0.5";
            None without hits.
    """

    category_id: int | str | None
    name: str
    edges: tuple[float, ...]
    num_hits: tuple[int, ...]
    num_false: tuple[int, ...]
    mean_scores: tuple[float | None, ...]
    precisions: tuple[float | None, ...]
    expected_calibration_error: float | None
    median_hit_score: float | None
    share_of_hits_below: Mapping[str, float | None]


@dataclass(frozen=True)
class CalibrationReport:
    """Calibration over all classes and of each.

    Attributes:
        overall: All classes together.
        classes: K entries.
        detection_ece: The error with bins of score, place and size of the box, over all classes
            (Kueppers et al. 2020, D-ECE); None if no bin holds enough detections.
        floor: Detections that score at or below this were left out.
    """

    overall: ScoreCalibration
    classes: tuple[ScoreCalibration, ...]
    detection_ece: float | None
    floor: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def calibrate_scores(
    labels: ErrorLabels, *, floor: float = 0.0, num_bins: int = DEFAULT_NUM_BINS
) -> CalibrationReport:
    """Compare the scores of detections with how often they are right.

    Args:
        labels: What each detection is.
        floor: Only detections that score above are looked at; many detectors write thousands of
            boxes near 0 that outweigh all others in the error.
        num_bins: Bins of scores, all of one width.

    Raises:
        ValueError: If there is no bin, or a score is outside [0, 1].
    """
    if num_bins < 1:
        raise ValueError(f"expected at least one bin of scores, got {num_bins}")
    table = labels.table
    if len(table) and not 0 <= table.scores.min() <= table.scores.max() <= 1:
        raise ValueError(
            f"expected scores in [0, 1], got {table.scores.min():g} to {table.scores.max():g}: "
            "calibration is about probabilities; write scores after the sigmoid"
        )
    kept = np.flatnonzero((labels.verdicts != Verdict.IGNORED) & (table.scores > floor))
    scores, is_hit = table.scores[kept], labels.verdicts[kept] == Verdict.HIT
    class_indices = table.class_indices[kept]
    classes = []
    for label, category in enumerate(table.dataset.categories.categories):
        is_own = class_indices == label
        classes.append(
            _calibrate(category.id, category.name, scores[is_own], is_hit[is_own], num_bins)
        )
    return CalibrationReport(
        overall=_calibrate(None, "all classes", scores, is_hit, num_bins),
        classes=tuple(classes),
        detection_ece=measure_detection_ece(scores, is_hit, _place_boxes(labels, kept)),
        floor=floor,
    )


def _calibrate(
    category_id: int | str | None,
    name: str,
    scores: Float[np.ndarray, " D"],
    is_hit: Bool[np.ndarray, " D"],
    num_bins: int,
) -> ScoreCalibration:
    # Whole numbers divided, so that an edge is the very number that people write.
    edges = np.arange(num_bins + 1) / num_bins
    bins = np.maximum(np.searchsorted(edges, scores, side="left") - 1, 0)
    num_all = np.bincount(bins, minlength=num_bins)
    num_hits = np.bincount(bins[is_hit], minlength=num_bins)
    at_least_one = np.maximum(num_all, 1)
    means = np.bincount(bins, weights=scores, minlength=num_bins) / at_least_one
    precisions = num_hits / at_least_one
    error = float(np.abs(means - precisions) @ num_all) / len(scores) if len(scores) else None
    hit_scores = scores[is_hit]
    return ScoreCalibration(
        category_id=category_id,
        name=name,
        edges=tuple(edges.tolist()),
        num_hits=tuple(num_hits.tolist()),
        num_false=tuple((num_all - num_hits).tolist()),
        mean_scores=_or_none(means, num_all),
        precisions=_or_none(precisions, num_all),
        expected_calibration_error=error,
        median_hit_score=float(np.median(hit_scores)) if len(hit_scores) else None,
        share_of_hits_below={
            f"{score:g}": float(np.mean(hit_scores <= score)) if len(hit_scores) else None
            for score in LOW_SCORES
        },
    )


def _or_none(
    values: Float[np.ndarray, " B"], num_all: Int[np.ndarray, " B"]
) -> tuple[float | None, ...]:
    return tuple(
        value if count else None
        for value, count in zip(values.tolist(), num_all.tolist(), strict=True)
    )


def _place_boxes(labels: ErrorLabels, rows: Int[np.ndarray, " D"]) -> Float[np.ndarray, "D 4"]:
    """Centre and size of boxes as shares of their image's width and height."""
    images = labels.table.dataset.images
    sizes = np.array([(image.width, image.height) for image in images], dtype=np.float64)
    sizes = sizes.reshape(-1, 2)[labels.table.positions[rows]]
    boxes_xywh = labels.table.boxes_xywh[rows]
    centres = boxes_xywh[:, :2] + boxes_xywh[:, 2:] / 2
    return np.concatenate([centres / sizes, boxes_xywh[:, 2:] / sizes], axis=1)


def measure_detection_ece(
    scores: Float[np.ndarray, " D"],
    is_hit: Bool[np.ndarray, " D"],
    places: Float[np.ndarray, "D C"],
    *,
    num_bins: int = 5,
    least_count: int = 8,
) -> float | None:
    """Calibration error with bins of the score and of further properties of a detection.

    Args:
        scores: In [0, 1].
        is_hit: Whether each is right.
        places: Further properties, each in [0, 1]; what is outside counts as on the border.
        num_bins: Bins along each axis.
        least_count: Bins with fewer detections are left out, as in the paper.

    Returns:
        Mean over the detections of such bins of |precision - mean score| of their bin; None if
        there is no such bin.

    Source: Kueppers et al. 2020 (arXiv:2004.13546), equation 6, there with score, centre and size.
    """
    values = np.concatenate([scores[:, None], places], axis=1)
    edges = np.arange(num_bins + 1) / num_bins
    bins = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, num_bins - 1)
    _, cells = np.unique(bins @ num_bins ** np.arange(bins.shape[1]), return_inverse=True)
    counts = np.bincount(cells)
    gaps = np.abs(np.bincount(cells, weights=scores - is_hit))
    is_full = counts >= least_count
    return float(gaps[is_full].sum() / counts[is_full].sum()) if is_full.any() else None
