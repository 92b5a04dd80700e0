"""Optimizers whose update a flag on the device can turn off, and the loading of their state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

DEFAULT_MOMENTUM = 0.9
# How an optimizer computes is a matter of the machine, not of the training that is resumed.
_KERNEL_CHOICES = ("foreach", "fused")


def make_optimizer(
    model: nn.Module,
    *,
    kind: str,
    learning_rate: float,
    weight_decay: float,
    momentum: float = DEFAULT_MOMENTUM,
) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum; norms and biases do not decay.

    Args:
        model: Its trainable parameters are optimized; on its device, in its memory format.
        kind: `adamw` or `sgd`.
        learning_rate: Initial rate.
        weight_decay: Decay of weights with more than one dimension.
        momentum: Of `sgd`, in [0, 1).

    Raises:
        ValueError: If the kind is unknown.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    if kind != "sgd":
        raise ValueError(f"optimizer={kind!r}: expected 'adamw' or 'sgd'")
    optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, fused=True)
    if momentum > 0:
        # torch would make them, not initialised, in the first step, and a skipped first step does
        # not write to them. From zeros the first step is the same: 0.9 * 0 + gradient.
        for parameter in trainable:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def update_weights(optimizer: torch.optim.Optimizer, is_finite: Tensor) -> None:
    """Take the optimizer's step, or change nothing at all; the host does not learn which.

    Args:
        optimizer: From `make_optimizer`.
        is_finite: Whether the gradients are, a boolean on their device.

    Source: `found_inf` is how torch.amp.GradScaler talks to torch's fused optimizers.
    """
    fused: Any = optimizer
    fused.found_inf = count_skip(is_finite)
    try:
        optimizer.step()
    finally:
        del fused.found_inf


def count_skip(is_finite: Tensor) -> Tensor:
    """1.0 for a step that is skipped and 0.0 for one that is taken, as torch's kernels want it."""
    return torch.where(is_finite, 0.0, 1.0)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take over moments and settings, wherever and in whichever memory format they were saved.

    Args:
        optimizer: From `make_optimizer`.
        state: State dict of an optimizer of the same kind over the same parameters.

    Raises:
        ValueError: If it belongs to other parameters.
        KeyError: If it lacks a part.
    """
    groups = [
        {**saved, **{key: own[key] for key in _KERNEL_CHOICES}}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            # The fused kernels go through the memory of both, whatever their strides.
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter).copy_(value)
