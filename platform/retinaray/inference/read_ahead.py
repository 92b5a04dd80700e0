"""Sequences read in background threads, several at once, and joined in their order."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import Generic, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")

_CHUNK = 256
_CHUNKS_AHEAD = 4


def chain_ahead(
    items: Iterable[Item],
    expand: Callable[[Item], Generator[Value, None, None]],
    *,
    threads: int,
) -> Iterator[Value]:
    """Join the sequences of all items, while those of the next items are read already.

    Args:
        items: Drawn as needed, at most one per thread ahead; may be endless.
        expand: The sequence of one item; runs in a thread of its own, up to about 1,300 values
            ahead of the caller.
        threads: Sequences that are read at once, at least 1.

    Yields:
        All values in the order of the items. What a sequence raises is raised in its place.
    """
    remaining = iter(items)
    waiting: deque[_Sequence[Value]] = deque()
    stopped = threading.Event()
    with ThreadPoolExecutor(threads, thread_name_prefix="read-ahead") as pool:

        def start(item: Item) -> _Sequence[Value]:
            return _Sequence(lambda: expand(item), pool, stopped)

        try:
            waiting.extend(start(item) for item in islice(remaining, threads))
            while waiting:
                yield from waiting[0].values()
                waiting.popleft()
                waiting.extend(start(item) for item in islice(remaining, 1))
        finally:
            # After an error, or when the caller wants no more, nobody may wait for a full queue.
            stopped.set()
            for sequence in waiting:
                sequence.abandon()


class _Sequence(Generic[Value]):
    """One sequence on its way from its thread to the caller."""

    def __init__(
        self,
        make: Callable[[], Generator[Value, None, None]],
        pool: ThreadPoolExecutor,
        stopped: threading.Event,
    ) -> None:
        self._chunks: queue.Queue[list[Value]] = queue.Queue(_CHUNKS_AHEAD)
        self._stopped = stopped
        self._reading: Future[None] = pool.submit(self._read, make)

    def values(self) -> Iterator[Value]:
        while chunk := self._chunks.get():
            yield from chunk
        self._reading.result()

    def abandon(self) -> None:
        """Make room until the thread has seen that it shall stop."""
        self._reading.cancel()
        while not self._reading.done():
            try:
                self._chunks.get(timeout=0.01)
            except queue.Empty:
                continue

    def _read(self, make: Callable[[], Generator[Value, None, None]]) -> None:
        chunk: list[Value] = []
        try:
            with closing(make()) as values:
                for value in values:
                    chunk.append(value)
                    if self._stopped.is_set():
                        return
                    if len(chunk) == _CHUNK:
                        self._chunks.put(chunk)
                        chunk = []
        finally:
            # What came before an error comes before it on the other side too; the future holds it.
            if chunk:
                self._chunks.put(chunk)
            self._chunks.put([])
