"""Focal loss for classes and a regression loss for boxes, as sums for the caller to normalise.

All tensors keep their padded shape, so nothing waits for the device. Letters: N images, A anchors,
K classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from retinaray.detector.box_coding import decode_boxes, encode_boxes
from retinaray.detector.matching import IGNORED

BoxLoss = Literal["smooth_l1", "l1", "giou"]

# Keeps areas that are divided by off zero; torchvision's value.
_EPSILON = 1e-7


def focal_loss_sum(
    logits: Float[Tensor, "N A K"],
    class_indices: Int[Tensor, "N A"],
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Float[Tensor, ""]:
    """Sigmoid focal loss summed over all anchors that are not ignored.

    Written as the background loss of every logit plus a correction at each foreground anchor's own
    class, which needs no one-hot target of shape N A K.

    Args:
        logits: Raw scores, any float type; computed in float32.
        class_indices: Class in [0, K) of foreground anchors, BACKGROUND (-1) or IGNORED (-2)
            otherwise.
        alpha: Weight of the foreground in (0, 1).
        gamma: Focusing power >= 0.

    Returns:
        The sum, a scalar; 0 when every anchor is ignored.

    Source: Lin et al. 2017 (arXiv:1708.02002), equation 5.
    """
    logits = logits.float()
    is_counted = class_indices != IGNORED
    is_foreground = class_indices >= 0
    background = _background_term(logits, gamma).sum(-1)
    own_logit = logits.gather(-1, class_indices.clamp(min=0)[..., None])[..., 0]
    # A foreground logit loses what a background logit of the opposite sign would.
    foreground = _background_term(-own_logit, gamma)
    correction = alpha * foreground - (1 - alpha) * _background_term(own_logit, gamma)
    per_anchor = (1 - alpha) * background + torch.where(is_foreground, correction, 0.0)
    return torch.where(is_counted, per_anchor, 0.0).sum()


def _background_term(logits: Float[Tensor, "*shape"], gamma: float) -> Float[Tensor, "*shape"]:
    # sigmoid(x) ** gamma by its logarithm, x - softplus(x): the power's own gradient is infinity
    # times 0 where the sigmoid underflows and gamma < 1.
    loss = functional.softplus(logits)
    return torch.exp(gamma * (logits - loss)) * loss


def box_loss_sum(
    deltas: Float[Tensor, "N A 4"],
    anchors_xyxy: Float[Tensor, "A 4"],
    target_boxes_xyxy: Float[Tensor, "N A 4"],
    is_foreground: Bool[Tensor, "N A"],
    *,
    kind: BoxLoss = "l1",
    beta: float = 0.11,
) -> Float[Tensor, ""]:
    """Regression loss summed over foreground anchors.

    Args:
        deltas: Predicted offsets, any float type; computed in float32.
        anchors_xyxy: Anchors in pixels.
        target_boxes_xyxy: The ground truth of each anchor; any values where not foreground.
        is_foreground: Which anchors count.
        kind: `l1` and `smooth_l1` compare offsets, `giou` compares decoded boxes.
        beta: Where smooth L1 turns linear.

    Returns:
        The sum, a scalar; 0 without foreground. Never NaN because of an anchor that does not count.

    Source: Girshick 2015 (arXiv:1504.08083) for smooth L1; Rezatofighi et al. 2019
    (arXiv:1902.09630) for GIoU.
    """
    deltas = deltas.float()
    # Anchors that do not count learn themselves: finite targets keep NaN out of the masked
    # gradient.
    targets = torch.where(is_foreground[..., None], target_boxes_xyxy, anchors_xyxy)
    if kind == "giou":
        per_anchor = _generalized_iou_loss(decode_boxes(deltas, anchors_xyxy), targets)
    else:
        offsets = encode_boxes(targets, anchors_xyxy)
        if kind == "l1":
            per_anchor = (deltas - offsets).abs().sum(-1)
        else:
            per_anchor = functional.smooth_l1_loss(
                deltas, offsets, beta=beta, reduction="none"
            ).sum(-1)
    return torch.where(is_foreground, per_anchor, 0.0).sum()


def _generalized_iou_loss(
    boxes_xyxy: Float[Tensor, "N A 4"], targets_xyxy: Float[Tensor, "N A 4"]
) -> Float[Tensor, "N A"]:
    """1 - GIoU of each pair, in [0, 2]; torchvision's own waits for the device to find overlaps."""
    inner = _area(
        torch.maximum(boxes_xyxy[..., :2], targets_xyxy[..., :2]),
        torch.minimum(boxes_xyxy[..., 2:], targets_xyxy[..., 2:]),
    )
    hull = _area(
        torch.minimum(boxes_xyxy[..., :2], targets_xyxy[..., :2]),
        torch.maximum(boxes_xyxy[..., 2:], targets_xyxy[..., 2:]),
    )
    union = (
        _area(boxes_xyxy[..., :2], boxes_xyxy[..., 2:])
        + _area(targets_xyxy[..., :2], targets_xyxy[..., 2:])
        - inner
    )
    return 1 - inner / (union + _EPSILON) + (hull - union) / (hull + _EPSILON)


def _area(
    top_left: Float[Tensor, "*batch 2"], bottom_right: Float[Tensor, "*batch 2"]
) -> Float[Tensor, "*batch"]:
    width, height = (bottom_right - top_left).clamp(min=0).unbind(-1)
    return width * height
