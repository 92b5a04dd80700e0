from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from retinaray.detector.postprocess import Detections
from retinaray.evaluation.parity_matching import ImageDifferences, match_detections
from retinaray.reporting.parity_pictures import (
    CANDIDATE_COLOUR,
    REFERENCE_COLOUR,
    Rectangle,
    draw_differences,
    find_label_spot,
)

GREY = np.full((60, 90, 3), 128, dtype=np.uint8)
# A picture of 90 pixels is drawn ten times as large.
SCALE = 10


def find(rows: list[list[float]]) -> Detections:
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 4], table[:, 5].long())


def compare(reference: Detections, candidate: Detections) -> ImageDifferences:
    return match_detections(reference, candidate, score_thresholds=torch.tensor([0.3, 0.3]))


def draw(reference: list[list[float]], candidate: list[list[float]], **changes: Any) -> np.ndarray:
    one, other = find(reference), find(candidate)
    settings = {"names": ["cat", "dog"], "score_thresholds": [0.3, 0.3]} | changes
    jpeg = draw_differences(GREY, one, other, compare(one, other), **settings)
    with Image.open(io.BytesIO(jpeg)) as image:
        assert image.format == "JPEG"
        return np.asarray(image.convert("RGB")).astype(int)


def is_colour(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Where a picture has a colour, but for what JPEG makes of it."""
    near: np.ndarray = np.abs(pixels - np.array(colour)).max(axis=-1) < 50
    return near


def count_along(side: np.ndarray, colour: tuple[int, int, int]) -> float:
    """Share of a line of pixels that has a colour."""
    return float(is_colour(side, colour).mean())


BOX = [20, 20, 60, 50, 0.8, 0]


def test_small_pictures_are_enlarged_and_empty_ones_stay_grey() -> None:
    pixels = draw([], [])
    assert pixels.shape == (600, 900, 3)
    assert np.abs(pixels - 128).max() < 8


def test_large_pictures_keep_their_size() -> None:
    large = np.zeros((20, 1000, 3), dtype=np.uint8)
    jpeg = draw_differences(
        large, find([]), find([]), compare(find([]), find([])), names=[], score_thresholds=[]
    )
    assert Image.open(io.BytesIO(jpeg)).size == (1000, 20)


def test_boxes_of_both_show_both_colours_along_each_side() -> None:
    pixels = draw([BOX], [BOX])
    for side in (
        pixels[201, 220:580],
        pixels[499, 220:580],
        pixels[220:480, 201],
        pixels[220:480, 599],
    ):
        # The candidate's dashes leave half of the reference's line.
        assert 0.3 < count_along(side, REFERENCE_COLOUR) < 0.7
        assert 0.3 < count_along(side, CANDIDATE_COLOUR) < 0.7


def test_small_boxes_show_both_colours_too() -> None:
    small = [20, 20, 23, 23, 0.8, 0]
    corner = draw([small], [small])[195:235, 195:235]
    assert is_colour(corner, REFERENCE_COLOUR).sum() > 50
    assert is_colour(corner, CANDIDATE_COLOUR).sum() > 50


def test_a_missing_box_is_thick_and_in_the_reference_colour_only() -> None:
    pixels = draw([BOX], [])
    assert count_along(pixels[203, 220:580], REFERENCE_COLOUR) > 0.95
    assert is_colour(pixels, CANDIDATE_COLOUR).sum() == 0
    both = draw([BOX], [BOX])
    column = slice(195, 215)
    thick = int(is_colour(pixels[column, 400], REFERENCE_COLOUR).sum())
    thin = int(
        (
            is_colour(both[column, 400], REFERENCE_COLOUR)
            | is_colour(both[column, 400], CANDIDATE_COLOUR)
        ).sum()
    )
    assert thick > thin


def test_an_extra_box_is_in_the_candidates_colour_only() -> None:
    pixels = draw([], [BOX])
    assert is_colour(pixels, CANDIDATE_COLOUR).sum() > 500
    assert is_colour(pixels, REFERENCE_COLOUR).sum() == 0


def test_changed_boxes_have_labels_above_them_and_equal_ones_have_none() -> None:
    above = (slice(174, 196), slice(206, 280))
    assert is_colour(draw([BOX], [])[above], REFERENCE_COLOUR).mean() > 0.3
    assert is_colour(draw([], [BOX])[above], CANDIDATE_COLOUR).mean() > 0.3
    assert np.abs(draw([BOX], [BOX])[above] - 128).max() < 40


def test_a_box_of_another_class_is_labelled_by_both() -> None:
    pixels = draw([BOX], [[*BOX[:5], 1]])
    around = pixels[150:560, 190:620]
    labels = [is_colour(around, colour).sum() for colour in (REFERENCE_COLOUR, CANDIDATE_COLOUR)]
    # A label is about 40 x 140 pixels, much of them letters; outlines alone are fewer.
    assert min(labels) > 3000


def test_a_box_that_moved_is_labelled_with_both_scores() -> None:
    dark = (60, 60, 60)
    moved = [23, 20, 63, 50, 0.7, 0]
    assert is_colour(draw([BOX], [moved]), dark).sum() > 2000
    # So is one whose score changed; a pixel and a hundredth are no reason for a label.
    assert is_colour(draw([BOX], [[*BOX[:4], 0.7, 0]]), dark).sum() > 2000
    assert is_colour(draw([BOX], [[21, 20, 61, 50, 0.79, 0]]), dark).sum() < 500


def test_boxes_below_their_threshold_are_not_drawn() -> None:
    low = [*BOX[:4], 0.29, 0]
    assert np.abs(draw([low], [low]) - 128).max() < 8
    assert np.abs(draw([low], [low], score_thresholds=[0.2, 0.3]) - 128).max() > 40


@pytest.mark.parametrize(
    ("box", "taken", "spot"),
    [
        ((50, 40, 90, 80), [], (50, 30, 70, 40)),  # above its left corner
        ((50, 5, 90, 80), [], (50, 0, 70, 10)),  # pushed into the picture
        ((190, 40, 199, 80), [], (179, 30, 199, 40)),
        ((50, 40, 90, 80), [(60, 35, 80, 45)], (50, 80, 70, 90)),  # below
        ((50, 40, 90, 80), [(40, 20, 70, 100)], (70, 30, 90, 40)),  # above its right corner
    ],
)
def test_find_label_spot_goes_beside_the_box(
    box: Rectangle, taken: list[Rectangle], spot: Rectangle
) -> None:
    found = find_label_spot(box, width=20, height=10, taken=taken, picture=(200, 100))
    assert found == spot


def test_find_label_spot_separates_labels_of_boxes_in_one_place() -> None:
    taken: list[Rectangle] = []
    for _ in range(8):
        taken.append(
            find_label_spot((50, 40, 90, 80), width=20, height=10, taken=taken, picture=(200, 100))
        )
    for place, one in enumerate(taken):
        for other in taken[:place]:
            apart_x = one[2] <= other[0] or other[2] <= one[0]
            assert apart_x or one[3] <= other[1] or other[3] <= one[1]


def test_find_label_spot_takes_the_first_place_when_none_is_free() -> None:
    everywhere = [(0.0, 0.0, 200.0, 100.0)]
    box = (50, 40, 90, 80)
    spot = find_label_spot(box, width=20, height=10, taken=everywhere, picture=(200, 100))
    assert spot == (50, 30, 70, 40)


def test_find_label_spot_begins_at_the_corner_when_the_label_is_larger_than_the_picture() -> None:
    spot = find_label_spot((5, 5, 8, 8), width=20, height=10, taken=[], picture=(12, 9))
    assert spot[:2] == (0, 0)
