"""One optimizer step, in which nothing waits for the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor, nn

from retinaray.data.batching import Batch
from retinaray.detector.losses import BoxLoss, box_loss_sum, focal_loss_sum
from retinaray.detector.matching import match_anchors
from retinaray.detector.retinanet import RetinaNet


@dataclass(frozen=True)
class LossSettings:
    """Matching and loss; see `match_anchors`, `focal_loss_sum` and `box_loss_sum`."""

    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    box_loss: BoxLoss = "l1"
    box_beta: float = 0.11
    box_weight: float = 1.0
    background_iou: float = 0.4
    foreground_iou: float = 0.5
    keep_best_anchor: bool = True


@dataclass(frozen=True)
class LossSums:
    """Losses of one worker's share of a batch, not yet normalised.

    Attributes:
        class_sum: Focal loss over all counted anchors.
        box_sum: Regression loss over foreground anchors.
        num_foreground: Foreground anchors.
    """

    class_sum: Float[Tensor, ""]
    box_sum: Float[Tensor, ""]
    num_foreground: Float[Tensor, ""]


@dataclass(frozen=True)
class StepResult:
    """What a step reports; tensors stay on the device until somebody reads them.

    Attributes:
        class_loss: Focal loss over the global foreground count, this worker's share.
        box_loss: Regression loss over the global foreground count, this worker's share.
        num_foreground: Foreground anchors of the global batch.
        gradient_norm: Before clipping.
        is_finite: False when the norm was not: the step was then taken with all gradients 0, in
            which only momentum and weight decay move the weights.
    """

    class_loss: Float[Tensor, ""]
    box_loss: Float[Tensor, ""]
    num_foreground: Float[Tensor, ""]
    gradient_norm: Float[Tensor, ""]
    is_finite: Tensor


def compute_loss_sums(
    logits: Float[Tensor, "N A K"],
    deltas: Float[Tensor, "N A 4"],
    anchors_xyxy: Float[Tensor, "A 4"],
    batch: Batch,
    settings: LossSettings,
) -> LossSums:
    """Match anchors and sum both losses over a batch; no foreground gives a box sum of 0."""
    matches = match_anchors(
        anchors_xyxy,
        batch.boxes_xyxy,
        is_valid=batch.is_valid,
        is_crowd=batch.is_crowd,
        foreground_iou=settings.foreground_iou,
        background_iou=settings.background_iou,
        keep_best_anchor=settings.keep_best_anchor,
    )
    is_foreground = matches >= 0
    target = matches.clamp(min=0)
    classes = torch.where(is_foreground, batch.class_indices.gather(1, target), matches)
    boxes = batch.boxes_xyxy.gather(1, target[..., None].expand(-1, -1, 4))
    return LossSums(
        class_sum=focal_loss_sum(
            logits, classes, alpha=settings.focal_alpha, gamma=settings.focal_gamma
        ),
        box_sum=box_loss_sum(
            deltas,
            anchors_xyxy,
            boxes,
            is_foreground,
            kind=settings.box_loss,
            beta=settings.box_beta,
        ),
        num_foreground=is_foreground.sum().float(),
    )


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    anchors_xyxy: Float[Tensor, "A 4"],
    settings: LossSettings,
    learning_rate: float,
    clip_norm: float,
    autocast_dtype: torch.dtype | None,
) -> StepResult:
    """Update the weights by one global batch.

    The loss is normalised by the foreground count of all workers, and scaled so that the average
    which DistributedDataParallel takes over gradients is the gradient of the global loss.

    Args:
        model: `RetinaNet`, plain or wrapped for data parallelism; in training mode.
        optimizer: Holds the model's parameters.
        batch: This worker's share, on the model's device.
        anchors_xyxy: Anchors of the batch's canvas.
        settings: Matching and loss.
        learning_rate: Rate of this step.
        clip_norm: Largest gradient norm; 0 = no clipping.
        autocast_dtype: Type of the convolutions; none = as the weights.

    Returns:
        Losses as they were before the update. Where a gradient is not finite all are taken as 0.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    device_type = batch.images.device.type
    with torch.autocast(device_type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
        logits, deltas = model(batch.images)
    sums = compute_loss_sums(logits, deltas, anchors_xyxy, batch, settings)
    total_foreground = sums.num_foreground.clone()
    world_size = 1
    if torch.distributed.is_initialized():
        world_size = torch.distributed.get_world_size()
        torch.distributed.all_reduce(total_foreground)
    normaliser = total_foreground.clamp(min=1)
    class_loss, box_loss = sums.class_sum / normaliser, sums.box_sum / normaliser
    loss = (class_loss + settings.box_weight * box_loss) * world_size
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    norm = _clip_gradients(optimizer, clip_norm)
    is_finite = torch.isfinite(norm)
    _discard_unless(is_finite, optimizer)
    optimizer.step()
    return StepResult(
        class_loss=class_loss.detach(),
        box_loss=box_loss.detach(),
        num_foreground=total_foreground,
        gradient_norm=norm,
        is_finite=is_finite,
    )


def _clip_gradients(optimizer: torch.optim.Optimizer, clip_norm: float) -> Float[Tensor, ""]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    limit = clip_norm if clip_norm > 0 else float("inf")
    return torch.nn.utils.clip_grad_norm_(parameters, limit)


def _discard_unless(is_finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Zero all gradients where the step is not finite, without asking the device which it is."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.copy_(torch.where(is_finite, parameter.grad, 0.0))


def make_optimizer(
    model: nn.Module, *, kind: str, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum 0.9; norms and biases do not decay.

    Args:
        model: Its trainable parameters are optimized.
        kind: `adamw` or `sgd`.
        learning_rate: Initial rate.
        weight_decay: Decay of weights with more than one dimension.

    Raises:
        ValueError: If the kind is unknown.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, foreach=True)
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, foreach=True)
    raise ValueError(f"optimizer={kind!r}: expected 'adamw' or 'sgd'")


class WeightAverage:
    """Exponential moving average of a network's weights and buffers.

    Args:
        model: The network whose weights are averaged; its present values are the start.
        decay: Final decay in [0, 1); it ramps up with the steps, so that early weights are
            forgotten quickly.

    Source: the ramp is (1 + step) / (10 + step), as in TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: RetinaNet, *, decay: float) -> None:
        self._decay = decay
        self.values: dict[str, Tensor] = {
            key: value.detach().clone() for key, value in model.state_dict().items()
        }

    def update(self, model: RetinaNet, step: int) -> None:
        """Take in the weights after a step counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        averaged: list[Tensor] = []
        current: list[Tensor] = []
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                averaged.append(self.values[key])
                current.append(value.detach())
            else:
                self.values[key].copy_(value)
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def load(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Go on from saved averages."""
        for key, value in values:
            self.values[key].copy_(value)
