"""Exponential moving average of a network: the weights that are validated and kept."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from retinaray.detector.retinanet import RetinaNet
from retinaray.training.optimizer import count_skip


class WeightAverage:
    """Exponential moving average of a network's weights and buffers.

    Args:
        model: The network whose weights are averaged, on its device; its present values are the
            start.
        decay: Final decay in [0, 1); it ramps up with the steps, so that early weights are
            forgotten quickly.

    Source: the ramp is (1 + step) / (10 + step), as in TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: RetinaNet, *, decay: float) -> None:
        self._decay = decay
        self.values: dict[str, Tensor] = {
            key: value.detach().clone() for key, value in model.state_dict().items()
        }

    def update(self, model: RetinaNet, step: int, *, is_finite: Tensor | None = None) -> None:
        """Take in the weights after a step.

        Args:
            model: The network.
            step: The step, counted from 0.
            is_finite: Whether it was taken, a boolean on the device; where it was skipped, nothing
                changes. None = taken.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        averaged: list[Tensor] = []
        current: list[Tensor] = []
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                averaged.append(self._take(key, value))
                current.append(value.detach())
            else:
                self.values[key].copy_(value)
        # average += (1 - decay) * (weights - average), in one kernel that the flag can turn off:
        # SGD that climbs along the weights, with a weight decay of 1.
        torch._fused_sgd_(
            averaged,
            current,
            [],
            weight_decay=1.0,
            momentum=0.0,
            lr=1 - decay,
            dampening=0.0,
            nesterov=False,
            maximize=True,
            is_first_step=False,
            found_inf=None if is_finite is None else count_skip(is_finite),
        )

    def _take(self, key: str, value: Tensor) -> Tensor:
        """The average of one value, in its memory format: the kernel goes through both in order."""
        own = self.values[key]
        if own.stride() != value.stride():
            own = self.values[key] = torch.empty_like(value).copy_(own)
        return own

    def load(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Go on from saved averages."""
        for key, value in values:
            self.values[key].copy_(value)
