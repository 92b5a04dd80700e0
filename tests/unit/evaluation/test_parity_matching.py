"""Pairs of boxes made by hand: x1, y1, x2, y2, score, label; thresholds are 0.3."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchvision.ops import box_iou

from retinaray.detector.postprocess import Detections
from retinaray.evaluation.parity_matching import (
    ImageDifferences,
    match_detections,
    measure_iou,
)

Rows = list[list[float]]

ROWS: Rows = [
    [10, 10, 30, 30, 0.9, 0],
    [40, 10, 60, 40, 0.8, 1],
    [12, 12, 30, 30, 0.5, 2],
    [70, 10, 90, 40, 0.31, 0],
]


def find(rows: Rows) -> Detections:
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5].long())


def match(candidate: Rows, reference: Rows = ROWS, **settings: Any) -> ImageDifferences:
    thresholds = settings.pop("score_thresholds", [0.3, 0.3, 0.3])
    return match_detections(
        find(reference), find(candidate), score_thresholds=torch.tensor(thresholds), **settings
    )


def change(place: int, values: dict[int, float]) -> Rows:
    rows = [list(row) for row in ROWS]
    for column, value in values.items():
        rows[place][column] = value
    return rows


def summarize(found: ImageDifferences) -> tuple[Any, ...]:
    return found.num_reference, found.missing, found.extra, found.flips


def test_equal_boxes_are_pairs_without_difference() -> None:
    found = match(ROWS)
    assert summarize(found) == (4, (), (), ())
    assert sorted(found.pairs.tolist()) == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert found.box_px.tolist() == [0, 0, 0, 0]
    assert found.scores.tolist() == [0, 0, 0, 0]
    assert found.num_changed == 0


def test_differences_of_box_and_score_are_those_of_the_pair() -> None:
    candidate = change(1, {0: 43, 2: 61, 4: 0.7})
    found = match(candidate[::-1])  # the order of the lists does not matter
    (row,) = (row for row, (place, _) in enumerate(found.pairs.tolist()) if place == 1)
    assert found.pairs[row].tolist() == [1, 2]
    assert found.box_px[row] == 3.0
    assert found.scores[row] == pytest.approx(0.1)
    assert summarize(found) == (4, (), (), ())


@pytest.mark.parametrize(
    ("candidate", "missing", "extra", "flips"),
    [
        (ROWS[1:], (0,), (), ()),
        ([], (0, 1, 2), (), ()),
        (change(0, {0: 50, 2: 70}), (0,), (0,), ()),  # another place
        ([*ROWS, [0, 40, 20, 60, 0.6, 1]], (), (4,), ()),
        (change(1, {5: 0}), (), (), ((1, 1),)),  # another class
        # Class 2 lies in the same place and stays: it is no partner for the box that changed.
        (change(0, {5: 1}), (), (), ((0, 0),)),
        # Near its threshold of 0.3 a box may come or go ...
        (ROWS[:3], (), (), ()),
        ([*ROWS, [0, 40, 20, 60, 0.315, 1]], (), (), ()),
        # ... and a clear one has a partner down to half of the threshold,
        (change(2, {4: 0.16}), (), (), ()),
        # but not below.
        (change(2, {4: 0.14}), (2,), (), ()),
    ],
)
def test_boxes_of_one_side_only_are_named(
    candidate: Rows,
    missing: tuple[int, ...],
    extra: tuple[int, ...],
    flips: tuple[tuple[int, int], ...],
) -> None:
    found = match(candidate)
    assert summarize(found) == (4, missing, extra, flips)
    assert found.num_changed == len(missing) + len(extra) + len(flips)


def test_a_box_has_one_partner_only() -> None:
    # The second one overlaps the same box by 0.8, and stays alone.
    reference = [[0, 0, 20, 20, 0.9, 0], [0, 0, 20, 16, 0.8, 0]]
    found = match([reference[0]], reference)
    assert found.pairs.tolist() == [[0, 0]]
    assert found.missing == (1,)


def test_boxes_in_one_place_are_told_apart_by_their_scores() -> None:
    # Boxes that reach beyond the image are clipped to the same rectangle.
    place = [0, 0, 64, 64]
    reference = [[*place, 0.9, 0], [*place, 0.6, 0], [*place, 0.4, 0]]
    candidate = [[*place, 0.6, 0], [*place, 0.4, 0], [*place, 0.9, 0]]
    found = match(candidate, reference)
    assert sorted(found.pairs.tolist()) == [[0, 2], [1, 0], [2, 1]]
    assert found.scores.tolist() == [0, 0, 0]


def test_the_best_pair_is_taken_before_a_worse_one() -> None:
    # Both boxes of the reference overlap the candidate's first box most.
    reference = [[0, 0, 20, 20, 0.9, 0], [4, 0, 24, 20, 0.9, 0]]
    candidate = [[3, 0, 23, 20, 0.9, 0], [0, 0, 20, 14, 0.9, 0]]
    found = match(candidate, reference)
    # IoU 19/21 of second and first is the largest; 14/20 of first and second is left.
    assert found.pairs.tolist() == [[1, 0], [0, 1]]
    assert found.box_px.tolist() == [1, 6]


def test_each_class_has_its_own_threshold() -> None:
    found = match([], score_thresholds=[0.85, 0.85, 0.1])
    # Above them are the box of 0.9 of class 0 and the one of 0.5 of class 2.
    assert summarize(found) == (2, (0, 2), (), ())


def test_boxes_that_a_cut_list_cannot_hold_are_not_looked_for() -> None:
    # The candidate's list ends at 0.8: with a cap of two the box of 0.5 may have been cut off.
    assert summarize(match(ROWS[:2])) == (4, (2,), (), ())
    assert summarize(match(ROWS[:2], candidate_cap=3)) == (4, (2,), (), ())
    cut = match(ROWS[:2], candidate_cap=2)
    # Nor are pairs counted that lie so low: their true partner may have gone.
    assert summarize(cut) == (1, (), (), ())
    assert cut.pairs.tolist() == [[0, 0]]
    # The other way round, the reference's list ends.
    assert summarize(match(ROWS, ROWS[:2])) == (2, (), (2,), ())
    assert summarize(match(ROWS, ROWS[:2], reference_cap=2)) == (2, (), (), ())


@pytest.mark.parametrize("cap", [0, 1])
def test_an_empty_list_was_not_cut(cap: int) -> None:
    assert match([], candidate_cap=cap).missing == (0, 1, 2)


def test_nothing_on_both_sides_is_no_difference() -> None:
    found = match([], [])
    assert summarize(found) == (0, (), (), ())
    assert found.pairs.shape == (0, 2)
    assert (len(found.box_px), len(found.scores)) == (0, 0)


def test_shifts_weigh_a_hundredth_of_score_as_half_a_pixel() -> None:
    found = match(change(0, {4: 0.86}), ROWS[:1])
    assert found.shifts.tolist() == pytest.approx([2.0], rel=1e-4)
    assert match(change(0, {0: 13, 4: 0.86}), ROWS[:1]).shifts.tolist() == [3.0]


def test_the_margin_is_the_callers() -> None:
    assert match(ROWS[:3], margin=0.005).missing == (3,)
    assert match([], margin=0.3).missing == (0, 1)


def test_measure_iou_agrees_with_torchvision() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 40, 2, generator=generator) * 80
    sides = torch.rand(2, 40, 2, generator=generator) * 30
    one, other = torch.cat([corners, corners + sides], dim=2)
    torch.testing.assert_close(measure_iou(one, other), box_iou(one, other), rtol=1e-5, atol=1e-6)
    assert measure_iou(one, other[:0]).shape == (40, 0)
    assert measure_iou(torch.zeros(1, 4), torch.zeros(1, 4)).tolist() == [[0.0]]
