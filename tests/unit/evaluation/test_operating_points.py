"""Curves and points: by hand, and by applying the chosen thresholds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from retinaray.data.coco import CategoryTable
from retinaray.evaluation.candidates import CandidateSet, DetectionSetting, apply_setting
from retinaray.evaluation.detection_matches import (
    index_ground_truth,
    match_candidates,
    match_results,
)
from retinaray.evaluation.operating_points import (
    OperatingPoint,
    Rule,
    choose_operating_points,
    parse_rule,
    score_operating_points,
    thresholds_of,
)
from retinaray.evaluation.pr_curves import PrecisionRecallCurve, precision_recall_curves

Scene = tuple[dict[str, Any], CandidateSet]
UNCAPPED = 100_000


@pytest.fixture
def by_hand() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Two images, five boxes and a crowd of class a, one class without ground truth, one unseen."""
    starts = [0, 100, 200, 300, 400]
    truth = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": i, "name": name} for i, name in enumerate(("a", "b", "c"))],
        "annotations": [
            *({"image_id": 1, "category_id": 0, "bbox": [x, 0, 10, 10]} for x in starts),
            {"image_id": 1, "category_id": 0, "bbox": [0, 500, 90, 90], "iscrowd": 1},
            {"image_id": 2, "category_id": 2, "bbox": [0, 0, 10, 10]},
        ],
    }
    # Score and x; a place that is no start is a false positive, y = 500 lies in the crowd.
    rows = [(0.9, 0, 0), (0.8, 50, 0), (0.8, 100, 0), (0.7, 5, 500), (0.6, 200, 0), (0.5, 60, 0)]
    rows += [(0.4, 300, 0), (0.3, 70, 0)]
    results: list[dict[str, Any]] = [
        {"image_id": 1, "category_id": 0, "bbox": [x, y, 10, 10], "score": score}
        for score, x, y in rows
    ]
    results.append({"image_id": 2, "category_id": 1, "bbox": [0, 0, 5, 5], "score": 0.9})
    return truth, results


@pytest.fixture
def curves(by_hand: Any) -> tuple[PrecisionRecallCurve, ...]:
    truth, results = by_hand
    return precision_recall_curves(match_results(results, index_ground_truth(truth)), floor=0.1)


def test_precision_recall_curves_by_hand(curves: tuple[PrecisionRecallCurve, ...]) -> None:
    curve = curves[0]
    # Equal scores are one point; the hit in the crowd is one that adds nothing.
    assert curve.thresholds.tolist() == [0.85, 0.75, 0.65, 0.55, 0.45, 0.35, 0.2]
    assert curve.num_hits.tolist() == [1, 2, 2, 3, 3, 4, 4]
    assert curve.num_false.tolist() == [0, 1, 1, 1, 2, 2, 3]
    assert curve.precision.tolist() == pytest.approx([1, 2 / 3, 2 / 3, 3 / 4, 3 / 5, 4 / 6, 4 / 7])
    assert curve.recall.tolist() == pytest.approx([0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8])
    # 2 hits / (hits + false + 5).
    assert curve.f1.tolist() == pytest.approx([2 / 6, 4 / 8, 4 / 8, 6 / 9, 6 / 10, 8 / 11, 8 / 12])
    assert curve.false_positives_per_image.tolist() == [0, 0.5, 0.5, 0.5, 1, 1, 1.5]
    assert [item.num_ground_truth for item in curves] == [5, 0, 1]
    assert len(curves[2].thresholds) == 0


@pytest.mark.parametrize(
    ("rule", "threshold", "is_met", "note"),
    [
        ("f1", 0.35, True, ""),
        ("precision=0.7", 0.55, True, ""),
        ("precision=0.66", 0.35, True, ""),
        ("precision=1", 0.85, True, ""),
        ("recall=0.3", 0.75, True, ""),
        ("recall=0.6", 0.55, True, ""),
        ("recall=0.81", 0.35, False, "recall reaches 0.800, not 0.81"),
        ("fppi=0.5", 0.55, True, ""),
        ("fppi=0.1", 0.85, True, ""),
        ("fppi=9", 0.2, True, ""),
    ],
)
def test_choose_operating_points_takes_the_point_of_the_rule(
    curves: tuple[PrecisionRecallCurve, ...],
    rule: str,
    threshold: float,
    is_met: bool,
    note: str,
) -> None:
    point = choose_operating_points(curves, parse_rule(rule))[0]
    assert (point.threshold, point.is_met, point.note) == (threshold, is_met, note)


def test_choose_operating_points_takes_the_nearest_when_the_best_detection_is_false() -> None:
    curve = PrecisionRecallCurve(
        category_id=1,
        name="a",
        thresholds=np.array([0.8, 0.6, 0.4]),
        num_hits=np.array([0, 1, 2]),
        num_false=np.array([1, 1, 2]),
        num_ground_truth=4,
        num_images=2,
    )
    (point,) = choose_operating_points([curve], Rule("precision", 0.9))
    assert (point.threshold, point.precision, point.is_met) == (0.4, 0.5, False)
    assert point.note == "precision reaches 0.500, not 0.9"
    (point,) = choose_operating_points([curve], Rule("fppi", 0.1))
    assert (point.threshold, point.false_positives_per_image, point.is_met) == (0.8, 0.5, False)
    assert point.note == "0.5 false positives per image, more than 0.1"


def test_choose_operating_points_keeps_the_default_when_there_is_nothing_to_choose_by(
    curves: tuple[PrecisionRecallCurve, ...],
) -> None:
    _, without_truth, without_detections = choose_operating_points(curves, Rule())
    note = "no ground truth: nothing to choose or to measure by"
    assert without_truth == OperatingPoint(1, "b", 0.05, None, None, None, None, 0, False, note)
    assert (without_detections.threshold, without_detections.recall) == (0.05, 0)
    assert without_detections.note == "nothing of this class was found"


@pytest.mark.parametrize("nms_kind", ["class", "none"])
@pytest.mark.parametrize("rule", ["f1", "precision=0.6", "recall=0.5", "fppi=0.5"])
@pytest.mark.parametrize("score_digits", [1, 7])
def test_chosen_thresholds_give_the_chosen_points_when_they_are_applied(
    draw_scene: Callable[..., Scene],
    three_classes: CategoryTable,
    rule: str,
    nms_kind: Any,
    score_digits: int,
) -> None:
    truth, candidates = draw_scene(8, score_digits=score_digits)
    widest = DetectionSetting((0.01,) * 3, 0.5, nms_kind, UNCAPPED)
    indexed = index_ground_truth(truth)
    matched = match_candidates(candidates, widest, three_classes, indexed, ious=np.array([0.5]))
    points = choose_operating_points(precision_recall_curves(matched, floor=0.01), parse_rule(rule))
    thresholds = thresholds_of(points, three_classes)
    setting = DetectionSetting(thresholds, 0.5, nms_kind, UNCAPPED)
    results = apply_setting(candidates, setting, three_classes)
    assert score_operating_points(points, results, truth, rule=parse_rule(rule)) == points
    # Counted by hand: what the rule says is true of the results themselves.
    assert [point.name for point in points if point.num_ground_truth] == ["nut", "cell"]
    for point in points:
        found = [r for r in results if r["category_id"] == point.category_id]
        assert found
        assert all(float(str(r["score"])) > point.threshold - 1e-6 for r in found)


def test_thresholds_separate_scores_that_are_neighbours_in_float32() -> None:
    upper = np.float32(0.3)
    lower = np.nextafter(upper, np.float32(0))
    scores = [upper, lower, np.nextafter(lower, np.float32(0)), np.float32(0.1)]
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10]}],
    }
    results = [
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "score": float(score)}
        for score in scores
    ]
    matched = match_results(results, index_ground_truth(truth))
    (curve,) = precision_recall_curves(matched, floor=float(np.nextafter(scores[-1], 0)))
    accepted = [
        sum(score > np.float32(threshold) for score in scores) for threshold in curve.thresholds
    ]
    assert accepted == [1, 2, 3, 4]
    assert curve.thresholds.min() < 0.1


def test_score_operating_points_goes_by_category_id_and_checks_the_rule_again(
    by_hand: Any, curves: tuple[PrecisionRecallCurve, ...]
) -> None:
    truth, results = by_hand
    points = choose_operating_points(curves, Rule("precision", 0.7))
    other = {
        "images": truth["images"],
        "categories": list(reversed(truth["categories"])),
        "annotations": truth["annotations"][:2],
    }
    accepted = [found for found in results if found["category_id"] == 0 and found["score"] > 0.55]
    a, b, c = score_operating_points(points, accepted, other, rule=Rule("precision", 0.7))
    # Two boxes are left: hits 0.9 and 0.8; 0.8, 0.7 (no crowd now) and 0.6 are false.
    assert (a.category_id, a.threshold, a.precision, a.recall) == (0, 0.55, 0.4, 1.0)
    assert (a.is_met, a.note) == (False, "precision reaches 0.400, not 0.7")
    assert (b.recall, c.recall, c.num_ground_truth) == (None, None, 0)
    assert score_operating_points(points, accepted, other)[0].is_met


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("f1", Rule("f1", 0.0)),
        ("precision=0.9", Rule("precision", 0.9)),
        ("recall=1", Rule("recall", 1.0)),
        ("fppi=2.5", Rule("fppi", 2.5)),
    ],
)
def test_parse_rule_reads_what_it_names(text: str, rule: Rule) -> None:
    assert parse_rule(text) == rule


@pytest.mark.parametrize(
    "text", ["", "F1", "f1=1", "precision", "precision=", "recall=1.5", "fppi=0", "fppi=inf", "x=1"]
)
def test_parse_rule_refuses_other_texts(text: str) -> None:
    with pytest.raises(ValueError, match=f"expected f1, precision=P .*got '{text}'"):
        parse_rule(text)


def test_thresholds_of_follows_the_models_classes(three_classes: CategoryTable) -> None:
    points = [
        OperatingPoint(identity, "", value, None, None, None, None, 0, False)
        for identity, value in ((3, 0.3), (7, 0.7), (99, 0.9))
    ]
    assert thresholds_of(points, three_classes, default=0.2) == (0.7, 0.2, 0.3)


def test_choose_operating_points_says_when_no_threshold_hits_anything() -> None:
    curve = PrecisionRecallCurve(
        category_id=1,
        name="a",
        thresholds=np.array([0.5]),
        num_hits=np.array([0]),
        num_false=np.array([3]),
        num_ground_truth=4,
        num_images=2,
    )
    (point,) = choose_operating_points([curve], Rule())
    assert (point.f1, point.is_met) == (0.0, False)
    assert point.note == "no threshold hits a box of this class"
