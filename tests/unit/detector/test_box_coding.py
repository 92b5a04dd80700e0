"""Box offsets against hand-computed numbers, torchvision's coder and their own inverse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from retinaray.detector.box_coding import MAX_LOG_GROWTH, clip_boxes, decode_boxes, encode_boxes


def random_boxes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 800 - 100
    sides = torch.exp(torch.rand(count, 2, generator=generator) * 6)
    return torch.cat((corners, corners + sides), dim=1)


def test_encode_boxes_gives_hand_computed_offsets() -> None:
    anchor = torch.tensor([[10.0, 20.0, 30.0, 60.0]])  # 20 x 40, centre (20, 40)
    box = torch.tensor([[20.0, 20.0, 60.0, 40.0]])  # 40 x 20, centre (40, 30)
    # (40-20)/20 = 1; (30-40)/40 = -0.25; log(40/20) = log 2; log(20/40) = -log 2.
    expected = torch.tensor([[1.0, -0.25, math.log(2), -math.log(2)]])
    torch.testing.assert_close(encode_boxes(box, anchor), expected)


def test_decode_boxes_gives_hand_computed_corners() -> None:
    anchor = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    deltas = torch.tensor([[0.5, -0.5, math.log(2), 0.0]])
    # Centre (5, 5) + (5, -5) = (10, 0); sides 20 x 10.
    expected = torch.tensor([[0.0, -5.0, 20.0, 5.0]])
    torch.testing.assert_close(decode_boxes(deltas, anchor), expected)


def test_decode_boxes_inverts_encode_boxes() -> None:
    boxes, anchors = random_boxes(500, 0), random_boxes(500, 1)
    # Shifts up to some 800 anchor sides lose digits in float32; 2e-3 px of 800 is a few ulps.
    restored = decode_boxes(encode_boxes(boxes, anchors), anchors, max_log_growth=10)
    torch.testing.assert_close(restored, boxes, rtol=1e-5, atol=2e-3)


def test_encode_boxes_inverts_decode_boxes() -> None:
    anchors = random_boxes(500, 2)
    deltas = torch.randn(500, 4, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        encode_boxes(decode_boxes(deltas, anchors), anchors), deltas, rtol=1e-4, atol=1e-3
    )


def test_both_directions_equal_torchvision() -> None:
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    boxes, anchors = random_boxes(500, 4), random_boxes(500, 5)
    torch.testing.assert_close(encode_boxes(boxes, anchors), coder.encode_single(boxes, anchors))
    deltas = torch.randn(500, 4, generator=torch.Generator().manual_seed(6)) * 3
    theirs = coder.decode_single(deltas, anchors)
    torch.testing.assert_close(decode_boxes(deltas, anchors), theirs)


def test_decode_boxes_clamps_growth_when_offsets_are_huge() -> None:
    anchor = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    deltas = torch.tensor([[0.0, 0.0, 100.0, -200.0]])
    # Growth 1000/16 on 16 px = 1000 px wide around 8; a shrinking side is not clamped: no height.
    assert math.exp(MAX_LOG_GROWTH) == pytest.approx(62.5)
    expected = torch.tensor([[-492.0, 8.0, 508.0, 8.0]])
    torch.testing.assert_close(decode_boxes(deltas, anchor), expected, rtol=1e-5, atol=1e-3)


def test_encode_boxes_broadcasts_when_anchors_have_no_batch() -> None:
    boxes, anchors = random_boxes(12, 7).reshape(3, 4, 4), random_boxes(4, 8)
    each = torch.stack([encode_boxes(row, anchors) for row in boxes])
    torch.testing.assert_close(encode_boxes(boxes, anchors), each)
    torch.testing.assert_close(
        decode_boxes(boxes / 800, anchors),
        torch.stack([decode_boxes(b / 800, anchors) for b in boxes]),
    )


def test_decode_boxes_returns_float32_when_offsets_are_bfloat16() -> None:
    decoded = decode_boxes(torch.zeros(2, 4, dtype=torch.bfloat16), random_boxes(2, 9))
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, random_boxes(2, 9))


def test_encode_boxes_keeps_shape_when_empty() -> None:
    assert encode_boxes(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)


def test_clip_boxes_cuts_at_the_canvas() -> None:
    boxes = torch.tensor(
        [
            [-5.0, -6.0, 50.0, 20.0],  # over the left and top edge
            [90.0, 30.0, 130.0, 70.0],  # over the right (100) and bottom (40) edge
            [120.0, 50.0, 140.0, 60.0],  # outside: no area left
            [10.0, 10.0, 20.0, 20.0],  # inside
        ]
    )
    expected = torch.tensor(
        [
            [0.0, 0.0, 50.0, 20.0],
            [90.0, 30.0, 100.0, 40.0],
            [100.0, 40.0, 100.0, 40.0],
            [10.0, 10.0, 20.0, 20.0],
        ]
    )
    torch.testing.assert_close(clip_boxes(boxes, height=40, width=100), expected)
