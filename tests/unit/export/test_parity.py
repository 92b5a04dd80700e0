"""The comparison of two runtimes, on detections made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from retinaray.artifact import ModelCard
from retinaray.detector.postprocess import Detections
from retinaray.export.parity import ParityReport, compare_predictors, make_test_canvases

Rows = list[list[float]]

# x1, y1, x2, y2, score, label. The tiny card's thresholds are 0.3: clear means above 0.32.
ROWS: Rows = [
    [10, 10, 30, 30, 0.9, 0],
    [40, 10, 60, 40, 0.8, 1],
    [12, 12, 30, 30, 0.5, 2],
    [70, 10, 90, 40, 0.31, 0],
]


class FixedPredictor:
    """Finds the same in every image."""

    backend = "fixed"

    def __init__(self, card: ModelCard, rows: Rows) -> None:
        self.card, self.canvas = card, card.canvas
        table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
        self._found = Detections(table[:, :4], table[:, 4], table[:, 5].long())

    def predict(self, images: Tensor) -> list[Detections]:
        return [self._found] * len(images)


def change(index: int, values: dict[int, float]) -> Rows:
    """ROWS with some numbers of one row replaced."""
    rows = [list(row) for row in ROWS]
    for column, value in values.items():
        rows[index][column] = value
    return rows


@pytest.fixture
def compare(tiny_card: ModelCard) -> Callable[..., ParityReport]:
    def run(candidate: Rows, reference: Rows = ROWS, *, num_images: int = 1) -> ParityReport:
        canvases = [torch.zeros(3, 64, 96, dtype=torch.uint8)] * num_images
        return compare_predictors(
            FixedPredictor(tiny_card, reference), FixedPredictor(tiny_card, candidate), canvases
        )

    return run


def test_the_same_boxes_differ_by_nothing(compare: Callable[..., ParityReport]) -> None:
    assert compare(ROWS, num_images=2) == ParityReport(
        num_images=2,
        num_boxes=6,
        num_missing=0,
        num_extra=0,
        max_box_px=0.0,
        mean_box_px=0.0,
        max_score=0.0,
    )


def test_a_shifted_box_is_measured(compare: Callable[..., ParityReport]) -> None:
    report = compare(change(1, {0: 43, 2: 61}))
    assert (report.num_missing, report.num_extra) == (0, 0)
    assert report.max_box_px == 3.0
    assert report.mean_box_px == 1.0  # 0, 3 and 0


def test_a_shifted_score_is_measured(compare: Callable[..., ParityReport]) -> None:
    report = compare(change(1, {4: 0.7}))
    assert report.max_score == pytest.approx(0.1)
    assert report.max_box_px == 0.0


@pytest.mark.parametrize(
    ("candidate", "missing", "extra"),
    [
        (ROWS[1:], 1, 0),
        ([], 3, 0),
        (change(0, {5: 1}), 1, 1),  # another class
        (change(0, {0: 50, 2: 70}), 1, 1),  # another place
        ([*ROWS, [0, 40, 20, 60, 0.6, 1]], 0, 1),
        # Near the threshold a box may come or go.
        (ROWS[:3], 0, 0),
        ([*ROWS, [0, 40, 20, 60, 0.315, 1]], 0, 0),
        # A clear one may fall a little below the threshold's margin.
        (change(2, {4: 0.31}), 0, 0),
    ],
)
def test_boxes_that_only_one_side_has_are_counted(
    compare: Callable[..., ParityReport], candidate: Rows, missing: int, extra: int
) -> None:
    report = compare(candidate)
    assert (report.num_boxes, report.num_missing, report.num_extra) == (3, missing, extra)


def test_a_reference_that_finds_nothing_has_no_boxes(compare: Callable[..., ParityReport]) -> None:
    report = compare(ROWS, [])
    assert (report.num_boxes, report.num_missing, report.num_extra) == (0, 0, 3)
    assert (report.max_box_px, report.max_score) == (0.0, 0.0)


def test_no_canvases_give_an_empty_report(compare: Callable[..., ParityReport]) -> None:
    assert compare(ROWS, num_images=0) == ParityReport(0, 0, 0, 0, 0.0, 0.0, 0.0)


def test_each_class_has_its_own_threshold(tiny_card: ModelCard) -> None:
    card = replace(tiny_card, score_thresholds=(0.85, 0.85, 0.1))
    canvases = [torch.zeros(3, 64, 96, dtype=torch.uint8)]
    reference, candidate = FixedPredictor(card, ROWS), FixedPredictor(card, [])
    report = compare_predictors(reference, candidate, canvases)
    # Of class 0 the box of 0.9, of class 1 none (0.8), of class 2 the box of 0.5.
    assert report.num_boxes == 2


@pytest.mark.parametrize("canvas", [(64, 96), (100, 133), (8, 8), (1, 1)])
def test_make_test_canvases_are_pictures_of_that_size(canvas: tuple[int, int]) -> None:
    pictures = make_test_canvases(canvas, count=3)
    assert [(picture.dtype, tuple(picture.shape)) for picture in pictures] == [
        (torch.uint8, (3, *canvas))
    ] * 3
    for one, other in zip(pictures, make_test_canvases(canvas, count=3), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(pictures[0], make_test_canvases(canvas, seed=1)[0])
    if canvas == (64, 96):
        assert all(picture.float().std() > 30 for picture in pictures)
        assert not torch.equal(pictures[0], pictures[1])
