"""Any height and width gives right boxes: the grid is the network's own, boxes come back in place.

The sizes are those at which the predecessor derived a wrong stride from a ratio of sizes and moved
large boxes up and left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from retinaray.detector.anchors import (
    DEFAULT_RATIOS,
    DEFAULT_SCALES,
    DEFAULT_STRIDES,
    AnchorSpec,
    Convention,
    count_level_anchors,
    make_anchors,
)
from retinaray.detector.box_coding import encode_boxes
from retinaray.detector.postprocess import select_candidates, suppress_overlaps
from retinaray.detector.retinanet import RetinaNet

SIDES = (480, 540, 600, 608, 720, 736, 800, 1080, 1333)
SQUARES = [(side, side) for side in SIDES]
SIZES = [
    *SQUARES,
    *zip(SIDES, reversed(SIDES), strict=True),
    (540, 960),
    (720, 1280),
    (1080, 1920),
    (800, 1333),
]
NUM_PER_CELL = len(DEFAULT_SCALES) * len(DEFAULT_RATIOS)
Grid = list[tuple[int, int]]


def build_without_memory(backbone: str, spec: AnchorSpec) -> RetinaNet:
    """A network on PyTorch's meta device: every operation gives its shape, none computes."""
    with torch.device("meta"):
        return RetinaNet(
            backbone=backbone, num_classes=1, anchors=spec, fpn_channels=8, head_depth=0
        )


def real_grid(network: RetinaNet, height: int, width: int) -> Grid:
    """Sizes of the pyramid's maps as the convolutions themselves produce them."""
    features = network.backbone(torch.zeros(1, 3, height, width, device="meta"))
    levels = network.fpn(features[-len(network.fpn.lateral) :])
    return [(level.shape[2], level.shape[3]) for level in levels]


@pytest.fixture(scope="module")
def grids() -> dict[tuple[int, int], Grid]:
    network = build_without_memory("ResNet18FPN", AnchorSpec())
    return {size: real_grid(network, *size) for size in SIZES}


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_count_level_anchors_equals_the_feature_maps_of_resnet(
    grids: dict[tuple[int, int], Grid], height: int, width: int
) -> None:
    expected = tuple(rows * columns * NUM_PER_CELL for rows, columns in grids[height, width])
    assert count_level_anchors(AnchorSpec(), height, width) == expected


@pytest.mark.parametrize(
    ("backbone", "strides", "height", "width"),
    [
        *(("MobileNetV3LargeFPN", DEFAULT_STRIDES, *size) for size in SQUARES),
        ("MobileNetV3LargeFPN", DEFAULT_STRIDES, 540, 1333),
        ("MobileNetV3LargeFPN", (4, *DEFAULT_STRIDES), 607, 131),
        ("ResNet18FPN", (4, *DEFAULT_STRIDES), 607, 131),
        ("ResNet18FPN", DEFAULT_STRIDES, 33, 1),
        ("ResNet50FPN", DEFAULT_STRIDES, 607, 131),
    ],
)
def test_count_level_anchors_equals_the_feature_maps_when_backbone_is(
    backbone: str, strides: tuple[int, ...], height: int, width: int
) -> None:
    spec = AnchorSpec(strides=strides)
    network = build_without_memory(backbone, spec)
    expected = [rows * cols * NUM_PER_CELL for rows, cols in real_grid(network, height, width)]
    assert list(count_level_anchors(spec, height, width)) == expected


@pytest.mark.parametrize("strides", [DEFAULT_STRIDES, (4, *DEFAULT_STRIDES)])
def test_forward_gives_one_row_per_anchor(strides: tuple[int, ...]) -> None:
    network = build_without_memory("ResNet18FPN", AnchorSpec(strides=strides))
    images = torch.zeros(2, 3, 540, 607, dtype=torch.uint8, device="meta")
    logits, deltas = network(images)
    num_anchors = len(make_anchors(AnchorSpec(strides=strides), 540, 607))
    assert network.anchors_for(images).shape == (num_anchors, 4)
    assert logits.shape == (2, num_anchors, 1)
    assert deltas.shape == (2, num_anchors, 4)


def offsets_by_hand(box_xyxy: Sequence[float], *, row: int, column: int, stride: int) -> Tensor:
    """Offsets of a box from the square default anchor of a cell, without the code under test."""
    x1, y1, x2, y2 = box_xyxy
    side = 4.0 * stride
    return torch.tensor(
        [
            ((x1 + x2) / 2 - (column + 0.5) * stride) / side,
            ((y1 + y2) / 2 - (row + 0.5) * stride) / side,
            math.log((x2 - x1) / side),
            math.log((y2 - y1) / side),
        ]
    )


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_postprocessing_gives_back_a_box_that_one_cell_predicts(
    grids: dict[tuple[int, int], Grid], height: int, width: int
) -> None:
    grid = grids[height, width]
    num_anchors = sum(rows * columns for rows, columns in grid) * NUM_PER_CELL
    box = (0.62 * width, 0.55 * height, 0.97 * width, 0.98 * height)
    # One image per level: only the cell that holds the box's centre predicts. It lies far from the
    # top-left corner, near which even wrong strides agree.
    logits, deltas = torch.full((5, num_anchors, 2), -20.0), torch.zeros(5, num_anchors, 4)
    first = 0
    for level, stride in enumerate(DEFAULT_STRIDES):
        row, column = int(0.765 * height // stride), int(0.795 * width // stride)
        # Ratio 1 and the smallest scale are anchor 0 of a cell.
        index = first + (row * grid[level][1] + column) * NUM_PER_CELL
        logits[level, index, 1] = 3.0
        deltas[level, index] = offsets_by_hand(box, row=row, column=column, stride=stride)
        first += grid[level][0] * grid[level][1] * NUM_PER_CELL

    anchors = make_anchors(AnchorSpec(), height, width)
    candidates = select_candidates(logits, deltas, anchors, height=height, width=width)
    for found in suppress_overlaps(*candidates, score_thresholds=torch.tensor([0.5, 0.5])):
        torch.testing.assert_close(found.boxes_xyxy, torch.tensor([box]), rtol=0, atol=1e-2)
        assert found.labels.tolist() == [1]
        # sigmoid(3) = 1 / (1 + e^-3) = 0.95257
        torch.testing.assert_close(found.scores, torch.tensor([0.95257]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("convention", ["centered", "odtk", "odtk-legacy"])
@pytest.mark.parametrize(("height", "width"), [(800, 1280), (540, 960), (1333, 480)])
def test_postprocessing_gives_back_a_box_encoded_at_the_best_anchor_of_each_level(
    convention: Convention, height: int, width: int
) -> None:
    spec = AnchorSpec(convention=convention)
    anchors = make_anchors(spec, height, width)
    box = torch.tensor([[0.31 * width, 0.4 * height, 0.9 * width, 0.95 * height]])
    sizes = count_level_anchors(spec, height, width)
    logits, deltas = torch.full((5, len(anchors), 1), -20.0), torch.zeros(5, len(anchors), 4)
    for level, overlaps in enumerate(box_iou(box, anchors)[0].split(sizes)):
        best = sum(sizes[:level]) + int(overlaps.argmax())
        logits[level, best] = 3.0
        deltas[level, best] = encode_boxes(box[0], anchors[best])
    candidates = select_candidates(logits, deltas, anchors, height=height, width=width)
    for found in suppress_overlaps(*candidates, score_thresholds=torch.tensor([0.5])):
        torch.testing.assert_close(found.boxes_xyxy, box, rtol=0, atol=1e-2)
