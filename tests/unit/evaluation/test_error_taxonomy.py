"""Boxes made by hand: overlaps follow from heights, 10 x 4 on 10 x 10 is 0.4.

AP50 looks at recalls 0, 0.01, ..., 1: a precision that holds up to recall 0.5 counts 51 of 101.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from retinaray.data.coco import load_coco
from retinaray.evaluation.coco_map import evaluate_detections
from retinaray.evaluation.confusion import OverlapTable, tabulate_overlaps
from retinaray.evaluation.error_taxonomy import (
    ERROR_KINDS,
    ErrorReport,
    Verdict,
    average_precisions,
    label_errors,
    summarize_errors,
)

MakeTable = Callable[..., OverlapTable]
DrawResults = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]

A = (0, 0, 0, 0, 10, 10)
B = (0, 0, 50, 50, 10, 10)
B_AS_1 = (0, 1, 50, 50, 10, 10)
HIT_A = (0, 0, 0.9, 0, 0, 10, 10)
HIT_B = (0, 0, 0.7, 50, 50, 10, 10)


def summarize(table: OverlapTable) -> ErrorReport:
    return summarize_errors(label_errors(table))


def list_counts(report: ErrorReport) -> list[int]:
    return [report.counts[kind] for kind in ERROR_KINDS]


def list_gains(report: ErrorReport) -> list[float]:
    kinds = {**report.delta_ap50, **report.special_delta_ap50}
    return [*kinds.values()]


# Truths, detections, AP50, counts (classification, localisation, both, duplicate, background,
# missed), gains in this order and then of all false positives and all false negatives.
CASES = {
    # B, of class 1, is found as class 0: AP50 is 1 for class 0 and 0 for class 1. All detections
    # of class 0 without it change nothing; without B, class 1 is not in the mean.
    "classification": (
        [A, B_AS_1],
        [HIT_A, (0, 0, 0.8, 50, 50, 10, 10)],
        0.5,
        [1, 0, 0, 0, 0, 0],
        [0.5, 0, 0, 0, 0, 0, 0, 0.5],
    ),
    # One of two is hit: precision 1 up to recall 0.5.
    "localisation": (
        [A, B],
        [HIT_A, (0, 0, 0.8, 50, 50, 10, 4)],
        51 / 101,
        [0, 1, 0, 0, 0, 0],
        [0, 50 / 101, 0, 0, 0, 0, 0, 50 / 101],
    ),
    # Class 1 hits B second, after 0.4 on A: precision 1/2 at any recall.
    "both": (
        [A, B_AS_1],
        [HIT_A, (0, 1, 0.8, 0, 0, 10, 4), (0, 1, 0.7, 50, 50, 10, 10)],
        0.75,
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0.25, 0, 0, 0, 0.25, 0],
    ),
    # Hit, false, hit: precision 1 up to recall 0.5, then 2/3.
    "duplicate": (
        [A, B],
        [HIT_A, (0, 0, 0.8, 0, 0, 10, 9), HIT_B],
        (51 + 50 * 2 / 3) / 101,
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 50 / 303, 0, 0, 50 / 303, 0],
    ),
    "background": (
        [A, B],
        [HIT_A, (0, 0, 0.8, 80, 0, 10, 10), HIT_B],
        (51 + 50 * 2 / 3) / 101,
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 50 / 303, 0, 50 / 303, 0],
    ),
    "missed": (
        [A, B],
        [HIT_A],
        51 / 101,
        [0, 0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0, 50 / 101, 0, 50 / 101],
    ),
    # Both claim B; only the better becomes a hit, the worse goes.
    "two localisations of one": (
        [A, B],
        [HIT_A, (0, 0, 0.8, 50, 50, 10, 3), (0, 0, 0.85, 50, 50, 10, 4)],
        51 / 101,
        [0, 2, 0, 0, 0, 0],
        [0, 50 / 101, 0, 0, 0, 0, 0, 50 / 101],
    ),
    # Class 1 has B, and the better claim to it is one of class 0: to move the worse one does not
    # help. AP50 is 1 and 0; of class 1, the only detection is false.
    "localisation behind a classification": (
        [A, B_AS_1],
        [HIT_A, (0, 0, 0.8, 50, 50, 10, 10), (0, 1, 0.7, 50, 50, 10, 4)],
        0.5,
        [1, 1, 0, 0, 0, 0],
        [0.5, 0, 0, 0, 0, 0, 0, 0],
    ),
    "nothing wrong": ([A, B], [HIT_A, HIT_B], 1.0, [0] * 6, [0] * 8),
    # Nothing is left to find.
    "nothing found": ([A], [], 0.0, [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1, 0, 1]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_summarize_errors_gives_counts_and_gains(make_table: MakeTable, case: Any) -> None:
    truths, found, ap50, counts, gains = case
    report = summarize(make_table(truths, found))
    assert report.ap50 == pytest.approx(ap50, abs=1e-12)
    assert list_counts(report) == counts
    assert list_gains(report) == pytest.approx(gains, abs=1e-12)


@pytest.mark.parametrize(
    ("truths", "found", "verdict", "truth_row"),
    [
        ([A], (0, 0, 0.5, 0, 0, 10, 5), Verdict.HIT, 0),
        ([A], (0, 0, 0.5, 0, 0, 10, 1), Verdict.LOCALISATION, 0),  # 0.1 exactly
        ([A], (0, 0, 0.5, 0, 0, 10, 0.9), Verdict.BACKGROUND, -1),
        ([A], (0, 1, 0.5, 0, 0, 10, 5), Verdict.CLASSIFICATION, 0),  # 0.5 exactly
        ([A], (0, 1, 0.5, 0, 0, 10, 4), Verdict.BOTH, -1),
        ([A], (0, 1, 0.5, 0, 0, 10, 1), Verdict.BACKGROUND, -1),  # 0.1 exactly
        # 0.8 on A of class 0, but also 80 / 320 on its own class: that is looked at first.
        ([A, (0, 1, 0, 0, 32, 10)], (0, 1, 0.5, 0, 0, 8, 10), Verdict.LOCALISATION, 1),
        ([(0, 0, 0, 0, 50, 50, 1)], (0, 0, 0.5, 5, 5, 10, 10), Verdict.IGNORED, -1),
        ([(0, 1, 0, 0, 50, 50, 1)], (0, 0, 0.5, 5, 5, 10, 10), Verdict.BACKGROUND, -1),
        # Without area nothing is overlapped.
        ([(0, 0, 0, 0, 50, 50, 1)], (0, 0, 0.5, 5, 5, 0, 10), Verdict.BACKGROUND, -1),
    ],
)
def test_label_errors_gives_the_verdict_and_what_it_is_about(
    make_table: MakeTable, truths: Any, found: Any, verdict: Verdict, truth_row: int
) -> None:
    labels = label_errors(make_table(truths, [found]))
    assert [Verdict(value) for value in labels.verdicts] == [verdict]
    assert labels.truth_rows.tolist() == [truth_row]


def test_label_errors_says_which_truth_is_found_claimed_or_missed(make_table: MakeTable) -> None:
    claimed, missed = (0, 0, 0, 50, 10, 10), (0, 0, 0, 80, 10, 10)
    crowd = (0, 0, 0, 120, 50, 50, 1)
    found = [
        HIT_A,
        (0, 0, 0.8, 0, 50, 10, 3),
        (0, 0, 0.7, 0, 50, 10, 4),
        (0, 0, 0.6, 0, 0, 10, 4),  # about A, which is hit: claims nothing
        (0, 0, 0.5, 5, 125, 10, 10),
    ]
    labels = label_errors(make_table([A, claimed, missed, crowd], found))
    assert labels.verdicts.tolist() == [0, 2, 2, 2, -1]
    assert labels.truth_rows.tolist() == [0, 1, 1, 0, -1]
    assert labels.is_best_claim.tolist() == [False, True, False, False, False]
    assert labels.is_found.tolist() == [True, False, False, False]
    assert labels.is_missed.tolist() == [False, False, True, False]


def test_label_errors_calls_half_an_overlap_with_a_hit_truth_a_localisation(
    make_table: MakeTable,
) -> None:
    # Both ends are included, as in the paper; just above it would be a duplicate.
    found = [HIT_A, (0, 0, 0.8, 0, 0, 10, 5.1), (0, 0, 0.7, 0, 0, 10, 5)]
    labels = label_errors(make_table([A], found))
    assert [Verdict(value).name for value in labels.verdicts] == [
        "HIT",
        "DUPLICATE",
        "LOCALISATION",
    ]


def test_label_errors_takes_the_first_truth_when_overlaps_are_equal(make_table: MakeTable) -> None:
    labels = label_errors(make_table([A, A], [(0, 1, 0.8, 0, 0, 10, 10)]))
    assert labels.truth_rows.tolist() == [0]
    assert labels.is_missed.tolist() == [False, True]


@pytest.mark.parametrize(("foreground", "background"), [(0.5, 0.05), (0.4, 0.5), (1.5, 0.1)])
def test_label_errors_refuses_overlaps_out_of_order(
    make_table: MakeTable, foreground: float, background: float
) -> None:
    with pytest.raises(ValueError, match=f"got {background} and {foreground}"):
        label_errors(make_table([A], []), foreground_iou=foreground, background_iou=background)


def test_summarize_errors_counts_by_class(make_table: MakeTable) -> None:
    crowd = (0, 1, 0, 100, 50, 50, 1)
    found = [HIT_A, (0, 0, 0.8, 50, 50, 10, 10), (0, 1, 0.7, 5, 105, 10, 10)]
    report = summarize(make_table([A, B_AS_1, crowd], found, num_classes=3))
    first, second, third = report.classes
    assert (first.category_id, first.name) == (10, "class 0")
    assert (first.num_ground_truth, first.num_detections, first.num_hits) == (1, 2, 1)
    # The crowd's detection is none.
    assert (second.num_ground_truth, second.num_detections, second.num_hits) == (1, 0, 0)
    assert first.counts == {**dict.fromkeys(ERROR_KINDS, 0), "classification": 1}
    assert set(second.counts.values()) == {0}
    assert (first.ap50, second.ap50, third.ap50) == (1, 0, None)
    assert (first.delta_ap50["classification"], second.delta_ap50["classification"]) == (0, 1)
    # Without B class 1 has nothing that could be scored.
    assert second.delta_ap50["false_negative"] is None
    assert third.delta_ap50["background"] is None


def test_summarize_errors_agrees_with_the_package_of_the_paper(draw_results: DrawResults) -> None:
    content, results = draw_results(3, crowd_share=0, is_tied=False, num_images=20)
    results = [found for found in results if found["score"] > 0.6]
    report = summarize(tabulate_overlaps(results, load_coco(json.dumps(content).encode())))
    # By tidecv 1.0.1 (which is not installed with this package), in per cent.
    assert report.ap50 == pytest.approx(0.29270835474545336, abs=1e-12)
    assert list_counts(report) == [17, 40, 21, 22, 56, 23]
    gains = [
        *(3.2150559721220517, 17.331508225251746, 1.991397260257319),
        *(1.361497348863324, 6.946103682274348, 7.158039191860979),
        *(31.78527013601572, 18.068528287636255),
    ]
    assert [100 * gain for gain in list_gains(report)] == pytest.approx(gains, abs=1e-10)


def test_summarize_errors_has_no_ap_when_there_is_no_truth(make_table: MakeTable) -> None:
    report = summarize(make_table([], [HIT_A]))
    assert report.ap50 is None
    assert list_counts(report) == [0, 0, 0, 0, 1, 0]
    assert list_gains(report) == [0] * 8


def test_to_dict_is_plain_json(make_table: MakeTable) -> None:
    report = summarize(make_table([A, B], [HIT_A]))
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["counts"]["missed"] == 1
    assert plain["classes"][0]["counts"]["missed"] == 1
    assert plain["foreground_iou"] == 0.5


@pytest.mark.parametrize("seed", range(4))
def test_average_precisions_agrees_with_pycocotools(draw_results: DrawResults, seed: int) -> None:
    content, results = draw_results(seed)
    report = summarize(tabulate_overlaps(results, load_coco(json.dumps(content).encode())))
    expected = evaluate_detections(content, results)
    assert report.ap50 == pytest.approx(expected.summary["AP50"], abs=1e-12)
    for found, known in zip(report.classes, expected.classes, strict=True):
        assert found.ap50 == pytest.approx(known.AP50, abs=1e-12)


def test_average_precisions_is_nan_when_a_class_has_no_truth() -> None:
    averages = average_precisions(
        np.array([0.9, 0.8]), np.array([1, 1]), np.array([True, False]), np.array([0, 2, 1])
    )
    assert np.isnan(averages[0])
    assert averages[1:] == pytest.approx([51 / 101, 0])
