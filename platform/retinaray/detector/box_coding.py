"""Boxes as offsets from anchors, and back. Continuous pixel coordinates, no +1."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

# Growth by more than 1000/16 is never right and overflows exp; the value of Detectron and
# torchvision.
MAX_LOG_GROWTH = math.log(1000.0 / 16.0)


def encode_boxes(
    boxes_xyxy: Float[Tensor, "*#batch 4"], anchors_xyxy: Float[Tensor, "*#batch 4"]
) -> Float[Tensor, "*#batch 4"]:
    """Offsets (dx, dy, dw, dh) that turn anchors into boxes.

    Args:
        boxes_xyxy: Boxes of positive width and height, in pixels; broadcasts against the anchors.
        anchors_xyxy: Anchors of positive width and height, in pixels.

    Returns:
        Centre shifts over the anchor's sides, logarithms of the growth of the sides. Not finite
        where a box has no area.

    Source: Girshick et al. 2014 (arXiv:1311.2524), appendix C.
    """
    anchor_size = anchors_xyxy[..., 2:] - anchors_xyxy[..., :2]
    anchor_centre = anchors_xyxy[..., :2] + 0.5 * anchor_size
    size = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    centre = boxes_xyxy[..., :2] + 0.5 * size
    return torch.cat(
        ((centre - anchor_centre) / anchor_size, torch.log(size / anchor_size)), dim=-1
    )


def decode_boxes(
    deltas: Float[Tensor, "*#batch 4"],
    anchors_xyxy: Float[Tensor, "*#batch 4"],
    *,
    max_log_growth: float = MAX_LOG_GROWTH,
) -> Float[Tensor, "*#batch 4"]:
    """Boxes that lie at the given offsets from their anchors; the inverse of `encode_boxes`.

    Args:
        deltas: Offsets (dx, dy, dw, dh), any values.
        anchors_xyxy: Anchors in pixels; broadcast against the offsets.
        max_log_growth: dw and dh are clamped to this from above.

    Returns:
        Boxes xyxy in the anchors' pixels, float32, not clipped to any image.
    """
    anchor_size = anchors_xyxy[..., 2:] - anchors_xyxy[..., :2]
    anchor_centre = anchors_xyxy[..., :2] + 0.5 * anchor_size
    centre = deltas[..., :2] * anchor_size + anchor_centre
    half = 0.5 * torch.exp(deltas[..., 2:].clamp(max=max_log_growth)) * anchor_size
    return torch.cat((centre - half, centre + half), dim=-1)


def clip_boxes(
    boxes_xyxy: Float[Tensor, "*batch 4"], height: float, width: float
) -> Float[Tensor, "*batch 4"]:
    """Boxes cut to 0..width and 0..height; a box wholly outside ends up without area."""
    x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
    return torch.stack(
        (x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)), dim=-1
    )
