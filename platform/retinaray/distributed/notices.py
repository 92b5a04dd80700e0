"""What tells a training worker that it shall stop, or that a checkpoint is wanted now.

The driver's orders come from the `EventBoard`; the end of a machine comes as SIGTERM to the worker,
or as a node that Ray drains. A thread asks, so that no step waits for an answer.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context

from retinaray.distributed.reporting import Orders

logger = logging.getLogger(__name__)

_ASK_S = 0.5
_ANSWER_S = 30.0
# Until a machine that was given notice is gone, its steps are kept so often.
_NOTICE_PERIOD_S = 20.0
# Where it is known when that will be, once more so long before: what comes later may not be written
# in time.
_LAST_S = 15.0

# Set by the process's main thread, read by the training's.
_terminated = threading.Event()


class NoticeOnSigterm(WorkerCallback):
    """Makes the first SIGTERM to a worker a notice instead of its end; the second ends it.

    Spot machines and `ray stop` send it some seconds before they kill.
    """

    def after_init_train_context(self) -> None:
        """Install the handler; Ray calls this in the main thread of each worker."""
        if threading.current_thread() is not threading.main_thread():
            return
        # None = what was installed by other means than Python.
        earlier = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

        def note(number: int, _frame: FrameType | None) -> None:
            signal.signal(number, earlier)
            _terminated.set()

        signal.signal(signal.SIGTERM, note)


def measure_time_left() -> float | None:
    """Seconds until a machine of this group of workers is gone; infinite when that is not known.

    None without notice of it, which is SIGTERM to this process, or a node that Ray drains.
    """
    # Ray's public call asks all workers at once and waits for the slowest.
    preemption = get_train_context().preemption_context.preemption_info
    if preemption is not None and preemption.deadline_ms is not None:
        return float(preemption.deadline_ms / 1000 - time.time())
    return math.inf if _terminated.is_set() or preemption is not None else None


class NoticeWatch:
    """Says after each step whether a checkpoint is wanted now.

    Args:
        read_orders: Asks the driver; None on workers that leave that to rank 0.
        measure_left: Seconds until the machine is gone; None without notice.
        period_s: So long after a checkpoint the next is wanted, though nobody asks.
        clock: Seconds.
    """

    def __init__(
        self,
        read_orders: Callable[[], Orders] | None,
        *,
        measure_left: Callable[[], float | None] = measure_time_left,
        period_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read_orders = read_orders
        self._measure_left = measure_left
        self._period_s = period_s
        self._clock = clock
        self._orders = Orders(is_stopping=False, num_checkpoints=0)
        self._num_served: int | None = None
        self._served_notice_s: float | None = None
        self._last_kept_s = clock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._ask_again, name="notices", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def close(self) -> None:
        """Ask no more."""
        self._is_over.set()

    @property
    def is_stopping(self) -> bool:
        """Whether the driver wants the training to end."""
        return self._orders.is_stopping

    def wants_checkpoint(self) -> bool:
        """Whether one is wanted: by the driver, by the clock, or by a machine that is to go."""
        if self._orders.is_stopping or self._orders.num_checkpoints > (self._num_served or 0):
            return True
        if self._clock() - self._last_kept_s >= self._period_s:
            return True
        left_s = self._measure_left()
        if left_s is None:
            return False
        if self._served_notice_s is None:
            return True
        passed_s = self._clock() - self._served_notice_s
        return passed_s >= _NOTICE_PERIOD_S or passed_s > _LAST_S - left_s >= 0

    def note_checkpoint(self) -> None:
        """What was wanted up to now has been done."""
        self._num_served = self._orders.num_checkpoints
        self._last_kept_s = self._clock()
        if self._measure_left() is not None:
            if self._served_notice_s is None:
                logger.warning("this training's machine is about to go: a checkpoint is kept")
            self._served_notice_s = self._clock()

    def ask(self) -> None:
        """Ask the driver once."""
        if self._read_orders is None:
            return
        orders = self._read_orders()
        if self._num_served is None:
            # What was asked of an earlier group of workers was for them.
            self._num_served = orders.num_checkpoints
        self._orders = orders

    def _ask_again(self) -> None:
        while not self._is_over.wait(_ASK_S):
            try:
                self.ask()
            except RayError as error:
                # Without its driver this process is about to be ended by Ray.
                logger.info("the driver does not answer: %s", error)
                return


def ask_board(board: Any) -> Callable[[], Orders]:
    """What reads the orders on an `EventBoard`."""

    def read() -> Orders:
        orders: Orders = ray.get(board.read_orders.remote(), timeout=_ANSWER_S)
        return orders

    return read
