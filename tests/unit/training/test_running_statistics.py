"""Batch norms' statistics after steps that are skipped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from retinaray.training.running_statistics import RunningStatistics


@pytest.fixture
def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.GroupNorm(1, 2)
    )


@pytest.mark.parametrize("is_finite", [True, False])
def test_restore_unless_puts_statistics_back_when_the_step_is_not_finite(
    layers: nn.Sequential, is_finite: bool
) -> None:
    layers(torch.randn(4, 3, 5, 5))
    before = {key: value.clone() for key, value in layers.state_dict().items()}
    statistics = RunningStatistics(layers)
    statistics.save()
    layers(torch.full((4, 3, 5, 5), 2.0 if is_finite else torch.inf))
    statistics.restore_unless(torch.tensor(is_finite))
    after = layers.state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    names = ("running_mean", "running_var", "num_batches_tracked")
    expected = {f"{place}.{name}" for place in (0, 2) for name in names}
    assert changed == (expected if is_finite else set())
    assert after["0.num_batches_tracked"] == (2 if is_finite else 1)
    assert all(torch.isfinite(value).all() for value in after.values())


def test_restore_unless_leaves_norms_in_evaluation_alone(layers: nn.Sequential) -> None:
    statistics = RunningStatistics(layers.eval())
    statistics.save()
    layers[0].running_mean.fill_(5.0)
    statistics.restore_unless(torch.tensor(False))
    assert (layers[0].running_mean == 5.0).all()
