"""What SIGTERM and Ctrl-C mean to a training's driver: first an orderly stop, then the end."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

logger = logging.getLogger(__name__)


class StopSignal:
    """The signal that this process got.

    Attributes:
        number: Of the first one; None before.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def note(self, number: int, _frame: FrameType | None) -> None:
        """Take in a signal; called by Python in the main thread.

        Raises:
            KeyboardInterrupt: At the second signal, if it is Ctrl-C.
            SystemExit: At the second signal otherwise.
        """
        if self.number is not None:
            end_process(number)
        # A lock may be held by the very code that this interrupts: only a plain value is written.
        self.number = number
        logger.warning(
            "%s: a checkpoint is kept after the present step; a second signal ends at once",
            signal.Signals(number).name,
        )


def end_process(number: int) -> NoReturn:
    """Leave as a program does that a signal ended.

    Raises:
        KeyboardInterrupt: For SIGINT.
        SystemExit: For any other, with 128 + its number.
    """
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


@contextmanager
def catch_signals() -> Iterator[StopSignal]:
    """Note SIGTERM and SIGINT while the block runs; in any thread but the main one do nothing."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    earlier = {
        number: signal.signal(number, stop.note) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            # None = what was installed by other means than Python.
            signal.signal(number, handler or signal.SIG_DFL)
