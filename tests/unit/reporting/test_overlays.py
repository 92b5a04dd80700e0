"""Detections drawn on pictures, legibly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from retinaray.reporting.overlays import choose_text_colour, draw_detections

NAMES = {7: "car", 8: "bus"}
RED, GREEN = (230, 25, 75), (60, 180, 75)


def found(category_id: int, bbox: list[float], score: float) -> dict[str, Any]:
    return {"category_id": category_id, "bbox": bbox, "score": score}


def is_colour(drawn: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (drawn == colour).all(-1)


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 100, dtype=np.uint8)


def test_nothing_found_leaves_the_picture_as_it_is() -> None:
    np.testing.assert_array_equal(draw_detections(grey(700, 900), [], [], names=NAMES), 100)


def test_boxes_lie_where_they_were_found_in_the_colour_of_their_class() -> None:
    drawn = draw_detections(grey(640, 640), [found(8, [100, 200, 300, 250], 0.5)], [], names=NAMES)
    rows, columns = np.nonzero(is_colour(drawn, GREEN))
    assert (rows.min(), columns.min()) == (200, 100)
    assert rows.max() == pytest.approx(450, abs=1)
    assert columns.max() == pytest.approx(400, abs=1)
    # Right of the label and below it: the inside is not painted over.
    assert (drawn[300:400, 150:350] == 100).all()


@pytest.mark.parametrize(("side", "expected"), [(64, 640), (640, 640), (1000, 1000)])
def test_small_pictures_are_enlarged_and_boxes_with_them(side: int, expected: int) -> None:
    box = [side / 4, side / 4, side / 2, side / 2]
    drawn = draw_detections(grey(side, side), [found(7, box, 0.5)], [], names=NAMES)
    assert drawn.shape == (expected, expected, 3)
    rows, _ = np.nonzero(is_colour(drawn, RED))
    assert rows.min() == expected // 4
    assert rows.max() == pytest.approx(3 * expected // 4, abs=1)


@pytest.mark.parametrize(("side", "line"), [(640, 2), (1600, 5), (3200, 10)])
def test_lines_grow_with_the_picture(side: int, line: int) -> None:
    box = [side / 4, side / 4, side / 2, side / 2]
    drawn = draw_detections(grey(side, side), [found(7, box, 0.5)], [], names=NAMES)
    # Across the right edge, half-way down, where no label is.
    assert is_colour(drawn[side // 2], RED)[side // 2 :].sum() == line


def test_no_line_crosses_a_label_and_the_best_label_lies_on_top() -> None:
    alone = draw_detections(grey(640, 640), [found(7, [100, 100, 300, 300], 0.9)], [], names=NAMES)
    # A box whose left edge goes through the middle of the label.
    crossed = draw_detections(
        grey(640, 640),
        [found(7, [100, 100, 300, 300], 0.9), found(8, [130, 50, 300, 300], 0.3)],
        [],
        names=NAMES,
    )
    label = np.s_[104:112, 104:160]
    assert is_colour(alone[label], RED).any()
    np.testing.assert_array_equal(crossed[label], alone[label])


def test_truth_is_white_and_wider_than_what_was_found() -> None:
    drawn = draw_detections(
        grey(640, 640),
        [found(7, [100, 100, 300, 300], 0.9)],
        [{"bbox": [100, 100, 300, 300]}],
        names=NAMES,
    )
    middle = drawn[300, 380:420]
    assert is_colour(middle, RED).sum() == 2
    assert is_colour(middle, (255, 255, 255)).sum() == 2


@pytest.mark.parametrize(
    ("background", "expected"),
    [((0, 0, 0), 255), ((255, 255, 255), 0), (RED, 255), (GREEN, 0), ((245, 130, 48), 0)],
)
def test_text_is_white_where_that_is_legible_and_black_elsewhere(
    background: tuple[int, int, int], expected: int
) -> None:
    assert choose_text_colour(background) == (expected,) * 3
