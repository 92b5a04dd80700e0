"""One optimizer step: parameter groups, averages, and batches whose loss is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from retinaray.artifact import ModelCard
from retinaray.data.batching import Batch
from retinaray.detector.box_coding import encode_boxes
from retinaray.detector.retinanet import RetinaNet
from retinaray.training.step import (
    LossSettings,
    WeightAverage,
    compute_loss_sums,
    make_optimizer,
    take_step,
)

BOX = torch.tensor([[10.0, 10.0, 34.0, 34.0]])


@pytest.fixture
def model(make_tiny_card: Callable[..., ModelCard], one_thread: None) -> RetinaNet:
    torch.manual_seed(0)
    return make_tiny_card(head_depth=0).build_model().train()


def step_once(
    model: RetinaNet,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    clip_norm: float = 0.0,
    settings: LossSettings | None = None,
) -> Any:
    return take_step(
        model,
        optimizer,
        batch,
        anchors_xyxy=model.anchors_for(batch.images),
        settings=settings or LossSettings(),
        learning_rate=0.01,
        clip_norm=clip_norm,
        autocast_dtype=None,
    )


def test_compute_loss_sums_are_torchvisions_focal_loss_and_l1_when_one_box(
    make_batch: Callable[..., Batch],
) -> None:
    # Three anchors: one that is the box, one with IoU 0.45 (ignored), one far away (background).
    anchors = torch.tensor([[10.0, 10, 34, 34], [10, 10, 34, 20.8], [60, 40, 84, 64]])
    batch = make_batch([BOX])
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 3, generator=generator)
    deltas = torch.randn(1, 3, 4, generator=generator)
    sums = compute_loss_sums(logits, deltas, anchors, batch, LossSettings())
    target = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    expected = sigmoid_focal_loss(logits[0, [0, 2]], target, alpha=0.25, gamma=2, reduction="sum")
    assert sums.class_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    offsets = encode_boxes(BOX[0], anchors[0])
    assert sums.box_sum.item() == pytest.approx((deltas[0, 0] - offsets).abs().sum().item())
    assert sums.num_foreground.item() == 1


def test_take_step_normalises_by_the_foreground_count_and_takes_the_rate(
    model: RetinaNet, make_batch: Callable[..., Batch]
) -> None:
    batch = make_batch([BOX, BOX + 20, torch.zeros(0, 4)])
    with torch.no_grad():
        logits, deltas = model(batch.images)
        sums = compute_loss_sums(
            logits, deltas, model.anchors_for(batch.images), batch, LossSettings()
        )
    optimizer = make_optimizer(model, kind="sgd", learning_rate=1.0, weight_decay=0.0)
    result = step_once(model, optimizer, batch)
    assert sums.num_foreground > 2
    assert result.num_foreground == sums.num_foreground
    assert result.class_loss.item() == pytest.approx(
        (sums.class_sum / sums.num_foreground).item(), rel=1e-5
    )
    assert result.box_loss.item() == pytest.approx(
        (sums.box_sum / sums.num_foreground).item(), rel=1e-5
    )
    assert result.is_finite
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


def test_take_step_moves_weights_against_the_gradient_when_sgd(
    model: RetinaNet, make_batch: Callable[..., Batch]
) -> None:
    bias = model.box_head.output.bias
    before = bias.detach().clone()
    optimizer = make_optimizer(model, kind="sgd", learning_rate=1.0, weight_decay=0.1)
    step_once(model, optimizer, make_batch([BOX]))
    assert bias.grad.abs().max() > 0
    # Rate 0.01, no momentum yet, and biases do not decay.
    torch.testing.assert_close(bias.detach(), before - 0.01 * bias.grad)


def test_take_step_is_finite_when_no_image_has_a_box(
    model: RetinaNet, make_batch: Callable[..., Batch]
) -> None:
    optimizer = make_optimizer(model, kind="adamw", learning_rate=1.0, weight_decay=0.05)
    result = step_once(model, optimizer, make_batch([torch.zeros(0, 4)] * 2))
    assert result.is_finite
    assert result.num_foreground == 0
    assert result.box_loss == 0
    assert result.class_loss > 0


def test_take_step_clips_the_norm_but_reports_it_unclipped(
    model: RetinaNet, make_batch: Callable[..., Batch]
) -> None:
    optimizer = make_optimizer(model, kind="sgd", learning_rate=1.0, weight_decay=0.0)
    result = step_once(model, optimizer, make_batch([BOX]), clip_norm=0.01)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert result.gradient_norm > 0.1
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("clip_norm", [0.0, 10.0])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_take_step_keeps_weights_finite_when_the_loss_is_infinite(
    model: RetinaNet, make_batch: Callable[..., Batch], kind: str, clip_norm: float
) -> None:
    optimizer = make_optimizer(model, kind=kind, learning_rate=0.01, weight_decay=0.0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = LossSettings(box_weight=float("inf"))
    result = step_once(model, optimizer, make_batch([BOX]), clip_norm=clip_norm, settings=settings)
    assert not result.is_finite
    for key, value in model.state_dict().items():
        # No decay, no momentum yet: a step with zero gradients moves nothing.
        assert torch.equal(value, before[key]), key
    assert step_once(model, optimizer, make_batch([BOX]), clip_norm=clip_norm).is_finite
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


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
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    optimizer = make_optimizer(model, kind="sgd", learning_rate=0.1, weight_decay=0.05)
    taken = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not taken & {id(p) for p in model.backbone.parameters()}
    assert taken == {
        id(p)
        for p in [
            *model.fpn.parameters(),
            *model.class_head.parameters(),
            *model.box_head.parameters(),
        ]
    }
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}


def test_make_optimizer_refuses_an_unknown_kind(model: RetinaNet) -> None:
    with pytest.raises(ValueError, match="optimizer='lion': expected 'adamw' or 'sgd'"):
        make_optimizer(model, kind="lion", learning_rate=0.1, weight_decay=0.0)


def test_weight_average_ramps_up_and_follows_the_formula(
    make_tiny_card: Callable[..., ModelCard],
) -> None:
    model = make_tiny_card(norm="bn", head_depth=0).build_model()
    average = WeightAverage(model, decay=0.3)
    key = "class_head.output.bias"
    parameter = model.class_head.output.bias
    with torch.no_grad():
        parameter.fill_(1.0)
    start = average.values[key].clone()
    average.update(model, 0)
    # (1 + 0) / (10 + 0) = 0.1 of the old value stays.
    torch.testing.assert_close(average.values[key], 0.1 * start + 0.9)
    first = average.values[key].clone()
    with torch.no_grad():
        parameter.fill_(2.0)
    average.update(model, 2)
    # (1 + 2) / (10 + 2) = 0.25
    torch.testing.assert_close(average.values[key], 0.25 * first + 0.75 * 2.0)
    second = average.values[key].clone()
    average.update(model, 90)
    # 91 / 100 is above the final decay 0.3.
    torch.testing.assert_close(average.values[key], 0.3 * second + 0.7 * 2.0)


def test_weight_average_copies_counters_and_averages_buffers(
    make_tiny_card: Callable[..., ModelCard],
) -> None:
    model = make_tiny_card(norm="bn", head_depth=0).build_model()
    average = WeightAverage(model, decay=0.9)
    model.backbone.body.bn1.num_batches_tracked.fill_(5)
    model.backbone.body.bn1.running_mean.fill_(1.0)
    average.update(model, 0)
    assert average.values["backbone.body.bn1.num_batches_tracked"] == 5
    torch.testing.assert_close(
        average.values["backbone.body.bn1.running_mean"], torch.full((64,), 0.9)
    )


def test_weight_average_does_not_share_memory_with_the_network(model: RetinaNet) -> None:
    average = WeightAverage(model, decay=0.9)
    before = average.values["fpn.p6.bias"].clone()
    with torch.no_grad():
        model.fpn.p6.bias.add_(1.0)
    assert torch.equal(average.values["fpn.p6.bias"], before)
