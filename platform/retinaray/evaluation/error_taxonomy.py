"""Why detections are wrong: TIDE's six kinds of error, and how much AP50 each of them costs.

Source: Bolya et al. 2020, "TIDE: A General Toolbox for Identifying Object Detection Errors"
(arXiv:2008.08115), section 2, and where the paper leaves a choice its package `tidecv`. Deviations:
detections in ignored regions are no errors; classes without ground truth are not in the mean, as in
COCO. D detections, M ground truths, K classes, P points of a curve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from retinaray.evaluation.confusion import LOWEST_IOU, OverlapTable, match_classes

_RECALLS: Float[np.ndarray, " 101"] = np.linspace(0.0, 1.0, 101)


class Verdict(IntEnum):
    """What a detection is. Overlaps are with ground truth that counts.

    IGNORED: In a crowd of its class, or hit another ignored box: neither right nor wrong.
    HIT: Right.
    CLASSIFICATION: Well placed (>= foreground) on something of another class.
    LOCALISATION: Best overlap with its own class is between background and foreground.
    BOTH: Only overlaps another class, and not well (between background and foreground).
    DUPLICATE: Well placed on something that a better detection has hit already.
    BACKGROUND: Overlaps nothing (<= background).
    """

    IGNORED = -1
    HIT = 0
    CLASSIFICATION = 1
    LOCALISATION = 2
    BOTH = 3
    DUPLICATE = 4
    BACKGROUND = 5


DETECTION_ERRORS = (
    Verdict.CLASSIFICATION,
    Verdict.LOCALISATION,
    Verdict.BOTH,
    Verdict.DUPLICATE,
    Verdict.BACKGROUND,
)
ERROR_KINDS = (*(verdict.name.lower() for verdict in DETECTION_ERRORS), "missed")
"""The six of the paper: classification, localisation, both, duplicate, background, missed."""
SPECIAL_KINDS = ("false_positive", "false_negative")
"""All wrong detections, all ground truths that are not hit."""


@dataclass(frozen=True, eq=False)
class ErrorLabels:
    """What each detection and each ground truth is, whatever the score threshold.

    A detection's verdict depends only on detections of its image and class that score higher,
    except that CLASSIFICATION and LOCALISATION say nothing about who else took the ground truth.

    Attributes:
        table: What was looked at.
        verdicts: int8 [D], `Verdict` values.
        truth_rows: int64 [D], the ground truth that was hit, was hit before (DUPLICATE), or was
            meant (CLASSIFICATION, LOCALISATION); else -1.
        is_best_claim: bool [D], the best CLASSIFICATION or LOCALISATION error about a ground truth
            that is not hit: the one that becomes a hit when it is corrected.
        is_found: bool [M], ground truths that count and are hit.
        is_missed: bool [M], that count, are not hit, and that no CLASSIFICATION or LOCALISATION
            error is about.
        foreground_iou: Overlap from which a detection hits.
        background_iou: Overlap up to which a detection is on background.
    """

    table: OverlapTable
    verdicts: Int[np.ndarray, " D"]
    truth_rows: Int[np.ndarray, " D"]
    is_best_claim: Bool[np.ndarray, " D"]
    is_found: Bool[np.ndarray, " M"]
    is_missed: Bool[np.ndarray, " M"]
    foreground_iou: float
    background_iou: float


@dataclass(frozen=True)
class ClassErrors:
    """Errors of one class.

    Attributes:
        category_id: The class.
        name: Its name.
        num_ground_truth: Boxes that are not ignored.
        num_detections: Detections that are not ignored, at any score.
        num_hits: Detections that hit.
        counts: Errors by the names in ERROR_KINDS: by the class of the detection; `missed` by the
            class of the ground truth.
        ap50: In [0, 1]; None without ground truth.
        delta_ap50: What correcting an error anywhere would add to this class, by ERROR_KINDS and
            SPECIAL_KINDS; None without ground truth, or when the class would be scored no more.
    """

    category_id: int | str
    name: str
    num_ground_truth: int
    num_detections: int
    num_hits: int
    counts: Mapping[str, int]
    ap50: float | None
    delta_ap50: Mapping[str, float | None]


@dataclass(frozen=True)
class ErrorReport:
    """How many errors of each kind there are and what they cost.

    Attributes:
        ap50: Mean over the classes with ground truth, in [0, 1]; None if there is none.
        counts: By the names in ERROR_KINDS, over all classes.
        delta_ap50: By the names in ERROR_KINDS: AP50 when only this kind is corrected, minus AP50;
            at least 0. They do not add up to 1 - AP50. Zeros if there is no ground truth.
        special_delta_ap50: By the names in SPECIAL_KINDS, likewise.
        classes: K entries.
        foreground_iou: Overlap from which a detection hits.
        background_iou: Overlap up to which a detection is on background.
    """

    ap50: float | None
    counts: Mapping[str, int]
    delta_ap50: Mapping[str, float]
    special_delta_ap50: Mapping[str, float]
    classes: tuple[ClassErrors, ...]
    foreground_iou: float
    background_iou: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def label_errors(
    table: OverlapTable, *, foreground_iou: float = 0.5, background_iou: float = LOWEST_IOU
) -> ErrorLabels:
    """Say of every detection what it is.

    Args:
        table: Detections and ground truth.
        foreground_iou: Overlap from which a detection hits.
        background_iou: Overlap up to which it is on background; at least LOWEST_IOU, at most
            foreground_iou.

    Raises:
        ValueError: If the overlaps are out of order.
    """
    if not LOWEST_IOU <= background_iou <= foreground_iou <= 1:
        raise ValueError(
            f"expected {LOWEST_IOU} <= background_iou <= foreground_iou <= 1, got "
            f"{background_iou} and {foreground_iou}"
        )
    matches = match_classes(table, iou=foreground_iou)
    is_counted = ~table.is_truth_ignored
    is_usable = is_counted[table.pair_truths]
    same_iou, same_truths = _find_best(table, is_usable & table.is_same_class)
    other_iou, other_truths = _find_best(table, is_usable & ~table.is_same_class)
    is_settled = matches.is_ignored | matches.is_hit
    # Both ends of the localisation error are included, and it goes first, as in `tidecv`.
    is_shifted = ~is_settled & (same_iou >= background_iou) & (same_iou <= foreground_iou)
    is_misnamed = ~is_settled & ~is_shifted & (other_iou >= foreground_iou)
    is_repeated = ~is_settled & ~is_shifted & ~is_misnamed & (same_iou >= foreground_iou)
    is_nowhere = np.maximum(same_iou, other_iou) <= background_iou
    verdicts = np.select(
        [matches.is_ignored, matches.is_hit, is_shifted, is_misnamed, is_repeated, is_nowhere],
        [
            Verdict.IGNORED,
            Verdict.HIT,
            Verdict.LOCALISATION,
            Verdict.CLASSIFICATION,
            Verdict.DUPLICATE,
            Verdict.BACKGROUND,
        ],
        Verdict.BOTH,
    )
    truth_rows = np.select(
        [matches.is_hit, is_shifted | is_repeated, is_misnamed],
        [matches.truth_rows, same_truths, other_truths],
        -1,
    )
    is_best_claim, is_claimed = _choose_claims(
        is_shifted | is_misnamed, truth_rows, matches.is_found
    )
    return ErrorLabels(
        table=table,
        verdicts=verdicts.astype(np.int8),
        truth_rows=truth_rows,
        is_best_claim=is_best_claim,
        is_found=matches.is_found,
        is_missed=is_counted & ~matches.is_found & ~is_claimed,
        foreground_iou=foreground_iou,
        background_iou=background_iou,
    )


def _find_best(
    table: OverlapTable, is_kept: Bool[np.ndarray, " P"]
) -> tuple[Float[np.ndarray, " D"], Int[np.ndarray, " D"]]:
    """Largest overlap of each detection among some pairs (0 = none), and with what (-1 = none)."""
    largest = np.zeros(len(table))
    truths = np.full(len(table), -1, dtype=np.int64)
    pairs = np.flatnonzero(is_kept)
    # Pairs are by detection and ground truth: the last assignment is the best, of equals the first.
    pairs = pairs[::-1][np.argsort(table.pair_ious[pairs[::-1]], kind="stable")]
    largest[table.pair_detections[pairs]] = table.pair_ious[pairs]
    truths[table.pair_detections[pairs]] = table.pair_truths[pairs]
    return largest, truths


def _choose_claims(
    is_claim: Bool[np.ndarray, " D"],
    truth_rows: Int[np.ndarray, " D"],
    is_found: Bool[np.ndarray, " M"],
) -> tuple[Bool[np.ndarray, " D"], Bool[np.ndarray, " M"]]:
    """The best claim about each ground truth that is not hit, and which are claimed."""
    rows = np.flatnonzero(is_claim)
    rows = rows[~is_found[truth_rows[rows]]]
    # Rows fall by score within an image, so the first about a ground truth is the best.
    claimed, first = np.unique(truth_rows[rows], return_index=True)
    is_best, is_claimed = np.zeros_like(is_claim), np.zeros_like(is_found)
    is_best[rows[first]] = True
    is_claimed[claimed] = True
    return is_best, is_claimed


def average_precisions(
    scores: Float[np.ndarray, " D"],
    class_indices: Int[np.ndarray, " D"],
    is_hit: Bool[np.ndarray, " D"],
    num_truths: Int[np.ndarray, " K"],
) -> Float[np.ndarray, " K"]:
    """COCO's average precision of each class, at the overlap that decided `is_hit`.

    Args:
        scores: Of detections that are not ignored; of equals the first counts as the better.
        class_indices: In [0, K).
        is_hit: Whether each hit.
        num_truths: Ground truths of each class.

    Returns:
        In [0, 1]; NaN for classes without ground truth.

    Source: pycocotools' COCOeval.accumulate: precision at 101 recalls.
    """
    order = np.lexsort((-scores, class_indices))
    starts = np.searchsorted(class_indices[order], np.arange(len(num_truths) + 1))
    averages = np.full(len(num_truths), np.nan)
    for label in np.flatnonzero(num_truths).tolist():
        rows = order[starts[label] : starts[label + 1]]
        num_hits = np.cumsum(is_hit[rows])
        precisions = num_hits / np.arange(1, len(rows) + 1)
        envelope = np.maximum.accumulate(precisions[::-1])[::-1]
        reached = np.searchsorted(num_hits / num_truths[label], _RECALLS, side="left")
        # One more for recalls that are never reached.
        averages[label] = np.append(envelope, 0.0)[reached].mean()
    return averages


def summarize_errors(labels: ErrorLabels) -> ErrorReport:
    """Count the errors, and what AP50 would gain without those of one kind.

    Correcting CLASSIFICATION or LOCALISATION makes a hit of the best such detection about a ground
    truth that is not hit, and removes the others; correcting the other kinds removes them;
    correcting `missed` takes the missed ground truths away. A class that is left without ground
    truth has AP50 0 if it has detections, and else is not in the mean; if none is left it is 1.
    """
    table = labels.table
    num_truths = _count_classes(labels, ~table.is_truth_ignored)
    kept = np.flatnonzero(labels.verdicts != Verdict.IGNORED)
    is_hit = labels.verdicts == Verdict.HIT
    averages = average_precisions(
        table.scores[kept], table.class_indices[kept], is_hit[kept], num_truths
    )
    corrected = {
        kind: _correct(labels, kind, num_truths) for kind in (*ERROR_KINDS, *SPECIAL_KINDS)
    }
    ap50 = _mean(averages) if num_truths.any() else None
    # Rounding may leave a gain of nothing below 0.
    gains = {
        kind: 0.0 if ap50 is None else max(_mean(values) - ap50, 0.0)
        for kind, values in corrected.items()
    }
    counts = {
        verdict.name.lower(): np.bincount(
            table.class_indices[labels.verdicts == verdict], minlength=len(num_truths)
        )
        for verdict in DETECTION_ERRORS
    }
    counts["missed"] = _count_classes(labels, labels.is_missed)
    return ErrorReport(
        ap50=ap50,
        counts={kind: int(values.sum()) for kind, values in counts.items()},
        delta_ap50={kind: gains[kind] for kind in ERROR_KINDS},
        special_delta_ap50={kind: gains[kind] for kind in SPECIAL_KINDS},
        classes=_describe_classes(labels, num_truths, counts, averages, corrected),
        foreground_iou=labels.foreground_iou,
        background_iou=labels.background_iou,
    )


def _describe_classes(
    labels: ErrorLabels,
    num_truths: Int[np.ndarray, " K"],
    counts: Mapping[str, Int[np.ndarray, " K"]],
    averages: Float[np.ndarray, " K"],
    corrected: Mapping[str, Float[np.ndarray, " K"]],
) -> tuple[ClassErrors, ...]:
    table = labels.table
    num_kept, num_hits = (
        np.bincount(table.class_indices[is_kept], minlength=len(num_truths))
        for is_kept in (labels.verdicts != Verdict.IGNORED, labels.verdicts == Verdict.HIT)
    )
    return tuple(
        ClassErrors(
            category_id=category.id,
            name=category.name,
            num_ground_truth=int(num_truths[label]),
            num_detections=int(num_kept[label]),
            num_hits=int(num_hits[label]),
            counts={kind: int(values[label]) for kind, values in counts.items()},
            ap50=_or_none(averages[label]),
            delta_ap50={
                kind: _or_none(values[label] - averages[label])
                for kind, values in corrected.items()
            },
        )
        for label, category in enumerate(table.dataset.categories.categories)
    )


def _count_classes(labels: ErrorLabels, is_kept: Bool[np.ndarray, " M"]) -> Int[np.ndarray, " K"]:
    dataset = labels.table.dataset
    return np.bincount(dataset.class_indices[is_kept], minlength=len(dataset.categories))


def _correct(
    labels: ErrorLabels, kind: str, num_truths: Int[np.ndarray, " K"]
) -> Float[np.ndarray, " K"]:
    """AP50 of each class without the errors of one kind; NaN as the summary says."""
    table, verdicts = labels.table, labels.verdicts
    classes, is_hit, is_kept = table.class_indices, verdicts == Verdict.HIT, verdicts >= Verdict.HIT
    num_left = num_truths
    if kind == "missed":
        num_left = num_truths - _count_classes(labels, labels.is_missed)
    elif kind == "false_negative":
        num_left = _count_classes(labels, labels.is_found)
    elif kind == "false_positive":
        is_kept = is_hit
    else:
        is_wrong = verdicts == Verdict[kind.upper()]
        is_corrected = is_wrong & labels.is_best_claim
        is_kept = is_kept & (~is_wrong | is_corrected)
        is_hit = is_hit | is_corrected
        classes = classes.copy()
        classes[is_corrected] = table.dataset.class_indices[labels.truth_rows[is_corrected]]
    averages = average_precisions(
        table.scores[is_kept], classes[is_kept], is_hit[is_kept], num_left
    )
    has_detections = np.bincount(classes[is_kept], minlength=len(num_left)) > 0
    averages[(num_truths > 0) & (num_left == 0) & has_detections] = 0.0
    return averages


def _mean(averages: Float[np.ndarray, " K"]) -> float:
    present = averages[~np.isnan(averages)]
    return float(present.mean()) if present.size else 1.0


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
