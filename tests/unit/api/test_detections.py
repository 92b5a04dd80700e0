"""Detections of one image: rounding, filtering, drawing; numbers computed by hand."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from retinaray.api.detections import (
    DetectedObject,
    ImageDetections,
    fail_detections,
    place_detections,
)
from retinaray.data.coco import Category, CategoryTable, ImageTargets
from retinaray.data.coco_results import coco_results
from retinaray.data.transforms import Placement
from retinaray.detector.postprocess import Detections
from retinaray.errors import ImageError, MissingFileError

CATEGORIES = CategoryTable((Category(7, "car"), Category(9, "bus")))
# An image of 100x200 on half its size: network pixels count twice.
PLACEMENT = Placement(height=100, width=200, content_height=50, content_width=100)
GREY = np.full((100, 200, 3), 90, dtype=np.uint8)


def decode_grey() -> np.ndarray:
    return GREY


@pytest.fixture
def found() -> ImageDetections:
    """A bus, a car, and a box in the padding, which is none of the image."""
    network = Detections(
        torch.tensor(
            [[10.0, 5.0, 30.126, 20.0], [0.0, 0.0, 120.0, 60.0], [20.0, 55.0, 40.0, 60.0]]
        ),
        torch.tensor([0.8765432, 0.5, 0.4]),
        torch.tensor([1, 0, 0]),
    )
    return place_detections(
        network,
        PLACEMENT,
        image="a.jpg",
        categories=CATEGORIES,
        score_threshold=None,
        decode=decode_grey,
    )


def test_place_detections_gives_original_pixels(found: ImageDetections) -> None:
    assert (found.height, found.width, len(found), found.error) == (100, 200, 2, "")
    # Twice the network's corners; the second is cut to the image.
    np.testing.assert_allclose(
        found.boxes_xyxy, [[20, 10, 60.252, 40], [0, 0, 200, 100]], rtol=0, atol=1e-5
    )
    assert found.boxes_xyxy.dtype == found.scores.dtype == np.float32
    assert found.class_indices.tolist() == [1, 0]
    assert found.class_indices.dtype == np.int64
    assert found.names == ("bus", "car")
    assert found.category_ids == (9, 7)


def test_to_coco_rounds_as_every_command(found: ImageDetections) -> None:
    # 60.252 is rounded to 60.25 before the width is taken.
    assert found.to_coco("x") == [
        {"image_id": "x", "category_id": 9, "bbox": [20, 10, 40.25, 30], "score": 0.876543},
        {"image_id": "x", "category_id": 7, "bbox": [0, 0, 200, 100], "score": 0.5},
    ]


def test_to_coco_is_coco_results_for_random_boxes() -> None:
    rng = np.random.default_rng(5)
    for height, width in [(37, 91), (480, 640), (1, 500), (3000, 4001)]:
        placement = Placement(height, width, max(1, height // 3), max(1, width // 3))
        sides = (placement.content_width, placement.content_height)
        corners = (rng.uniform(-0.1, 1.2, (400, 2, 2)) * sides).astype(np.float32)
        boxes = torch.from_numpy(np.sort(corners, axis=1).reshape(-1, 4))
        network = Detections(boxes, torch.rand(400), torch.randint(0, 2, (400,)))
        placed = place_detections(
            network,
            placement,
            image="a",
            categories=CATEGORIES,
            score_threshold=None,
            decode=decode_grey,
        )
        expected = list(coco_results(network, placement, CATEGORIES))
        assert len(expected) > 5
        assert placed.to_coco(3) == [{"image_id": 3, **entry} for entry in expected]
        assert len(placed) == len(expected)


def test_iteration_gives_one_object_after_the_other(found: ImageDetections) -> None:
    bus, car = found
    assert isinstance(bus, DetectedObject)
    assert (bus.name, bus.category_id, bus.class_index) == ("bus", 9, 1)
    assert bus.score == pytest.approx(0.8765432)
    assert car.box_xyxy == (0, 0, 200, 100)


@pytest.mark.parametrize(("threshold", "count"), [(0.0, 2), (0.49, 2), (0.5, 1), (0.9, 0)])
def test_filter_keeps_what_scores_above(
    found: ImageDetections, threshold: float, count: int
) -> None:
    kept = found.filter(threshold)
    assert len(kept) == count
    assert kept.names == found.names[:count]
    assert kept.boxes_xyxy.shape == (count, 4)
    assert len(kept.to_coco(1)) == count


def test_filter_compares_in_float32_as_the_network_does() -> None:
    score = np.array([0.3], dtype=np.float32)  # a little above the 0.3 of float64
    one = ImageDetections(
        "a", 9, 9, np.zeros((1, 4), np.float32), score, np.zeros(1, np.int64), CATEGORIES
    )
    assert len(one.filter(0.3)) == 0
    assert len(one.filter(0.29)) == 1


def test_repr_names_the_best_objects(found: ImageDetections) -> None:
    assert repr(found) == "ImageDetections(a.jpg, 100x200: bus 0.88, car 0.50)"
    assert repr(found.filter(0.9)) == "ImageDetections(a.jpg, 100x200: nothing found)"


def test_draw_enlarges_a_small_image_and_marks_its_boxes(found: ImageDetections) -> None:
    drawn = found.filter(0.6).draw()
    # The shorter side of 100 px is enlarged to at least 640: 7 times.
    assert drawn.size == (1400, 700)
    values = np.asarray(drawn)
    assert tuple(values[70, 300]) != (90, 90, 90), "the upper side of the bus, at y = 10"
    assert tuple(values[600, 1200]) == (90, 90, 90), "nothing there"


def test_draw_shows_ground_truth_in_white(found: ImageDetections) -> None:
    truth = ImageTargets(
        boxes_xyxy=np.array([[100, 50, 150, 90]], dtype=np.float32),
        class_indices=np.zeros(1, np.int64),
        is_crowd=np.zeros(1, bool),
        area=np.full(1, 2000, np.float32),
    )
    nothing = found.filter(0.9)
    assert (np.asarray(nothing.draw(truth)) == 255).any()
    assert not (np.asarray(nothing.draw()) == 255).any()


def test_repr_png_shows_the_picture_no_larger_than_a_page(found: ImageDetections) -> None:
    content = found._repr_png_()
    assert content is not None
    assert Image.open(io.BytesIO(content)).size == (1280, 640)


def test_fail_detections_is_an_entry_without_objects() -> None:
    failed = fail_detections("a.jpg", CATEGORIES, "a.jpg: cannot decode it")
    assert len(failed) == 0
    assert list(failed) == failed.to_coco(1) == []
    assert failed.filter(0.5).error == "a.jpg: cannot decode it"
    assert repr(failed) == "ImageDetections(a.jpg: not read: a.jpg: cannot decode it)"
    with pytest.raises(ImageError, match=r"a\.jpg: cannot be drawn: a\.jpg: cannot decode it"):
        failed.draw()
    assert failed._repr_png_() is None


def test_repr_png_is_left_out_when_the_file_is_gone(found: ImageDetections, tmp_path: Path) -> None:
    def decode_absent() -> np.ndarray:
        raise MissingFileError("a.jpg is gone")

    gone = ImageDetections(
        *("a.jpg", 100, 200, found.boxes_xyxy, found.scores, found.class_indices, CATEGORIES),
        _decode=decode_absent,
    )
    assert gone._repr_png_() is None
    with pytest.raises(MissingFileError, match="gone"):
        gone.draw()
