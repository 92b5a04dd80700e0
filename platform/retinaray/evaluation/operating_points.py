"""One score threshold per class, chosen by a rule on its precision-recall curve.

COCO's AP wants every detection down to the lowest score; whoever uses a detector wants one list
without rubbish. A threshold here is what inference applies (`score > threshold`), and lies between
two scores so that it accepts exactly the detections of the point that was chosen. P points of a
curve, K classes in the order of the ground truth's table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from retinaray.data.coco import CategoryTable
from retinaray.evaluation.detection_matches import index_ground_truth, match_results
from retinaray.evaluation.pr_curves import PrecisionRecallCurve

DEFAULT_THRESHOLD = 0.05
"""Of a class that has nothing to choose by."""


@dataclass(frozen=True)
class Rule:
    """What a threshold is chosen for.

    Attributes:
        kind: `f1`: the best F1. `precision`: the lowest threshold with at least this precision.
            `recall`: the highest threshold with at least this recall. `fppi`: the lowest threshold
            with at most so many false positives of the class per image.
        value: The number asked for; 0 for f1.
    """

    kind: Literal["f1", "precision", "recall", "fppi"] = "f1"
    value: float = 0.0


@dataclass(frozen=True)
class OperatingPoint:
    """A class's threshold and what it gives; numbers are None without ground truth.

    Attributes:
        category_id: The class.
        name: Its name.
        threshold: Detections of this class score above it.
        precision: Share of its detections that hit a box.
        recall: Share of its boxes that are hit.
        f1: Harmonic mean of the two.
        false_positives_per_image: Detections of the class that hit nothing, per image.
        num_ground_truth: Boxes that are not ignored.
        is_met: Whether the rule holds for these numbers.
        note: Why it does not; empty when it does.
    """

    category_id: int | str
    name: str
    threshold: float
    precision: float | None
    recall: float | None
    f1: float | None
    false_positives_per_image: float | None
    num_ground_truth: int
    is_met: bool
    note: str = ""


def parse_rule(text: str) -> Rule:
    """Read `f1`, `precision=0.9`, `recall=0.8` or `fppi=0.1`.

    Raises:
        ValueError: If it is none of these, or its number is out of range.
    """
    kind, _, number = text.partition("=")
    if text == "f1":
        return Rule()
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if kind in ("precision", "recall") and 0 < value <= 1:
        return Rule(kind, value)  # type: ignore[arg-type]
    if kind == "fppi" and 0 < value < float("inf"):
        return Rule("fppi", value)
    raise ValueError(
        f"rule: expected f1, precision=P or recall=R with a number in (0, 1], or fppi=X with X > 0,"
        f" got {text!r}"
    )


def choose_operating_points(
    curves: Sequence[PrecisionRecallCurve], rule: Rule, *, default: float = DEFAULT_THRESHOLD
) -> tuple[OperatingPoint, ...]:
    """The point of each curve that a rule asks for.

    Args:
        curves: One per class.
        rule: What for.
        default: Threshold of classes without ground truth or detections.

    Returns:
        One point per curve. Where the rule cannot be met, the nearest: the highest precision, the
        highest recall, or the fewest false positives; `is_met` is then False and `note` says so.
    """
    return tuple(_choose_point(curve, rule, default) for curve in curves)


def _choose_point(curve: PrecisionRecallCurve, rule: Rule, default: float) -> OperatingPoint:
    if not curve.num_ground_truth or not len(curve.thresholds):
        return _make_point(curve.category_id, curve, default, rule)
    index = _find_index(curve, rule)
    chosen = replace(
        curve,
        num_hits=curve.num_hits[index : index + 1],
        num_false=curve.num_false[index : index + 1],
    )
    return _make_point(curve.category_id, chosen, float(curve.thresholds[index]), rule)


def _find_index(curve: PrecisionRecallCurve, rule: Rule) -> int:
    if rule.kind == "f1":
        return int(np.argmax(curve.f1))
    if rule.kind == "precision":
        met = np.flatnonzero(curve.precision >= rule.value)
        return int(met[-1]) if len(met) else _last_maximum(curve.precision)
    if rule.kind == "recall":
        met = np.flatnonzero(curve.recall >= rule.value)
        return int(met[0]) if len(met) else int(np.argmax(curve.recall))
    met = np.flatnonzero(curve.false_positives_per_image <= rule.value)
    return int(met[-1]) if len(met) else 0


def _last_maximum(values: Float[np.ndarray, " P"]) -> int:
    is_best: Bool[np.ndarray, " P"] = values == values.max()
    return int(np.flatnonzero(is_best)[-1])


def _make_point(
    category_id: int | str, counts: PrecisionRecallCurve, threshold: float, rule: Rule | None
) -> OperatingPoint:
    """A point from a curve that is cut down to one threshold, or to none without detections."""
    if not counts.num_ground_truth:
        note = "no ground truth: nothing to choose or to measure by"
        return OperatingPoint(
            category_id, counts.name, threshold, None, None, None, None, 0, False, note
        )
    precision, recall, f1, false_positives = (
        float(values.sum())
        for values in (
            counts.precision,
            counts.recall,
            counts.f1,
            counts.false_positives_per_image,
        )
    )
    point = OperatingPoint(
        category_id=category_id,
        name=counts.name,
        threshold=threshold,
        precision=precision,
        recall=recall,
        f1=f1,
        false_positives_per_image=false_positives,
        num_ground_truth=counts.num_ground_truth,
        is_met=True,
    )
    if not (counts.num_hits + counts.num_false).any():
        note = "nothing of this class was found"
    else:
        note = _describe_breach(rule, precision, recall, false_positives)
    return replace(point, is_met=not note, note=note)


def _describe_breach(
    rule: Rule | None, precision: float, recall: float, false_positives: float
) -> str:
    """Why a rule does not hold; empty when it does, or when there is none."""
    if rule is None:
        return ""
    if rule.kind == "f1":
        return "" if precision > 0 else "no threshold hits a box of this class"
    if rule.kind == "fppi":
        if false_positives <= rule.value:
            return ""
        return f"{false_positives:.3g} false positives per image, more than {rule.value:g}"
    reached = precision if rule.kind == "precision" else recall
    if reached >= rule.value:
        return ""
    return f"{rule.kind} reaches {reached:.3f}, not {rule.value:g}"


def score_operating_points(
    points: Sequence[OperatingPoint],
    results: Sequence[Mapping[str, Any]],
    truth: Mapping[str, Any],
    *,
    rule: Rule | None = None,
    iou: float = 0.5,
) -> tuple[OperatingPoint, ...]:
    """What thresholds give on a set of images, counted in the detections themselves.

    This is also how the points of the set they were chosen on are reported: with agnostic
    suppression, or under a cap, the threshold of one class moves what another class keeps.

    Args:
        points: Thresholds by class.
        results: COCO results of inference, or of `apply_setting`, with these thresholds.
        truth: A COCO file's content.
        rule: What the thresholds were chosen for; none = `is_met` only says that there is something
            to measure.
        iou: Overlap from which a detection hits.

    Returns:
        The same thresholds with the numbers of this set, in the same order; None for classes that
        it has no ground truth of.

    Raises:
        ValueError: If a detection names an image or a class that the ground truth does not have.
    """
    matched = match_results(results, index_ground_truth(truth), ious=np.array([iou]))
    is_counted = ~matched.is_ignored[0]
    class_index = matched.truth.class_index
    measured = []
    for point in points:
        label = class_index.get(point.category_id)
        start, stop = (0, 0) if label is None else matched.starts[label : label + 2].tolist()
        hits = matched.is_hit[0, start:stop]
        counted = is_counted[start:stop]
        counts = PrecisionRecallCurve(
            category_id=point.category_id,
            name=point.name,
            thresholds=np.array([point.threshold]),
            num_hits=np.array([np.count_nonzero(hits & counted)]),
            num_false=np.array([np.count_nonzero(~hits & counted)]),
            num_ground_truth=0 if label is None else int(matched.truth.num_boxes[label]),
            num_images=len(matched.truth.image_index),
        )
        measured.append(_make_point(point.category_id, counts, point.threshold, rule))
    return tuple(measured)


def measure_thresholds(
    categories: CategoryTable,
    thresholds: Sequence[float],
    results: Sequence[Mapping[str, Any]],
    truth: Mapping[str, Any],
) -> tuple[OperatingPoint, ...]:
    """What a model's own thresholds give on a set of images; see `score_operating_points`.

    Args:
        categories: The model's classes.
        thresholds: One for each.
        results: COCO results of inference with them.
        truth: A COCO file's content.
    """
    points = [
        OperatingPoint(entry.id, entry.name, threshold, None, None, None, None, 0, False)
        for entry, threshold in zip(categories.categories, thresholds, strict=True)
    ]
    return score_operating_points(points, results, truth)


def thresholds_of(
    points: Sequence[OperatingPoint],
    categories: CategoryTable,
    *,
    default: float = DEFAULT_THRESHOLD,
) -> tuple[float, ...]:
    """Thresholds in the order of a model's classes; `default` for classes without a point."""
    by_id = {point.category_id: point.threshold for point in points}
    return tuple(by_id.get(identity, default) for identity in categories.ids)
