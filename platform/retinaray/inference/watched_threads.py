"""Threads that work on tasks; one that takes too long is let go, and another takes its place.

A thread cannot be ended from outside. One that hangs is left to itself: its task has failed, nobody
waits for it, and the process can end without it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

from retinaray.errors import ImageError, InferenceError
from retinaray.inference.image_sources import IMAGE_FAULTS

Value = TypeVar("Value")

_HUNG_PREFIX = "hung-"


class Watch(Protocol):
    """What a task tells of itself."""

    def limited(self, when_let_go: Callable[[], object]) -> AbstractContextManager[None]:
        """A context whose block may take `max_seconds`; if it took longer, its end ends the thread.

        Args:
            when_let_go: Called by another thread as soon as the block takes longer.
        """
        ...


class _Worker:
    """One thread, as the others see it; all but `limited` with the lock held or when let go."""

    def __init__(self, lock: threading.Lock, max_seconds: float) -> None:
        self._lock = lock
        self._max_seconds = max_seconds
        self._when_let_go: Callable[[], object] = lambda: None
        self.deadline: float | None = None
        self.is_let_go = False
        self.future: Future[Any] | None = None

    @contextmanager
    def limited(self, when_let_go: Callable[[], object]) -> Iterator[None]:
        """See `Watch`."""
        with self._lock:
            self._when_let_go = when_let_go
            self.deadline = time.monotonic() + self._max_seconds
        try:
            yield
        finally:
            with self._lock:
                self.deadline = None
                if self.is_let_go:
                    # Ends this thread: nobody waits for it any more.
                    raise SystemExit

    def fail(self) -> None:
        """Tell who waits; without the lock, for what is called may need others."""
        self._when_let_go()
        if self.future is not None:
            self.future.set_exception(
                ImageError(
                    f"expected it to be decoded within {self._max_seconds:g} s, it was not: drop "
                    "the file, or allow more time"
                )
            )


class WatchedThreads:
    """Runs tasks in the order in which they came, several at once.

    Args:
        threads: Tasks at once, at least 1.
        name: Prefix of the threads' names.
        max_seconds: How long one limited block of a task may take, above 0.
        max_hung: Threads that may hang in this process at a time, at least 0. If one more does, all
            tasks of these threads fail.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(self, threads: int, *, name: str, max_seconds: float, max_hung: int) -> None:
        if threads < 1 or not max_seconds > 0 or max_hung < 0:
            raise ValueError(
                "expected threads >= 1, max_seconds > 0 and max_hung >= 0, got "
                f"{threads}, {max_seconds} and {max_hung}"
            )
        self._num_threads = threads
        self._name = name
        self._max_seconds = max_seconds
        self._max_hung = max_hung
        self._lock = threading.Lock()
        self._has_task = threading.Condition(self._lock)
        self._has_ended = threading.Condition(self._lock)
        self._tasks: deque[tuple[Future[Any], Callable[[Watch], Any]]] = deque()
        self._workers: dict[_Worker, threading.Thread] = {}
        self._num_idle = 0
        self._guard: threading.Thread | None = None
        self._is_closed = False
        self._failure: InferenceError | None = None

    def submit(self, work: Callable[[Watch], Value]) -> Future[Value]:
        """Have a task done.

        Args:
            work: Takes the watch, with which it marks what may take no longer than `max_seconds`.

        Returns:
            What it gives or raises; ImageError if it took too long. InferenceError if too many
            threads hang. Cancelled if this is closed before it has begun.
        """
        future: Future[Value] = Future()
        with self._lock:
            if self._is_closed:
                future.cancel()
            elif self._failure is not None:
                future.set_exception(self._failure)
            else:
                self._tasks.append((future, work))
                if len(self._tasks) > self._num_idle and len(self._workers) < self._num_threads:
                    self._start_worker()
                self._has_task.notify()
        return future

    def close(self) -> None:
        """Drop what has not begun, and wait for the rest, for those that hang up to the limit."""
        with self._lock:
            self._is_closed = True
            dropped, self._tasks = self._tasks, deque()
            threads = [*self._workers.values(), *([self._guard] if self._guard else [])]
            self._has_task.notify_all()
        for future, _ in dropped:
            future.cancel()
        with self._lock:
            self._has_ended.wait_for(lambda: not self._workers)
        for thread in threads:
            if not thread.name.startswith(_HUNG_PREFIX):
                thread.join()

    def _start_worker(self) -> None:
        """The caller holds the lock."""
        worker = _Worker(self._lock, self._max_seconds)
        # Daemons, because at its end the interpreter would wait for one that hangs.
        thread = threading.Thread(target=self._run, args=(worker,), name=self._name, daemon=True)
        self._workers[worker] = thread
        thread.start()
        if self._guard is None:
            name = f"{self._name}-guard"
            self._guard = threading.Thread(target=self._watch, name=name, daemon=True)
            self._guard.start()

    def _run(self, worker: _Worker) -> None:
        try:
            while (task := self._next_task(worker)) is not None:
                _do(*task, worker)
                # Else what it gave would live until the next one comes.
                del task
        except SystemExit:
            if not worker.is_let_go:
                raise

    def _next_task(self, worker: _Worker) -> tuple[Future[Any], Callable[[Watch], Any]] | None:
        with self._lock:
            self._num_idle += 1
            self._has_task.wait_for(lambda: self._tasks or self._is_closed)
            self._num_idle -= 1
            if self._tasks:
                return self._tasks.popleft()
            del self._workers[worker]
            self._has_ended.notify_all()
            return None

    def _watch(self) -> None:
        """Let go of whoever takes too long, until all have ended."""
        while True:
            with self._lock:
                now = time.monotonic()
                late = [w for w in self._workers if w.deadline is not None and w.deadline <= now]
                dropped = self._let_go(late)
                if self._is_closed and not self._workers:
                    break
                if not late:
                    deadlines = [w.deadline for w in self._workers if w.deadline is not None]
                    # A block that begins later than now ends later than this.
                    self._has_ended.wait(min([*deadlines, now + self._max_seconds]) - now)
            _tell(late, dropped, self._failure)
        _tell(late, dropped, self._failure)

    def _let_go(self, late: list[_Worker]) -> list[Future[Any]]:
        """Put others in their place, the lock held; gives the tasks that nobody will do."""
        for worker in late:
            worker.is_let_go = True
            thread = self._workers.pop(worker)
            thread.name = f"{_HUNG_PREFIX}{thread.name}"
            if not self._is_closed:
                self._start_worker()
        num_hung = sum(thread.name.startswith(_HUNG_PREFIX) for thread in threading.enumerate())
        dropped: list[Future[Any]] = []
        if late and num_hung > self._max_hung:
            self._failure = InferenceError(
                f"expected at most {self._max_hung} threads that hang, {num_hung} of this process "
                f"do: each has taken longer than {self._max_seconds:g} s to decode one image. Look "
                "at the images that failed for that reason, restart the worker, or allow more time"
            )
            dropped = [future for future, _ in self._tasks]
            self._tasks.clear()
        if late:
            self._has_ended.notify_all()
        return dropped


def _tell(late: list[_Worker], dropped: list[Future[Any]], failure: Exception | None) -> None:
    for worker in late:
        worker.fail()
    for future in dropped:
        future.set_exception(failure)


def _do(future: Future[Any], work: Callable[[Watch], Any], worker: _Worker) -> None:
    if not future.set_running_or_notify_cancel():
        return
    worker.future = future
    fault: BaseException
    try:
        value = work(worker)
    except IMAGE_FAULTS as error:
        # A copy, because an exception keeps the frames that it came from, and with them the file
        # and the pixels.
        fault = type(error)(*error.args)
    except BaseException as error:
        if worker.is_let_go:
            raise
        # Raised again where somebody waits for the future.
        fault = error
    else:
        worker.future = None
        future.set_result(value)
        return
    worker.future = None
    future.set_exception(fault)
