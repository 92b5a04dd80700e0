"""One optimizer step, in which nothing waits for the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from retinaray.data.batching import Batch
from retinaray.training.batch_loss import (
    LossSettings,
    LossSums,
    compute_loss_sums,
    count_foreground,
    match_batch,
    sum_losses,
)
from retinaray.training.optimizer import make_optimizer, update_weights
from retinaray.training.running_statistics import RunningStatistics
from retinaray.training.weight_average import WeightAverage

__all__ = [
    "LossSettings",
    "LossSums",
    "StepResult",
    "TrainingStep",
    "WeightAverage",
    "compute_loss_sums",
    "make_optimizer",
    "take_step",
]


@dataclass(frozen=True)
class StepResult:
    """What a step reports; tensors stay on the device until somebody reads them.

    Attributes:
        class_loss: Focal loss over the global foreground count, this worker's share.
        box_loss: Regression loss over the global foreground count, this worker's share.
        num_foreground: Foreground anchors of the global batch.
        gradient_norm: Before clipping.
        is_finite: False when the norm was not: the step was then skipped, and neither weights nor
            moments nor statistics have changed.
        num_stop_votes: Workers that want to stop.
    """

    class_loss: Float[Tensor, ""]
    box_loss: Float[Tensor, ""]
    num_foreground: Float[Tensor, ""]
    gradient_norm: Float[Tensor, ""]
    is_finite: Tensor
    num_stop_votes: Float[Tensor, ""]


class TrainingStep:
    """Takes the steps of a training.

    Args:
        model: `RetinaNet`, plain or wrapped for data parallelism; in training mode when a step is
            taken.
        optimizer: From `make_optimizer`, over the model's parameters.
        loss: Matching and loss.
        clip_norm: Largest gradient norm; 0 = no clipping.
        autocast_dtype: Type of the convolutions; none = as the weights.
        accumulate: Parts of equal size that a worker's share goes through the network in, one after
            another; the gradient is that of the whole, unless a norm looks at the batch.
        scaler: Scale of the loss, for float16; none = 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        loss: LossSettings,
        clip_norm: float,
        autocast_dtype: torch.dtype | None,
        accumulate: int = 1,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._loss = loss
        self._clip_norm = clip_norm
        self._autocast_dtype = autocast_dtype
        self._accumulate = accumulate
        self._scaler = scaler
        self._statistics = RunningStatistics(model)

    def take(
        self,
        batch: Batch,
        *,
        anchors_xyxy: Float[Tensor, "A 4"],
        learning_rate: float,
        wants_stop: bool = False,
    ) -> StepResult:
        """Update the weights by one global batch.

        The loss is normalised by the foreground count of all parts and workers, and scaled so that
        the average which DistributedDataParallel takes over gradients is the gradient of the global
        loss.

        Args:
            batch: This worker's share, on the model's device.
            anchors_xyxy: Anchors of the batch's canvas.
            learning_rate: Rate of this step.
            wants_stop: This worker's vote; it travels with the foreground count.

        Returns:
            Losses as they were before the update.

        Raises:
            ValueError: If the images do not divide into `accumulate` parts.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        # Before the forward pass: no gradient is alive beside the activations.
        self._optimizer.zero_grad(set_to_none=True)
        parts = batch.split(self._accumulate)
        matches = [match_batch(anchors_xyxy, part, self._loss) for part in parts]
        total_foreground, num_stop_votes = _add_over_workers(matches, wants_stop=wants_stop)
        self._statistics.save()
        losses = [
            self._add_gradients(
                part, own, anchors_xyxy, total_foreground, is_last=part is parts[-1]
            )
            for part, own in zip(parts, matches, strict=True)
        ]
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        norm = self._clip_gradients()
        is_finite = torch.isfinite(norm)
        update_weights(self._optimizer, is_finite)
        self._statistics.restore_unless(is_finite)
        if self._scaler is not None:
            self._scaler.update()
        class_loss, box_loss = torch.stack(losses).sum(0).unbind()
        return StepResult(
            class_loss=class_loss,
            box_loss=box_loss,
            num_foreground=total_foreground,
            gradient_norm=norm,
            is_finite=is_finite,
            num_stop_votes=num_stop_votes,
        )

    def _add_gradients(
        self,
        part: Batch,
        matches: Int[Tensor, "N A"],
        anchors_xyxy: Float[Tensor, "A 4"],
        total_foreground: Float[Tensor, ""],
        *,
        is_last: bool,
    ) -> Float[Tensor, " losses"]:
        """Add the gradients of one part to what is there; gives its class and box loss."""
        device_type, dtype = part.images.device.type, self._autocast_dtype
        normaliser = total_foreground.clamp(min=1)
        with self._exchange_gradients(is_last):
            with torch.autocast(device_type, dtype=dtype, enabled=dtype is not None):
                outputs = self._model(part.images)
            sums = sum_losses(outputs, anchors_xyxy, part, matches, self._loss)
            losses = torch.stack((sums.class_sum, sums.box_sum)) / normaliser
            loss = (losses[0] + self._loss.box_weight * losses[1]) * _count_workers()
            torch.autograd.backward(loss if self._scaler is None else self._scaler.scale(loss))
        return losses.detach()

    def _exchange_gradients(self, is_last: bool) -> AbstractContextManager[None]:
        """Workers exchange their gradients once, with those of the last part."""
        if isinstance(self._model, DistributedDataParallel) and not is_last:
            return self._model.no_sync()
        return nullcontext()

    def _clip_gradients(self) -> Float[Tensor, ""]:
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        limit = self._clip_norm if self._clip_norm > 0 else float("inf")
        return torch.nn.utils.clip_grad_norm_(parameters, limit)


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
    """Take a single step; see `TrainingStep` and its `take`."""
    step = TrainingStep(
        model, optimizer, loss=settings, clip_norm=clip_norm, autocast_dtype=autocast_dtype
    )
    return step.take(batch, anchors_xyxy=anchors_xyxy, learning_rate=learning_rate)


def _count_workers() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _add_over_workers(
    matches: list[Int[Tensor, "N A"]], *, wants_stop: bool
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Foreground anchors of the global batch, and votes to stop, in one exchange."""
    own = torch.stack([count_foreground(part) for part in matches]).sum()
    both = torch.stack((own, torch.full_like(own, float(wants_stop))))
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(both)
    total_foreground, num_stop_votes = both.unbind()
    return total_foreground, num_stop_votes
