from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.util import get_current_placement_group, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from retinaray.distributed.abandonment import leave_when_abandoned
from retinaray.distributed.reporting import EventBoard

pytestmark = [pytest.mark.local_ray, pytest.mark.usefixtures("ray_cluster")]


@ray.remote(num_cpus=0)
class _Trial:
    """Owns a mailbox, and ends with it."""

    def __init__(self) -> None:
        self._board: Any = ray.remote(EventBoard).options(num_cpus=0).remote()

    def board(self) -> Any:
        return self._board


@ray.remote(num_cpus=1)
class _Worker:
    def watch(self, board: Any) -> bool:
        leave_when_abandoned(board)
        return get_current_placement_group() is not None


def test_leave_when_abandoned_gives_the_resources_back_when_the_trial_is_killed(
    wait_until: Callable[[Callable[[], object], str], None],
) -> None:
    group = placement_group([{"CPU": 1}])
    ray.get(group.ready())
    strategy = PlacementGroupSchedulingStrategy(placement_group=group)
    trial: Any = _Trial.remote()
    worker: Any = _Worker.options(scheduling_strategy=strategy).remote()
    assert ray.get(worker.watch.remote(ray.get(trial.board.remote())))
    assert placement_group_table(group)["state"] == "CREATED"
    ray.kill(trial)
    wait_until(
        lambda: placement_group_table(group)["state"] == "REMOVED", "the placement group's end"
    )
