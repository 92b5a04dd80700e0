"""What a batch costs, and what a process and a core therefore give."""

from __future__ import annotations

import time

from retinaray.data.input_cost import CostWatch, InputCost


def test_input_cost_adds_times_and_keeps_the_number_of_processes() -> None:
    costs = [InputCost(1, 0.5, 0.25, 4), InputCost(3, 1.5, 0.75, 4)]
    total = sum(costs, InputCost())
    assert total == InputCost(num_images=4, wall_s=2.0, cpu_s=1.0, num_processes=4)
    assert total.images_per_s == 2.0
    assert total.images_per_core_s == 4.0


def test_input_cost_gives_no_rate_when_nothing_was_measured() -> None:
    assert InputCost().images_per_s is None
    assert InputCost().images_per_core_s is None
    # A clock of the processor that ticks coarsely has seen nothing yet.
    assert InputCost(1, 0.5, 0.0).images_per_core_s is None


def test_cost_watch_tells_work_from_waiting() -> None:
    watch = CostWatch(2)
    end = time.thread_time() + 0.02
    while time.thread_time() < end:
        pass
    cost = watch.stop()
    assert (cost.num_images, cost.num_processes) == (1, 2)
    assert cost.wall_s >= cost.cpu_s - 1e-3
    assert 0.02 <= cost.cpu_s < 5
