"""The shortcut to the best IoU, against every anchor of the real grid."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from retinaray.anchoring.best_iou import best_iou_of, place_boxes
from retinaray.data.coco import CocoDataset
from retinaray.data.transforms import Placement, fit_size
from retinaray.detector.anchors import DEFAULT_SCALES, AnchorSpec, Convention, make_anchors

P3, P2 = (8, 16, 32, 64, 128), (4, 8, 16, 32, 64, 128)
CANVASES = ((203, 317), (64, 384), (31, 33), (256, 256))


@pytest.mark.parametrize("convention", ["centered", "odtk", "odtk-legacy"])
@pytest.mark.parametrize("strides", [P3, P2], ids=["P3", "P2"])
@pytest.mark.parametrize("canvas", CANVASES, ids=str)
def test_best_iou_of_equals_the_maximum_over_all_anchors(
    make_random_boxes: Callable[..., np.ndarray],
    one_thread: None,
    convention: Convention,
    strides: tuple[int, ...],
    canvas: tuple[int, int],
) -> None:
    spec = AnchorSpec((0.7, 2.5, 4.0), (1.0, 3.0, 0.4), strides, convention)
    boxes_xyxy = make_random_boxes(3, 60, *canvas)
    anchors = make_anchors(spec, *canvas).double()
    expected = box_iou(torch.from_numpy(boxes_xyxy).double(), anchors).amax(dim=1).numpy()
    np.testing.assert_allclose(best_iou_of(boxes_xyxy, spec, canvas), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        # Its centre at 16 lies 4 px from the nearest one on both axes.
        ((0, 0, 32, 32), 28 * 28 / (2 * 1024 - 28 * 28)),
        ((-12, -12, 20, 20), 1.0),  # the anchor of the first cell itself
        ((-12, -12, 20, 4), 0.5),  # its upper half
        ((5, 5, 5, 9), 0.0),  # no area
    ],
    ids=["shifted", "same", "half", "flat"],
)
def test_best_iou_of_gives_hand_computed_values(box: tuple[float, ...], expected: float) -> None:
    # One square of 32 px per cell, centres at 4, 12, 20, ... on both axes.
    spec = AnchorSpec(scales=(4.0,), ratios=(1.0,), strides=(8,))
    assert best_iou_of(np.array([box], "f4"), spec, (64, 64)) == pytest.approx([expected])


def test_best_iou_of_is_empty_when_there_are_no_boxes() -> None:
    assert best_iou_of(np.zeros((0, 4), "f4"), AnchorSpec(), (64, 64)).shape == (0,)


@pytest.mark.parametrize(
    ("convention", "share_of_16"), [("centered", 0.922), ("odtk", 0.938), ("odtk-legacy", 0.922)]
)
def test_best_iou_of_shows_which_boxes_odtk_trains_as_background(
    convention: Convention, share_of_16: float
) -> None:
    # ODTK itself, with its inclusive pixels, was measured at 0 % for all five with its scales, and
    # at 94 % and 100 % for 16x16 and 20x20 with half of them. `odtk` measures the same.
    rng = np.random.default_rng(5)
    low = rng.uniform(160, 480, (3000, 2))

    def share(width: int, height: int, factor: float) -> float:
        boxes_xyxy = np.concatenate([low, low + np.array([width, height])], axis=1)
        scales = tuple(factor * scale for scale in DEFAULT_SCALES)
        best = best_iou_of(boxes_xyxy, AnchorSpec(scales, convention=convention), (640, 640))
        return float((best >= 0.5).mean())

    for width, height in ((10, 10), (16, 16), (20, 20), (128, 16), (160, 20)):
        assert share(width, height, 1.0) == 0
    assert share(10, 10, 0.5) == 0
    assert share(16, 16, 0.5) == pytest.approx(share_of_16, abs=0.015)
    assert share(20, 20, 0.5) == 1


def test_place_boxes_equals_the_placement_of_each_image(
    make_dataset: Callable[..., CocoDataset],
) -> None:
    sizes = [(480, 640), (1000, 333), (480, 640), (7, 5)]
    boxes = [[(10, 20, 300, 400)], [], [(0, 0, 640, 480), (5, 6, 7, 8)], [(1, 1, 3, 2)]]
    dataset = make_dataset(boxes, sizes=sizes)
    expected = [
        Placement(*size, *fit_size(*size, 320, 500)).to_network(np.array(rows, "f4").reshape(-1, 4))
        for size, rows in zip(sizes, boxes, strict=True)
    ]
    np.testing.assert_array_equal(place_boxes(dataset, (320, 500)), np.concatenate(expected))


def test_place_boxes_is_empty_when_there_are_no_images(
    make_dataset: Callable[..., CocoDataset],
) -> None:
    assert place_boxes(make_dataset([]), (64, 64)).shape == (0, 4)
