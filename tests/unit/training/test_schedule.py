"""The learning rate of single steps, by hand."""

from __future__ import annotations

import pytest

from retinaray.training.schedule import Schedule


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.02),  # 0.1 of the peak
        (1, 0.065),  # 0.1 + 0.9 * 1/4 = 0.325
        (3, 0.155),  # 0.1 + 0.9 * 3/4 = 0.775
        (4, 0.2),  # the peak itself
        (8, 0.2 * 0.505),  # half of the 8 steps after warm-up: 0.01 + 0.99 / 2
        (12, 0.002),  # 1 % at the end
        (20, 0.002),  # and after it
    ],
)
def test_rate_at_follows_warm_up_then_cosine(step: int, rate: float) -> None:
    schedule = Schedule(peak_lr=0.2, total_steps=12, warmup_steps=4)
    assert schedule.rate_at(step) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 1.0), (4, 1.0), (5, 0.5), (8, 0.5), (9, 0.25), (99, 0.25)]
)
def test_rate_at_falls_at_each_milestone_when_milestones(step: int, rate: float) -> None:
    schedule = Schedule(
        peak_lr=1.0, total_steps=20, kind="milestones", milestones=(5, 9), gamma=0.5
    )
    assert schedule.rate_at(step) == rate


def test_rate_at_counts_milestones_that_pass_during_warm_up() -> None:
    schedule = Schedule(
        peak_lr=1.0, total_steps=9, warmup_steps=4, kind="milestones", milestones=(2,), gamma=0.5
    )
    assert schedule.rate_at(3) == pytest.approx(0.1 + 0.9 * 3 / 4)
    assert schedule.rate_at(4) == 0.5


def test_rate_at_stays_defined_when_warm_up_fills_the_training() -> None:
    schedule = Schedule(peak_lr=1.0, total_steps=3, warmup_steps=3)
    assert [schedule.rate_at(step) for step in range(4)] == pytest.approx([0.1, 0.4, 0.7, 1.0])


def test_rate_at_never_rises_after_the_warm_up() -> None:
    schedule = Schedule(peak_lr=0.3, total_steps=1000, warmup_steps=100)
    rates = [schedule.rate_at(step) for step in range(100, 1001)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 0.3
