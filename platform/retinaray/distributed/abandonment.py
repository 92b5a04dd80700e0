"""Gives back what stopped trials leave behind.

Ray Tune stops a trial by ending its process, and everything inside ends with it except the
placement group of its Train run. Ray's own cleaner asks the dashboard whether the run still lives,
which is absent on a laptop, and cannot be asked where two clusters run on one machine. So the next
trial would wait for ever.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util import remove_placement_group

from retinaray.distributed.reporting import stay_here

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_ANSWER_S = 30.0


class Janitor:
    """Removes placement groups whose trial has gone. Lives in an actor of the sweep's driver."""

    def __init__(self) -> None:
        self._watched: dict[str, tuple[Any, Any]] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._watch_all, name="janitor", daemon=True).start()

    def watch(self, group: Any, board: Any) -> None:
        """Remove a placement group when its trial's mailbox has gone.

        Args:
            group: Placement group of a Train run's workers.
            board: An `EventBoard` that belongs to the trial's process and ends with it.
        """
        with self._lock:
            self._watched[group.id.hex()] = (group, board)

    def count(self) -> int:
        """How many are watched."""
        return len(self._watched)

    def _watch_all(self) -> None:
        while True:
            time.sleep(_POLL_S)
            with self._lock:
                watched = dict(self._watched)
            for name, (group, board) in watched.items():
                if not _is_there(board):
                    remove_placement_group(group)
                    with self._lock:
                        del self._watched[name]


def _is_there(board: Any) -> bool:
    try:
        return bool(ray.get(board.is_open.remote(), timeout=_ANSWER_S))
    except GetTimeoutError:
        return True
    except RayActorError:
        return False


def start_janitor() -> Any:
    """A janitor for one sweep; it ends with this process."""
    return ray.remote(Janitor).options(num_cpus=0, scheduling_strategy=stay_here()).remote()
