"""Matching against torchvision's Matcher, and against itself under changes that must not matter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from retinaray.detector import matching
from retinaray.detector.anchors import AnchorSpec, make_anchors
from retinaray.detector.matching import BACKGROUND, IGNORED, match_anchors

PadBoxes = Callable[..., tuple[Tensor, Tensor]]


def match_one(
    anchors: Tensor, boxes: Tensor, *, is_crowd: list[bool] | None = None, **settings: object
) -> Tensor:
    """Matches of a single image without padding, shape [A]."""
    is_valid = torch.ones(1, len(boxes), dtype=torch.bool)
    crowd = torch.tensor([is_crowd or [False] * len(boxes)], dtype=torch.bool)
    matches = match_anchors(
        anchors,
        boxes.reshape(1, -1, 4),
        is_valid=is_valid,
        is_crowd=crowd.reshape(1, -1),
        **settings,  # type: ignore[arg-type]
    )
    return matches[0]


def random_boxes(count: int, seed: int, *, is_on_grid: bool = False) -> Tensor:
    """Boxes over 160x128 pixels with sides of 2 to 120; on whole multiples of 4 to provoke ties."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * torch.tensor([150.0, 118.0])
    sides = 2 + torch.rand(count, 2, generator=generator) ** 2 * 118
    boxes = torch.cat((corners, corners + sides), dim=1)
    return (boxes / 4).round() * 4 + torch.tensor([0.0, 0.0, 4.0, 4.0]) if is_on_grid else boxes


HAND_MADE = {
    "identical boxes": [[20, 20, 60, 60], [20, 20, 60, 60], [90, 50, 120, 90]],
    "box between two cells": [[48, 48, 80, 80]],
    "box on a corner of four cells": [[64, 64, 96, 96], [8, 8, 40, 40]],
    "nested boxes": [[10, 10, 110, 110], [50, 50, 62, 62]],
    "long and tiny": [[0, 60, 128, 76], [100, 100, 101, 101]],
    "exact anchor": [[4, 4, 36, 36], [0, 0, 160, 128]],
    "over the edge": [[140, 100, 220, 190], [-30, -30, 20, 20]],
}


@pytest.mark.parametrize("keep_best_anchor", [True, False])
@pytest.mark.parametrize("corners", HAND_MADE.values(), ids=HAND_MADE.keys())
def test_match_anchors_equals_torchvision_when_boxes_are_hand_made(
    anchors_128x160: Tensor, corners: list[list[float]], keep_best_anchor: bool
) -> None:
    boxes = torch.tensor(corners, dtype=torch.float32)
    expected = Matcher(0.5, 0.4, allow_low_quality_matches=keep_best_anchor)(
        box_iou(boxes, anchors_128x160)
    )
    ours = match_one(anchors_128x160, boxes, keep_best_anchor=keep_best_anchor)
    assert ours.equal(expected)


@pytest.mark.parametrize("keep_best_anchor", [True, False])
@pytest.mark.parametrize("is_on_grid", [True, False], ids=["on a grid", "anywhere"])
def test_match_anchors_equals_torchvision_when_boxes_are_random(
    anchors_128x160: Tensor, is_on_grid: bool, keep_best_anchor: bool
) -> None:
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=keep_best_anchor)
    kinds = torch.zeros(3, dtype=torch.int64)
    for seed in range(60):
        boxes = random_boxes(1 + seed % 12, seed, is_on_grid=is_on_grid)
        expected = matcher(box_iou(boxes, anchors_128x160))
        ours = match_one(anchors_128x160, boxes, keep_best_anchor=keep_best_anchor)
        assert ours.equal(expected), f"seed {seed}"
        kinds += torch.bincount(ours.clamp(max=0) + 2, minlength=3)
    assert (kinds > 500).all(), "ignored, background and foreground must all occur"


@pytest.mark.parametrize(
    ("foreground_iou", "background_iou"), [(0.5, 0.5), (0.7, 0.3), (0.35, 0.2)]
)
def test_match_anchors_equals_torchvision_when_thresholds_change(
    anchors_128x160: Tensor, foreground_iou: float, background_iou: float
) -> None:
    boxes = random_boxes(8, 99)
    matcher = Matcher(foreground_iou, background_iou, allow_low_quality_matches=True)
    ours = match_one(
        anchors_128x160, boxes, foreground_iou=foreground_iou, background_iou=background_iou
    )
    assert ours.equal(matcher(box_iou(boxes, anchors_128x160)))


def test_match_anchors_gives_hand_computed_kinds() -> None:
    anchors = torch.tensor(
        [
            [0.0, 0.0, 10.0, 10.0],  # box 0 itself: IoU 1
            [0.0, 0.0, 10.0, 20.0],  # 100 / 200 = 0.5: foreground from 0.5 on
            [0.0, 0.0, 15.0, 15.0],  # 100 / 225 = 0.444: ignored
            [0.0, 0.0, 10.0, 26.0],  # 100 / 260 = 0.385: background
            [100.0, 0.0, 130.0, 30.0],  # box 1, 10x10 = 100 / 900 = 0.111: its best anchor
            [200.0, 0.0, 210.0, 10.0],  # touches nothing
        ]
    )
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [110.0, 10.0, 120.0, 20.0]])
    assert match_one(anchors, boxes).tolist() == [0, 0, IGNORED, BACKGROUND, 1, BACKGROUND]
    without = match_one(anchors, boxes, keep_best_anchor=False)
    assert without.tolist() == [0, 0, IGNORED, BACKGROUND, BACKGROUND, BACKGROUND]


def test_match_anchors_ignores_inside_crowds_and_matches_none_to_them() -> None:
    anchors = torch.tensor(
        [
            [0.0, 0.0, 10.0, 10.0],  # wholly inside the crowd, no object
            [95.0, 0.0, 105.0, 10.0],  # exactly half inside
            [96.0, 0.0, 106.0, 10.0],  # 40 % inside: background
            [40.0, 40.0, 60.0, 60.0],  # inside, but an object too: foreground
            [0.0, 0.0, 100.0, 100.0],  # IoU 1 with the crowd itself: still only ignored
        ]
    )
    boxes = torch.tensor([[0.0, 0.0, 100.0, 100.0], [40.0, 40.0, 60.0, 60.0]])
    matches = match_one(anchors, boxes, is_crowd=[True, False])
    assert matches.tolist() == [IGNORED, IGNORED, BACKGROUND, 1, IGNORED]


def test_match_anchors_equals_one_image_at_a_time_when_batched(
    anchors_128x160: Tensor, pad_boxes: PadBoxes
) -> None:
    images = [random_boxes(count, count) for count in (5, 0, 1, 12)]
    boxes, is_valid = pad_boxes(images)
    crowd = torch.zeros_like(is_valid)
    crowd[0, 2] = crowd[3, 5] = True
    batched = match_anchors(anchors_128x160, boxes, is_valid=is_valid, is_crowd=crowd)
    for row, image in enumerate(images):
        flags = crowd[row, : len(image)].tolist()
        assert batched[row].equal(match_one(anchors_128x160, image, is_crowd=flags))
    order = torch.tensor([2, 0, 3, 1])
    shuffled = match_anchors(
        anchors_128x160, boxes[order], is_valid=is_valid[order], is_crowd=crowd[order]
    )
    assert shuffled.equal(batched[order])


@pytest.mark.parametrize("fill", [0.0, 50.0, float("nan"), float("inf")])
def test_match_anchors_is_the_same_when_padding_grows(
    anchors_128x160: Tensor, pad_boxes: PadBoxes, fill: float
) -> None:
    images = [random_boxes(3, 1), random_boxes(7, 2)]
    results = []
    for extra in (0, 9):
        boxes, is_valid = pad_boxes(images, extra=extra, fill=fill)
        crowd = torch.zeros_like(is_valid) if extra == 0 else ~is_valid
        results.append(match_anchors(anchors_128x160, boxes, is_valid=is_valid, is_crowd=crowd))
    assert results[0].equal(results[1])
    # Padding that holds a box of real size would be matched if it were not marked.
    boxes, is_valid = pad_boxes(images, fill=fill)
    boxes[~is_valid] = torch.tensor([40.0, 40.0, 90.0, 90.0])
    again = match_anchors(
        anchors_128x160, boxes, is_valid=is_valid, is_crowd=torch.zeros_like(is_valid)
    )
    assert again.equal(results[0])


@pytest.mark.parametrize("max_overlaps", [1, 3942 * 2 * 3, 3942 * 2 * 5])
def test_match_anchors_is_the_same_when_boxes_are_taken_in_chunks(
    anchors_128x160: Tensor,
    pad_boxes: PadBoxes,
    monkeypatch: pytest.MonkeyPatch,
    max_overlaps: int,
) -> None:
    images = [random_boxes(12, 5, is_on_grid=True), random_boxes(9, 6)]
    images[0][7] = images[0][1]  # a tie between chunks: the first must keep its anchors
    boxes, is_valid = pad_boxes(images)
    crowd = torch.zeros_like(is_valid)
    crowd[1, 8] = True
    whole = match_anchors(anchors_128x160, boxes, is_valid=is_valid, is_crowd=crowd)
    monkeypatch.setattr(matching, "_MAX_OVERLAPS", max_overlaps)
    chunked = match_anchors(anchors_128x160, boxes, is_valid=is_valid, is_crowd=crowd)
    assert chunked.equal(whole)
    assert (whole == 1).any()
    assert not (whole[0] == 7).any()


def test_match_anchors_gives_background_when_there_are_no_boxes(anchors_128x160: Tensor) -> None:
    matches = match_anchors(
        anchors_128x160,
        torch.zeros(3, 0, 4),
        is_valid=torch.zeros(3, 0, dtype=torch.bool),
        is_crowd=torch.zeros(3, 0, dtype=torch.bool),
    )
    assert matches.shape == (3, len(anchors_128x160))
    assert matches.dtype == torch.int64
    assert (matches == BACKGROUND).all()


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "bad",
    [
        [50, 50, 50, 80],
        [50, 50, 80, 50],
        [50, 50, 50, 50],
        [80, 50, 50, 80],
        [NAN, 50, 80, 80],
        [50, 50, NAN, NAN],
        [50, 50, INF, 80],
        [-INF, -INF, INF, INF],
        [-900, -900, -850, -850],
        [5000, 20, 5060, 80],
        [0, 0, 3e38, 3e38],
        [-3e38, -3e38, 3e38, 3e38],
    ],
    ids=str,
)
def test_match_anchors_gives_no_anchor_to_an_unusable_box(
    anchors_128x160: Tensor, bad: list[float]
) -> None:
    good = random_boxes(2, 3)
    boxes = torch.cat((torch.tensor([bad], dtype=torch.float32), good))
    matches = match_one(anchors_128x160, boxes)
    alone = match_one(anchors_128x160, good)
    assert matches.equal(torch.where(alone >= 0, alone + 1, alone))


@pytest.mark.parametrize(
    "bad",
    [
        [50, 50, 50, 80],
        [80, 80, 50, 50],
        [NAN, 50, 80, 80],
        [50, 50, INF, 80],
        [-INF, -INF, INF, INF],
        [5000, 20, 5060, 80],
    ],
    ids=str,
)
def test_match_anchors_ignores_nothing_for_an_unusable_crowd(
    anchors_128x160: Tensor, bad: list[float]
) -> None:
    good = random_boxes(2, 3)
    boxes = torch.cat((good, torch.tensor([bad], dtype=torch.float32)))
    matches = match_one(anchors_128x160, boxes, is_crowd=[False, False, True])
    assert matches.equal(match_one(anchors_128x160, good))


@pytest.mark.parametrize(("width", "height"), [(10, 10), (16, 16), (20, 20), (128, 16)])
def test_match_anchors_keeps_objects_that_no_default_anchor_reaches(
    anchors_128x160: Tensor, width: int, height: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(50, 2, generator=generator) * torch.tensor([160 - width, 128 - height])
    for corner in corners:
        box = torch.cat((corner, corner + torch.tensor([width, height])))[None]
        assert (match_one(anchors_128x160, box, keep_best_anchor=False) < 0).all()
        assert (match_one(anchors_128x160, box) == 0).any()


def test_match_anchors_reaches_small_objects_when_scales_are_halved() -> None:
    scales = tuple(scale / 2 for scale in AnchorSpec().scales)
    anchors = make_anchors(AnchorSpec(scales=scales), 128, 160)
    corners = torch.rand(50, 2, generator=torch.Generator().manual_seed(0)) * 100
    boxes = torch.cat((corners, corners + 20), dim=1)
    best = box_iou(boxes, anchors).amax(1)
    for box, highest in zip(boxes, best, strict=True):
        matches = match_one(anchors, box[None], keep_best_anchor=False)
        assert (matches == 0).any() == (highest >= 0.5)
    assert (best >= 0.5).float().mean() > 0.9


def test_match_anchors_refuses_when_thresholds_are_swapped(anchors_128x160: Tensor) -> None:
    with pytest.raises(ValueError, match=r"background_iou=0\.5 is above foreground_iou=0\.4"):
        match_one(anchors_128x160, random_boxes(1, 0), foreground_iou=0.4, background_iou=0.5)
