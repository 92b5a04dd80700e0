"""Events on their way from workers on any machine to the driver, and its orders on the way back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_POLL_S = 0.5


@dataclass(frozen=True)
class Orders:
    """What the driver wants of its workers.

    Attributes:
        is_stopping: Whether they shall keep a checkpoint after the present step, and end.
        num_checkpoints: How many checkpoints were asked for besides, since the run began.
    """

    is_stopping: bool
    num_checkpoints: int


class EventBoard:
    """A mailbox: workers post, the driver collects. Lives in an actor of its own."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._is_stopping = False
        self._num_checkpoints = 0
        self._reported_step = 0
        self._awaited_step: int | None = None

    def post(self, event: dict[str, Any]) -> None:
        """Leave an event."""
        self._events.append(event)
        kind = event.get("kind")
        if kind in ("running", "progress"):
            self._reported_step = int(event["step"])
        if self._awaited_step is None:
            return
        if kind == "running":
            # These workers began after the order, and take it for one to those before them.
            self.ask_for_checkpoint()
        elif kind == "checkpoint" and int(event["step"]) >= self._awaited_step:
            self._awaited_step = None

    def is_open(self) -> bool:
        """Answer, as long as the process that this mailbox belongs to is there."""
        return True

    def collect(self) -> list[dict[str, Any]]:
        """Take all events that were left since the last call."""
        events, self._events = self._events, []
        return events

    def ask_to_stop(self) -> None:
        """Leave the order to keep a checkpoint and to end."""
        self._is_stopping = True

    def ask_for_checkpoint(self) -> None:
        """Leave the order to keep a checkpoint and to go on."""
        self._num_checkpoints += 1
        self._awaited_step = self._reported_step

    def has_checkpoint(self) -> bool:
        """Whether one was kept since the last order, of the steps reported before it or later.

        One that was being written at the order can be older than that; it is not the one.
        """
        return self._awaited_step is None

    def read_orders(self) -> Orders:
        """What was asked for so far."""
        return Orders(self._is_stopping, self._num_checkpoints)


def stay_here() -> NodeAffinitySchedulingStrategy:
    """On this process's own node: a node that is lost takes its actors along, but not this one."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@contextmanager
def follow_events(handle: Callable[[dict[str, Any]], None]) -> Iterator[Any]:
    """Run a mailbox whose events reach `handle`, in a thread of the driver, while the block runs.

    Args:
        handle: Called with each event in the order of its posting; the rest is handled before the
            block ends.

    Yields:
        The actor to post to: `board.post.remote(event)`.
    """
    options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": stay_here()}
    board: Any = ray.remote(EventBoard).options(**options).remote()
    is_over = threading.Event()
    failures: list[BaseException] = []

    def poll() -> None:
        try:
            while not is_over.wait(_POLL_S):
                for event in ray.get(board.collect.remote()):
                    handle(event)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=poll, name="events", daemon=True)
    thread.start()
    try:
        yield board
    finally:
        is_over.set()
        thread.join()
        try:
            for event in [] if failures else ray.get(board.collect.remote()):
                handle(event)
        finally:
            ray.kill(board)
    if failures:
        raise failures[0]
