"""Workers whose trial was stopped give their resources back by themselves.

Ray Tune stops a trial by ending its process. The Train run inside leaves its placement group
behind: Ray's own cleaner asks the dashboard whether the run still lives, which is absent on a
laptop, and cannot be asked where two clusters run on one machine. So the next trial would wait for
ever.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util import get_current_placement_group, remove_placement_group

logger = logging.getLogger(__name__)

_POLL_S = 1.0
# The run's controller ends with the trial's process, too; it must not see its workers end first and
# start others.
_GRACE_S = 1.0


def leave_when_abandoned(board: Any) -> None:
    """Watch the trial's mailbox from a thread of this worker; when it is gone, so are we.

    Args:
        board: An `EventBoard` that belongs to the trial's process and ends with it.
    """
    threading.Thread(target=_watch, args=(board,), name="abandonment", daemon=True).start()


def _watch(board: Any) -> None:
    while True:
        time.sleep(_POLL_S)
        try:
            ray.get(board.is_open.remote())
        except RayActorError:
            break
    time.sleep(_GRACE_S)
    group = get_current_placement_group()
    if group is not None:
        logger.warning("the trial of this worker has gone: its resources are given back")
        remove_placement_group(group)
