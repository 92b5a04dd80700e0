"""Optimizers: groups, torch's own arithmetic, steps that are skipped, state from elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retinaray.artifact import ModelCard
from retinaray.detector.retinanet import RetinaNet
from retinaray.training.optimizer import load_optimizer_state, make_optimizer, update_weights

KINDS = ["adamw", "sgd"]
TAKEN, SKIPPED = torch.tensor(True), torch.tensor(False)


@pytest.fixture
def model(make_tiny_card: Callable[..., ModelCard], one_thread: None) -> RetinaNet:
    torch.manual_seed(0)
    return make_tiny_card(head_depth=0).build_model().train()


def make_layers() -> nn.Sequential:
    """Two convolutions and a norm, in a memory format in which strides and shape disagree."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    return layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def set_gradients(layers: nn.Module, seed: int, *, is_finite: bool = True) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in layers.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.grad = torch.empty_like(parameter).copy_(
            values if is_finite else values * torch.nan
        )


def copy_all(layers: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [value.detach().clone() for value in (*layers.state_dict().values(), *moments)]


def test_make_optimizer_decays_only_weights_of_more_than_one_dimension(model: RetinaNet) -> None:
    optimizer = make_optimizer(model, kind="adamw", learning_rate=0.1, weight_decay=0.05)
    decaying, plain = optimizer.param_groups
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    norms_and_biases = {
        name
        for module_name, module in model.named_modules()
        for kind, parameter in module.named_parameters(recurse=False, prefix=module_name)
        for name in [names[id(parameter)]]
        if isinstance(module, nn.GroupNorm) or kind.endswith("bias")
    }
    assert {names[id(p)] for p in plain["params"]} == norms_and_biases
    assert {names[id(p)] for p in decaying["params"]} == set(names.values()) - norms_and_biases
    assert "backbone.body.bn1.weight" in norms_and_biases


def test_make_optimizer_leaves_frozen_parameters_out(model: RetinaNet) -> None:
    model.backbone.requires_grad_(False)
    optimizer = make_optimizer(model, kind="sgd", learning_rate=0.1, weight_decay=0.05)
    taken = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not taken & {id(p) for p in model.backbone.parameters()}
    trained = (model.fpn, model.class_head, model.box_head)
    assert taken == {id(p) for part in trained for p in part.parameters()}
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}


def test_make_optimizer_refuses_an_unknown_kind(model: RetinaNet) -> None:
    with pytest.raises(ValueError, match="optimizer='lion': expected 'adamw' or 'sgd'"):
        make_optimizer(model, kind="lion", learning_rate=0.1, weight_decay=0.0)


@pytest.mark.parametrize(
    ("kind", "momentum", "reference"),
    [
        ("adamw", 0.9, lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.05)),
        ("sgd", 0.9, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05)),
        ("sgd", 0.5, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, weight_decay=0.05)),
        ("sgd", 0.0, lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05)),
    ],
)
def test_update_weights_agrees_with_torchs_plain_loop_when_memory_is_channels_last(
    kind: str, momentum: float, reference: Callable[[Any], torch.optim.Optimizer]
) -> None:
    ours, theirs = make_layers(), make_layers()
    optimizer = make_optimizer(
        ours, kind=kind, learning_rate=0.1, weight_decay=0.05, momentum=momentum
    )
    weights = [p for p in theirs.parameters() if p.ndim > 1]
    others = [p for p in theirs.parameters() if p.ndim <= 1]
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    plain = reference([{**group, "foreach": False} for group in groups])
    for seed in range(4):
        set_gradients(ours, seed)
        set_gradients(theirs, seed)
        update_weights(optimizer, TAKEN)
        plain.step()
    for parameter, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)
    assert not ours[0].weight.is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skipped", [{0}, {1}, {3}, {0, 1}])
def test_update_weights_leaves_no_trace_of_a_skipped_step(kind: str, skipped: set[int]) -> None:
    layers, shorter = make_layers(), make_layers()
    optimizer, other = (
        make_optimizer(part, kind=kind, learning_rate=0.1, weight_decay=0.05)
        for part in (layers, shorter)
    )
    for seed in range(5):
        is_finite = seed not in skipped
        set_gradients(layers, seed, is_finite=is_finite)
        before = copy_all(layers, optimizer)
        update_weights(optimizer, TAKEN if is_finite else SKIPPED)
        if is_finite:
            set_gradients(shorter, seed)
            update_weights(other, TAKEN)
        elif seed:
            for value, expected in zip(copy_all(layers, optimizer), before, strict=True):
                assert torch.equal(value, expected)
    for value, expected in zip(copy_all(layers, optimizer), copy_all(shorter, other), strict=True):
        assert torch.equal(value, expected)
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("kind", KINDS)
def test_load_optimizer_state_takes_moments_that_another_machine_saved(kind: str) -> None:
    # There: not fused, and the weights in the usual memory format.
    there = make_layers().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    saved = make_optimizer(there, kind=kind, learning_rate=0.1, weight_decay=0.05)
    for group in saved.param_groups:
        group["fused"], group["foreach"] = None, True
    here = make_layers()
    optimizer = make_optimizer(here, kind=kind, learning_rate=0.1, weight_decay=0.05)
    for seed in range(2):
        set_gradients(there, seed)
        saved.step()
    load_optimizer_state(optimizer, copy.deepcopy(saved.state_dict()))
    here.load_state_dict(there.state_dict())
    for layers, own in ((there, saved), (here, optimizer)):
        set_gradients(layers, 7)
        own.step() if own is saved else update_weights(own, TAKEN)
    assert here[0].weight.stride() != there[0].weight.stride()
    for parameter, expected in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)
    assert [group["fused"] for group in optimizer.param_groups] == [True, True]
