"""Flags of the steps: read late, counted in a row, images named."""

from __future__ import annotations

import re

import pytest
import torch

from retinaray.training.signals import StepSignals
from retinaray.training.step import StepResult


def result_of(*, is_finite: bool = True, votes: float = 0.0) -> StepResult:
    zero = torch.tensor(0.0)
    return StepResult(
        class_loss=zero,
        box_loss=zero,
        num_foreground=zero,
        gradient_norm=zero,
        is_finite=torch.tensor(is_finite),
        num_stop_votes=torch.tensor(votes),
    )


def test_receive_reads_a_step_when_two_newer_ones_were_sent() -> None:
    signals = StepSignals(max_skipped_steps=9)
    seen = []
    for step, votes in enumerate([0.0, 3.0, 0.0, 0.0, 0.0], start=1):
        signals.send(result_of(votes=votes), step, ())
        signals.receive()
        seen.append(signals.must_stop)
    assert seen == [False, False, False, True, True]


def test_receive_reads_all_when_none_may_be_left() -> None:
    signals = StepSignals(max_skipped_steps=1)
    signals.send(result_of(is_finite=False), 1, (7,))
    signals.receive()
    assert not signals.has_diverged
    signals.receive(num_behind=0)
    assert signals.has_diverged


@pytest.mark.parametrize(
    ("steps", "has_diverged"),
    [("xxx", True), (".xxx", True), ("xx.xx", False), ("xx.xxx.", True), ("", False)],
)
def test_has_diverged_counts_skipped_steps_in_a_row(steps: str, has_diverged: bool) -> None:
    signals = StepSignals(max_skipped_steps=3)
    for number, kind in enumerate(steps, start=1):
        signals.send(result_of(is_finite=kind == "."), number, ())
        signals.receive(num_behind=0)
    assert signals.has_diverged == has_diverged


@pytest.mark.parametrize(
    ("carried", "steps", "count", "has_diverged"),
    [
        (1, "x", 2, False),
        (1, "xx", 3, True),
        (2, ".xx", 2, False),
        # More than are allowed now: the next such step is the one that can be named.
        (5, "", 5, False),
        (5, ".", 0, False),
        (5, "x", 6, True),
    ],
)
def test_has_diverged_counts_on_from_what_was_carried_over(
    carried: int, steps: str, count: int, has_diverged: bool
) -> None:
    signals = StepSignals(max_skipped_steps=3, num_skipped_in_a_row=carried)
    for number, kind in enumerate(steps, start=1):
        signals.send(result_of(is_finite=kind == "."), number, (number,))
    signals.receive(num_behind=0)
    assert (signals.num_skipped_in_a_row, signals.has_diverged) == (count, has_diverged)
    if has_diverged:
        last = f"{count} steps up to step {len(steps)} .*images: {len(steps)}"
        assert re.search(last, str(signals.describe_divergence()))


def test_describe_divergence_names_the_step_and_its_images() -> None:
    signals = StepSignals(max_skipped_steps=2)
    for step in (4, 5, 6):
        signals.send(result_of(is_finite=False), step, (f"a{step}", step))
    signals.receive(num_behind=0)
    text = str(signals.describe_divergence())
    assert text.startswith("no finite gradient in 2 steps up to step 5 (last images: a5, 5): ")
    assert "--max-skipped" in text
