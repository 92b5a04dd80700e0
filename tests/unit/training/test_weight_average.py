"""The moving average of the weights: its ramp, its buffers, and steps that are skipped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from retinaray.artifact import ModelCard
from retinaray.detector.retinanet import RetinaNet
from retinaray.training.weight_average import WeightAverage


@pytest.fixture
def model(make_tiny_card: Callable[..., ModelCard], one_thread: None) -> RetinaNet:
    torch.manual_seed(0)
    model = make_tiny_card(norm="bn", head_depth=0).build_model()
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def test_weight_average_ramps_up_and_follows_the_formula(model: RetinaNet) -> None:
    average = WeightAverage(model, decay=0.3)
    key = "class_head.output.weight"
    parameter = model.class_head.output.weight
    start = average.values[key].clone()
    with torch.no_grad():
        parameter.fill_(1.0)
    average.update(model, 0)
    # (1 + 0) / (10 + 0) = 0.1 of the old value stays.
    torch.testing.assert_close(average.values[key], 0.1 * start + 0.9)
    first = average.values[key].clone()
    values = torch.arange(float(parameter.numel())).reshape(parameter.shape)
    with torch.no_grad():
        parameter.copy_(values)
    average.update(model, 2)
    # (1 + 2) / (10 + 2) = 0.25
    torch.testing.assert_close(average.values[key], 0.25 * first + 0.75 * values)
    second = average.values[key].clone()
    average.update(model, 90, is_finite=torch.tensor(True))
    # 91 / 100 is above the final decay 0.3.
    torch.testing.assert_close(average.values[key], 0.3 * second + 0.7 * values)
    assert not average.values[key].is_contiguous()


def test_weight_average_copies_counters_and_averages_buffers(model: RetinaNet) -> None:
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


def test_weight_average_stays_when_the_step_was_skipped(model: RetinaNet) -> None:
    average = WeightAverage(model, decay=0.9)
    with torch.no_grad():
        model.fpn.p6.weight.add_(1.0)
    average.update(model, 0)
    before = {key: value.clone() for key, value in average.values.items()}
    average.update(model, 1, is_finite=torch.tensor(False))
    assert all(torch.equal(value, before[key]) for key, value in average.values.items())
    assert not torch.equal(before["fpn.p6.weight"], model.fpn.p6.weight)
