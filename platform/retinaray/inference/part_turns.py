"""Parts that are worked on at once in one process, and the moments in which one must be alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class PartTurns:
    """Many parts share a process, except while one is suspected of ending it.

    A worker reads the next part while the engine still has the last one. A part whose earlier
    attempts ended their workers reads its images alone, so that a death has one cause only.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_sharing = 0
        self._num_waiting_alone = 0
        self._is_somebody_alone = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Work beside others; waits while somebody is alone, or wants to be."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._is_somebody_alone and self._num_waiting_alone == 0
            )
            self._num_sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_sharing -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Work when nobody else does; those who come meanwhile wait."""
        with self._changed:
            self._num_waiting_alone += 1
            self._changed.wait_for(lambda: not self._is_somebody_alone and self._num_sharing == 0)
            self._num_waiting_alone -= 1
            self._is_somebody_alone = True
        try:
            yield
        finally:
            with self._changed:
                self._is_somebody_alone = False
                self._changed.notify_all()
