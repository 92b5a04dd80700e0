"""Focal loss for classes and a regression loss for boxes, as sums for the caller to normalise.

All tensors keep their padded shape, so nothing waits for the device. Letters: N images, A anchors,
K classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from retinaray.detector.box_coding import decode_boxes, encode_boxes
from retinaray.detector.matching import IGNORED

BoxLoss = Literal["smooth_l1", "l1", "giou"]

# Keeps areas that are divided by off zero; torchvision's value.
_EPSILON = 1e-7
# Smallest normal float32: its logarithm is finite.
_TINY = torch.finfo(torch.float32).tiny
# Logits in flight at once: what a processor's cache holds, and enough to keep a GPU busy.
_PIECE = 1 << 18
_GPU_PIECE = 1 << 24
_HALF_VALUES = 1 << 16


def focal_loss_sum(
    logits: Float[Tensor, "N A K"],
    class_indices: Int[Tensor, "N A"],
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Float[Tensor, ""]:
    """Sigmoid focal loss summed over all anchors that are not ignored.

    Written as the background loss of every logit, exchanged for the foreground loss at each
    foreground anchor's own class, which needs no one-hot target of shape N A K. The gradient is
    made on the way, piece by piece: no temporary is as large as the logits but the gradient itself.

    Args:
        logits: Raw scores, any float type; computed in float32. Their gradient has their type.
        class_indices: Class in [0, K) of foreground anchors, BACKGROUND (-1) or IGNORED (-2)
            otherwise.
        alpha: Weight of the foreground in (0, 1).
        gamma: Focusing power >= 0.

    Returns:
        The sum, a float32 scalar; 0 when every anchor is ignored. It can be differentiated once.

    Source: Lin et al. 2017 (arXiv:1708.02002), equation 5 and appendix B for its derivative.
    """
    total: Tensor = _FocalSum.apply(logits, class_indices, alpha, gamma)
    return total


class _FocalSum(torch.autograd.Function):
    """The sum, with its gradient from the same pass."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Float[Tensor, "N A K"],
        class_indices: Int[Tensor, "N A"],
        alpha: float,
        gamma: float,
    ) -> Float[Tensor, ""]:
        rows = logits.detach().reshape(-1, logits.shape[-1])
        classes = class_indices.reshape(-1)
        is_foreground = classes >= 0
        # Half a float's digits are enough for a gradient, but float16's range is not.
        dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.empty_like(rows, dtype=dtype) if ctx.needs_input_grad[0] else None
        sum_background = _sum_background_by_table if _is_tabulated(rows) else _sum_background
        background = sum_background(
            rows, classes != IGNORED, weight=1 - alpha, gamma=gamma, gradient=gradient
        )
        # Places in the flat tensor: `scatter_` copies all of a bfloat16 tensor on a processor.
        first = torch.arange(len(rows), device=rows.device) * rows.shape[1]
        own = first + classes.clamp(min=0)
        own_logit = rows.reshape(-1).index_select(0, own).float()
        # A foreground logit loses what a background logit of the opposite sign would.
        foreground, slope = _background_term(-own_logit, gamma)
        instead = (1 - alpha) * _background_term(own_logit, gamma)[0]
        if gradient is not None:
            flat = gradient.view(-1)
            instead_slope = flat.index_select(0, own)
            own_slope = torch.where(is_foreground, (-alpha * slope).to(dtype), instead_slope)
            flat.index_copy_(0, own, own_slope)
        ctx.gradient, ctx.like = gradient, (logits.shape, logits.dtype)
        return background + torch.where(is_foreground, alpha * foreground - instead, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Float[Tensor, ""]) -> tuple[Tensor | None, None, None, None]:
        if ctx.gradient is None:
            raise RuntimeError("the focal loss was differentiated already: its gradient is gone")
        gradient, ctx.gradient = ctx.gradient.mul_(upstream), None
        shape, dtype = ctx.like
        return gradient.to(dtype).reshape(shape), None, None, None


def _is_tabulated(rows: Float[Tensor, "R K"]) -> bool:
    """Whether logits are looked up: a processor takes longer for one logarithm than for both."""
    return rows.device.type == "cpu" and rows.element_size() == 2 and rows.is_contiguous()


def _sum_background_by_table(
    rows: Float[Tensor, "R K"],
    counts: Bool[Tensor, " R"],
    *,
    weight: float,
    gamma: float,
    gradient: Tensor | None,
) -> Float[Tensor, ""]:
    """As `_sum_background`, for floats of 16 bits: their values are few enough for a table."""
    total = torch.zeros(())
    losses, slopes = _tabulate_background(rows.dtype, weight=weight, gamma=gamma)
    if gradient is not None:
        slopes = slopes.to(gradient.dtype)
    num_classes = rows.shape[1]
    step, cuts = _cut(rows)
    size = step * num_classes
    places, found = torch.empty(size, dtype=torch.int32), torch.empty(size)
    for start, stop in cuts:
        piece = slice(start, stop)
        count = (stop - start) * num_classes
        place, loss = places[:count], found[:count]
        place.copy_(rows[piece].view(torch.int16).view(-1)).add_(_HALF_VALUES // 2)
        place.view(-1, num_classes).masked_fill_(~counts[piece, None], _HALF_VALUES)
        total += torch.index_select(losses, 0, place, out=loss).sum()
        if gradient is not None:
            torch.index_select(slopes, 0, place, out=gradient[piece].view(-1))
    return total


def _tabulate_background(
    dtype: torch.dtype, *, weight: float, gamma: float
) -> tuple[Float[Tensor, " values"], Float[Tensor, " values"]]:
    """Loss and slope of every value of a type of 16 bits, in the order of its bits; at last 0."""
    bits = torch.arange(-_HALF_VALUES // 2, _HALF_VALUES // 2, dtype=torch.int32)
    loss, slope = _background_term(bits.to(torch.int16).view(dtype).float(), gamma)
    return functional.pad(weight * loss, (0, 1)), functional.pad(weight * slope, (0, 1))


def _sum_background(
    rows: Float[Tensor, "R K"],
    counts: Bool[Tensor, " R"],
    *,
    weight: float,
    gamma: float,
    gradient: Tensor | None,
) -> Float[Tensor, ""]:
    """Weighted sum of every logit's background loss, in pieces that stay in the cache.

    Args:
        rows: Logits.
        counts: Whether a row counts.
        weight: Of all that do.
        gamma: Focusing power.
        gradient: Receives the sum's derivative, [R, K]; none = nobody wants it.
    """
    total = torch.zeros((), device=rows.device)
    weights = weight * counts
    step, cuts = _cut(rows)
    logit, power, loss, slope = (
        torch.empty(step, rows.shape[1], device=rows.device) for _ in range(4)
    )
    for start, stop in cuts:
        piece = slice(start, stop)
        count = stop - start
        x, p, y, g = logit[:count], power[:count], loss[:count], slope[:count]
        x.copy_(rows[piece])
        torch.sigmoid(x, out=p)
        # softplus(x) = -log(sigmoid(-x)), or x itself where that has no more digits.
        torch.neg(x, out=y).sigmoid_().clamp_(min=_TINY).log_().neg_()
        torch.maximum(y, x, out=y)
        # g = gamma (1 - p) y + p, the derivative over p ** gamma.
        torch.sub(y, torch.mul(p, y, out=g), out=g)
        torch.add(p, g, alpha=gamma, out=g)
        p = p.mul_(p) if gamma == 2 else p.pow_(gamma)
        p.mul_(weights[piece, None])
        total += torch.dot(p.view(-1), y.view(-1))
        if gradient is not None:
            gradient[piece].copy_(g.mul_(p))
    return total


def _cut(rows: Float[Tensor, "R K"]) -> tuple[int, list[tuple[int, int]]]:
    """Most rows of a piece, and where the pieces start and stop."""
    values = _GPU_PIECE if rows.is_cuda else _PIECE
    step = max(1, min(values // max(1, rows.shape[1]), len(rows)))
    return step, [(start, min(start + step, len(rows))) for start in range(0, len(rows), step)]


def _background_term(
    logits: Float[Tensor, "*shape"], gamma: float
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Unweighted loss of background logits, p ** gamma * softplus(x), and its derivative."""
    loss, p = functional.softplus(logits), torch.sigmoid(logits)
    # The power by its logarithm, x - softplus(x): it stays exact where the sigmoid underflows.
    power = torch.exp(gamma * (logits - loss))
    return power * loss, power * (gamma * (1 - p) * loss + p)


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
