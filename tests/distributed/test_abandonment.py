from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.util import get_current_placement_group, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from retinaray.distributed.abandonment import start_janitor
from retinaray.distributed.reporting import EventBoard

pytestmark = [pytest.mark.local_ray, pytest.mark.usefixtures("ray_cluster")]


@ray.remote(num_cpus=0)
class _Trial:
    """Owns a mailbox, a placement group and a worker, as a trial of a sweep does."""

    def start(self, janitor: Any) -> Any:
        self._board: Any = ray.remote(EventBoard).options(num_cpus=0).remote()
        self._group = placement_group([{"CPU": 1}])
        strategy = PlacementGroupSchedulingStrategy(placement_group=self._group)
        self._worker: Any = _Worker.options(scheduling_strategy=strategy).remote()
        ray.get(self._worker.report.remote(janitor, self._board))
        return self._group

    def finish(self) -> None:
        ray.kill(self._board)


@ray.remote(num_cpus=1)
class _Worker:
    def report(self, janitor: Any, board: Any) -> None:
        ray.get(janitor.watch.remote(get_current_placement_group(), board))


def _state(group: Any) -> str:
    return str(placement_group_table(group)["state"])


def test_janitor_gives_back_what_a_stopped_trial_held(
    wait_until: Callable[[Callable[[], object], str], None],
) -> None:
    janitor = start_janitor()
    trial: Any = _Trial.remote()
    group = ray.get(trial.start.remote(janitor))
    assert _state(group) == "CREATED"
    assert ray.get(janitor.count.remote()) == 1
    ray.kill(trial)
    wait_until(lambda: _state(group) == "REMOVED", "the placement group's end")
    wait_until(lambda: ray.get(janitor.count.remote()) == 0, "an empty list")
    ray.kill(janitor)


def test_janitor_leaves_a_running_trial_alone(
    wait_until: Callable[[Callable[[], object], str], None],
) -> None:
    janitor = start_janitor()
    gone: Any = _Trial.remote()
    running: Any = _Trial.remote()
    first, second = ray.get([gone.start.remote(janitor), running.start.remote(janitor)])
    ray.get(gone.finish.remote())
    wait_until(lambda: _state(first) == "REMOVED", "the end of the first placement group")
    assert _state(second) == "CREATED"
    assert ray.get(janitor.count.remote()) == 1
    for actor in (gone, running):
        ray.kill(actor)
    wait_until(lambda: _state(second) == "REMOVED", "the end of the second placement group")
    ray.kill(janitor)
