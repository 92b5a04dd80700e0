"""Memory that threads take in turns."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class ByteBudget:
    """Gives out bytes up to a bound, first come first served.

    A taker of more than the whole bound waits until nothing is taken, and is alone then.

    Args:
        max_bytes: The bound, at least 1.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        self._max_bytes = max_bytes
        self._used_bytes = 0
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def used_bytes(self) -> int:
        """What is taken now."""
        with self._changed:
            return self._used_bytes

    def take(self, num_bytes: int) -> Callable[[], None]:
        """Wait for room, and take it.

        Args:
            num_bytes: How much.

        Returns:
            Gives it back; a second call does nothing. Any thread may call it.
        """
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            self._changed.wait_for(lambda: self._queue[0] is ticket and self._has_room(num_bytes))
            self._queue.popleft()
            self._used_bytes += num_bytes
            # The next in the queue may fit beside this one.
            self._changed.notify_all()
        is_held = [True]

        def give_back() -> None:
            with self._changed:
                if is_held.pop() if is_held else False:
                    self._used_bytes -= num_bytes
                    self._changed.notify_all()

        return give_back

    def _has_room(self, num_bytes: int) -> bool:
        return self._used_bytes == 0 or self._used_bytes + num_bytes <= self._max_bytes
