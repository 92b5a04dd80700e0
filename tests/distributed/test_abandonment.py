from __future__ import annotations

from collections.abc import Callable, Iterator
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


@pytest.fixture
def janitor() -> Iterator[Any]:
    """A janitor of this test."""
    actor = start_janitor()
    yield actor
    ray.kill(actor)


@pytest.fixture
def make_trial() -> Iterator[Callable[[], Any]]:
    """Trials that end with the test, whatever becomes of it: others need their processors."""
    trials: list[Any] = []

    def make() -> Any:
        trials.append(_Trial.remote())
        return trials[-1]

    yield make
    for trial in trials:
        ray.kill(trial)


def test_janitor_gives_back_what_a_stopped_trial_held(
    janitor: Any,
    make_trial: Callable[[], Any],
    wait_until: Callable[[Callable[[], object], str], None],
) -> None:
    trial = make_trial()
    group = ray.get(trial.start.remote(janitor))
    assert _state(group) == "CREATED"
    assert ray.get(janitor.count.remote()) == 1
    ray.kill(trial)
    wait_until(lambda: _state(group) == "REMOVED", "the placement group's end")
    wait_until(lambda: ray.get(janitor.count.remote()) == 0, "an empty list")


def test_janitor_leaves_a_running_trial_alone(
    janitor: Any,
    make_trial: Callable[[], Any],
    wait_until: Callable[[Callable[[], object], str], None],
) -> None:
    gone, running = make_trial(), make_trial()
    first, second = ray.get([gone.start.remote(janitor), running.start.remote(janitor)])
    ray.get(gone.finish.remote())
    wait_until(lambda: _state(first) == "REMOVED", "the end of the first placement group")
    # The group goes before the janitor's note of it.
    wait_until(lambda: ray.get(janitor.count.remote()) == 1, "one trial to watch")
    assert _state(second) == "CREATED"
    for actor in (gone, running):
        ray.kill(actor)
    wait_until(lambda: _state(second) == "REMOVED", "the end of the second placement group")
