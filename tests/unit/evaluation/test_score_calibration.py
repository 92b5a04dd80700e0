from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from retinaray.data.coco import load_coco
from retinaray.evaluation.confusion import OverlapTable, tabulate_overlaps
from retinaray.evaluation.error_taxonomy import label_errors
from retinaray.evaluation.score_calibration import (
    CalibrationReport,
    calibrate_scores,
    measure_detection_ece,
)

MakeTable = Callable[..., OverlapTable]
DrawResults = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]

TRUTHS = [(0, 0, 0, 0, 10, 10), (0, 0, 50, 50, 10, 10), (0, 0, 0, 100, 60, 60, 1)]
FOUND = [
    (0, 0, 0.9, 0, 0, 10, 10),
    (0, 0, 0.5, 50, 50, 10, 10),
    (0, 0, 0.6, 80, 0, 10, 10),  # nothing there
    (0, 0, 0.2, 0, 0, 10, 9),  # a duplicate
    (0, 0, 0.7, 10, 110, 10, 10),  # in the crowd: left out
]


def calibrate(table: OverlapTable, **settings: Any) -> CalibrationReport:
    return calibrate_scores(label_errors(table), **settings)


def test_calibrate_scores_gives_bins_curve_and_error(make_table: MakeTable) -> None:
    report = calibrate(make_table(TRUTHS, FOUND), num_bins=2)
    first, second = report.classes
    assert first.edges == (0, 0.5, 1)
    # 0.5 is in the first bin, with 0.2.
    assert (first.num_hits, first.num_false) == ((1, 1), (1, 1))
    assert first.mean_scores == pytest.approx((0.35, 0.75))
    assert first.precisions == (0.5, 0.5)
    # (2 x |0.5 - 0.35| + 2 x |0.5 - 0.75|) / 4
    assert first.expected_calibration_error == pytest.approx(0.2)
    assert first.median_hit_score == pytest.approx(0.7)
    assert first.share_of_hits_below == {"0.3": 0, "0.5": 0.5}
    assert (report.overall.category_id, report.overall.name) == (None, "all classes")
    assert report.overall.num_hits == first.num_hits
    assert report.overall.expected_calibration_error == first.expected_calibration_error
    # Five detections in different places: no bin has eight.
    assert report.detection_ece is None
    assert (second.num_hits, second.num_false) == ((0, 0), (0, 0))
    assert second.mean_scores == second.precisions == (None, None)
    assert second.expected_calibration_error is second.median_hit_score is None
    assert second.share_of_hits_below == {"0.3": None, "0.5": None}


def test_calibrate_scores_leaves_out_what_scores_at_most_the_floor(make_table: MakeTable) -> None:
    report = calibrate(make_table(TRUTHS, FOUND), num_bins=1, floor=0.5)
    assert report.floor == 0.5
    assert (report.overall.num_hits, report.overall.num_false) == ((1,), (1,))
    # 0.9 and 0.6
    assert report.overall.expected_calibration_error == pytest.approx(0.25)


def test_calibrate_scores_shows_that_everything_scores_low(make_table: MakeTable) -> None:
    truths = [(0, 0, 0, 20 * i, 10, 10) for i in range(8)]
    found = [(0, 0, 0.26 + 0.01 * i, *truth[2:]) for i, truth in enumerate(truths)]
    report = calibrate(make_table(truths, found))
    # 0.26 to 0.30 are five of eight; all are right, and score 0.295 in the mean.
    assert report.overall.share_of_hits_below == {"0.3": 0.625, "0.5": 1}
    assert report.overall.expected_calibration_error == pytest.approx(0.705)
    assert len(report.overall.edges) == 21


@pytest.mark.parametrize(("score", "place"), [(0.0, 0), (0.55, 10), (0.5501, 11), (1.0, 19)])
def test_calibrate_scores_puts_edges_into_the_lower_bin(
    make_table: MakeTable, score: float, place: int
) -> None:
    labels = label_errors(make_table([], [(0, 0, score, 0, 0, 1, 1)]))
    report = calibrate_scores(labels, floor=-1)
    assert np.flatnonzero(report.overall.num_false).tolist() == [place]


def test_calibrate_scores_refuses_what_is_no_probability(make_table: MakeTable) -> None:
    with pytest.raises(ValueError, match=r"expected scores in \[0, 1\], got 0.5 to 2: "):
        calibrate(make_table([], [(0, 0, 2, 0, 0, 1, 1), (0, 0, 0.5, 0, 0, 1, 1)]))
    with pytest.raises(ValueError, match="at least one bin of scores, got 0"):
        calibrate(make_table([], []), num_bins=0)


def test_calibrate_scores_gives_none_when_there_is_no_detection(make_table: MakeTable) -> None:
    report = calibrate(make_table(TRUTHS, []))
    assert report.overall.expected_calibration_error is report.detection_ece is None
    assert sum(report.overall.num_false) == 0


@pytest.mark.parametrize("seed", range(2))
def test_calibrate_scores_agrees_with_a_slow_count(draw_results: DrawResults, seed: int) -> None:
    content, results = draw_results(seed)
    table = tabulate_overlaps(results, load_coco(json.dumps(content).encode()))
    labels = label_errors(table)
    report = calibrate_scores(labels, num_bins=4)
    bins: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    cells: dict[tuple[int, ...], list[tuple[float, bool]]] = defaultdict(list)
    for score, verdict, (x, y, w, h) in zip(
        table.scores, labels.verdicts, table.boxes_xywh, strict=True
    ):
        if verdict >= 0:
            place = next(b for b in range(4) if score <= (b + 1) / 4)
            bins[place].append((score, verdict == 0))
            shares = (score, (x + w / 2) / 200, (y + h / 2) / 200, w / 200, h / 200)
            cell = tuple(next(b for b in range(5) if s <= (b + 1) / 5) for s in shares)
            cells[cell].append((score, verdict == 0))

    def measure(groups: list[list[tuple[float, bool]]]) -> float:
        gaps = [abs(sum(hit for _, hit in group) - sum(s for s, _ in group)) for group in groups]
        return sum(gaps) / sum(map(len, groups))

    assert report.overall.expected_calibration_error == pytest.approx(measure([*bins.values()]))
    full = [group for group in cells.values() if len(group) >= 8]
    assert 2 < len(full) < len(cells)
    assert report.detection_ece == pytest.approx(measure(full))


def test_calibrate_scores_takes_places_as_shares_of_width_and_height(make_table: MakeTable) -> None:
    # Centres at 10 and at 30 of 100: two of five bins of the width, though one of the height's.
    truths = [(0, 0, 9, 2 * i, 2, 2) for i in range(8)]
    found = [(0, 0, 0.8, x, 2 * i, 2, 2) for i in range(8) for x in (9, 29)]
    report = calibrate(make_table(truths, found))
    assert report.overall.expected_calibration_error == pytest.approx(0.3)
    # Those on the left are right, |1 - 0.8|; the others are not, |0 - 0.8|.
    assert report.detection_ece == pytest.approx(0.5)


def test_measure_detection_ece_sees_places_where_scores_are_wrong() -> None:
    scores = np.full(20, 0.8)
    is_hit = np.arange(20) < 10
    places = np.where(is_hit, 0.1, 0.9)[:, None]
    # By score alone |0.5 - 0.8|; with the place 1 - 0.8 for one half and 0.8 for the other.
    assert measure_detection_ece(scores, is_hit, places[:, :0]) == pytest.approx(0.3)
    assert measure_detection_ece(scores, is_hit, places) == pytest.approx(0.5)


def test_measure_detection_ece_leaves_out_bins_with_few_detections() -> None:
    scores = np.array([0.8] * 8 + [0.3] * 7)
    is_hit = np.array([True] * 8 + [False] * 7)
    nowhere = np.zeros((15, 0))
    assert measure_detection_ece(scores, is_hit, nowhere) == pytest.approx(0.2)
    # (8 x 0.2 + 7 x 0.3) / 15
    every = measure_detection_ece(scores, is_hit, nowhere, least_count=7)
    assert every == pytest.approx(3.7 / 15)
    assert measure_detection_ece(scores, is_hit, nowhere, least_count=9) is None


def test_to_dict_is_plain_json(make_table: MakeTable) -> None:
    report = calibrate(make_table(TRUTHS, FOUND), num_bins=2)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["overall"]["num_hits"] == [1, 1]
    assert plain["classes"][0]["share_of_hits_below"]["0.5"] == 0.5
