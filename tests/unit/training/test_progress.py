"""What a report says of the input: what it gives, what the step needs, how long it was waited."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from retinaray.data.input_cost import InputCost
from retinaray.training import progress
from retinaray.training.progress import ProgressWindow
from retinaray.training.step import StepResult

RESULT = StepResult(
    class_loss=torch.tensor(1.0),
    box_loss=torch.tensor(1.0),
    num_foreground=torch.tensor(8.0),
    gradient_norm=torch.tensor(1.0),
    is_finite=torch.tensor(True),
    num_stop_votes=torch.tensor(0.0),
)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of a window, to be moved by hand."""
    moment = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: moment[0])
    return moment


@pytest.fixture
def take_steps(now: list[float]) -> Callable[..., ProgressWindow]:
    """A window after steps: take_steps(waits_s, step_s, costs, world_size=1), 8 images each."""

    def take(
        waits_s: list[float],
        step_s: float,
        costs: list[InputCost | None],
        *,
        world_size: int = 1,
    ) -> ProgressWindow:
        window = ProgressWindow(batch=8, num_images=80, total_steps=10, world_size=world_size)
        for wait_s, cost in zip(waits_s, costs, strict=True):
            now[0] += wait_s
            window.note_arrival(cost)
            now[0] += step_s
            window.add(RESULT, ("a",) * 8)
        return window

    return take


def test_summarise_tells_what_the_input_gives_beside_what_the_step_needs(
    take_steps: Callable[..., ProgressWindow],
) -> None:
    cost = InputCost(num_images=4, wall_s=0.5, cpu_s=0.25, num_processes=3)
    report = take_steps([0.5, 1.5], 3.0, [cost, cost], world_size=2).summarise(2, 0.1)
    # 2 s of 8 waited; a worker's half of 16 images would have taken the other 6 s.
    assert report.wait_share == pytest.approx(0.25)
    assert report.images_per_s == pytest.approx(16 / 8)
    assert report.step_images_per_s == pytest.approx(8 / 6)
    # 8 images in 1 s by the clock of one process, in 0.5 s of a core.
    assert report.loader_images_per_s == pytest.approx(8.0)
    assert report.core_images_per_s == pytest.approx(16.0)
    assert report.num_loaders == 3


def test_summarise_begins_the_next_report_with_nothing(
    take_steps: Callable[..., ProgressWindow], now: list[float]
) -> None:
    window = take_steps([1.0], 1.0, [InputCost(8, 1.0, 1.0, 2)])
    window.summarise(1, 0.1)
    window.note_arrival(InputCost(8, 4.0, 2.0, 2))
    now[0] += 2.0
    window.add(RESULT, ("a",) * 8)
    report = window.summarise(2, 0.1)
    assert (report.wait_share, report.step_images_per_s) == (0.0, 4.0)
    assert (report.loader_images_per_s, report.core_images_per_s) == (2.0, 4.0)


@pytest.mark.parametrize("cost", [None, InputCost()], ids=["not handed over", "not measured"])
def test_summarise_says_nothing_of_an_input_that_was_not_measured(
    take_steps: Callable[..., ProgressWindow], cost: InputCost | None
) -> None:
    report = take_steps([1.0], 1.0, [cost]).summarise(1, 0.1)
    assert (report.loader_images_per_s, report.core_images_per_s) == (None, None)
    assert (report.wait_share, report.step_images_per_s, report.num_loaders) == (0.5, 8.0, 0)


def test_summarise_knows_no_need_when_all_time_was_waiting(
    take_steps: Callable[..., ProgressWindow],
) -> None:
    report = take_steps([2.0], 0.0, [None]).summarise(1, 0.1)
    assert (report.wait_share, report.step_images_per_s) == (1.0, None)
