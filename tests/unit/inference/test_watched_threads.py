"""Threads that hang are let go: their task fails, another thread takes over, nobody waits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import retinaray
from retinaray.errors import ImageError, InferenceError, MissingFileError
from retinaray.inference.watched_threads import Watch, WatchedThreads

LONG_S = 600.0
SHORT_S = 0.05


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Ends whatever hangs; after the test no thread is left."""
    before = set(threading.enumerate())
    event = threading.Event()
    yield event
    event.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=60)
    assert set(threading.enumerate()) <= before


@pytest.fixture
def open_threads(release: threading.Event) -> Iterator[Callable[..., WatchedThreads]]:
    """Threads that are closed after the test: open_threads(2, max_seconds=..., max_hung=...)."""
    opened: list[WatchedThreads] = []

    def make(threads: int, *, max_seconds: float = LONG_S, max_hung: int = 4) -> WatchedThreads:
        opened.append(
            WatchedThreads(threads, name="watched", max_seconds=max_seconds, max_hung=max_hung)
        )
        return opened[-1]

    yield make
    release.set()
    for threads in opened:
        threads.close()


def hang(release: threading.Event, let_go: list[str]) -> Callable[[Watch], str]:
    def work(watch: Watch) -> str:
        with watch.limited(lambda: let_go.append("told")):
            assert release.wait(60)
        let_go.append("went on")
        return "late"

    return work


def test_submit_gives_what_tasks_give_and_raise(
    open_threads: Callable[..., WatchedThreads],
) -> None:
    def fail(_: Watch) -> int:
        raise KeyError("bug")

    threads = open_threads(3)
    doing = [threads.submit(lambda _, n=number: n * n) for number in range(50)]
    failing = threads.submit(fail)
    assert [future.result(60) for future in doing] == [number**2 for number in range(50)]
    with pytest.raises(KeyError, match="bug"):
        failing.result(60)


def test_submit_runs_as_many_tasks_at_once_as_there_are_threads(
    open_threads: Callable[..., WatchedThreads],
) -> None:
    threads, meeting = open_threads(3), threading.Barrier(3, timeout=60)
    # Any fewer at once, and the barrier breaks.
    doing = [threads.submit(lambda _: meeting.wait()) for _ in range(6)]
    assert sorted(future.result(60) for future in doing) == [0, 0, 1, 1, 2, 2]


def test_submit_drops_the_frames_of_faults_of_images(
    open_threads: Callable[..., WatchedThreads],
) -> None:
    def fail(_: Watch) -> int:
        try:
            raise OSError("below")
        except OSError as error:
            raise MissingFileError("a.jpg is not there") from error

    error = open_threads(1).submit(fail).exception(60)
    assert type(error) is MissingFileError
    assert str(error) == "a.jpg is not there"
    # They would keep the file and its pixels for as long as the error waits in the queue.
    assert error.__cause__ is error.__context__ is error.__traceback__ is None


@pytest.mark.parametrize("num_threads", [1, 3])
def test_limited_lets_go_of_the_thread_when_it_hangs(
    open_threads: Callable[..., WatchedThreads], release: threading.Event, num_threads: int
) -> None:
    let_go: list[str] = []
    threads = open_threads(num_threads, max_seconds=SHORT_S)
    hanging = threads.submit(hang(release, let_go))
    doing = [threads.submit(lambda _, n=number: n) for number in range(10)]
    with pytest.raises(ImageError, match=r"within 0\.05 s, it was not"):
        hanging.result(60)
    # All threads but the one that hangs are there for the others.
    assert [future.result(60) for future in doing] == list(range(10))
    threads.close()
    assert let_go == ["told"]
    assert not release.is_set()


def test_limited_does_not_count_what_is_outside(
    open_threads: Callable[..., WatchedThreads],
) -> None:
    waited = threading.Event()

    def work(watch: Watch) -> str:
        with watch.limited(lambda: None):
            pass
        # Longer than the limit, as a slow download would be.
        waited.wait(4 * SHORT_S)
        with watch.limited(lambda: None):
            return "done"

    assert open_threads(1, max_seconds=SHORT_S).submit(work).result(60) == "done"


def test_submit_fails_when_too_many_threads_hang(
    open_threads: Callable[..., WatchedThreads], release: threading.Event
) -> None:
    threads = open_threads(2, max_seconds=SHORT_S, max_hung=2)
    hanging = [threads.submit(hang(release, [])) for _ in range(3)]
    behind = [threads.submit(hang(release, [])) for _ in range(20)]
    for future in hanging:
        with pytest.raises(ImageError, match="drop the file"):
            future.result(60)
    errors = [future.exception(60) for future in behind]
    # One may have begun beside the third; the rest was never tried.
    assert all(isinstance(error, InferenceError) for error in errors[1:])
    # The third and the fourth may be found at once.
    assert re.search("at most 2 threads that hang, [34] of this process do", str(errors[-1]))
    with pytest.raises(InferenceError, match="restart the worker"):
        threads.submit(lambda _: 1).result(60)


def test_submit_goes_on_when_others_hang_elsewhere_in_the_process(
    open_threads: Callable[..., WatchedThreads], release: threading.Event
) -> None:
    first = open_threads(1, max_seconds=SHORT_S, max_hung=0)
    assert isinstance(first.submit(hang(release, [])).exception(60), ImageError)
    second = open_threads(1, max_seconds=SHORT_S, max_hung=0)
    assert second.submit(lambda _: 7).result(60) == 7


def test_close_cancels_what_has_not_begun(
    open_threads: Callable[..., WatchedThreads],
) -> None:
    threads, begun, go_on = open_threads(1), threading.Event(), threading.Event()

    def work(_: Watch) -> str:
        begun.set()
        assert go_on.wait(60)
        return "done"

    running, queued = threads.submit(work), threads.submit(work)
    assert begun.wait(60)
    closing = threading.Thread(target=threads.close)
    closing.start()
    while not queued.cancelled():
        time.sleep(0)
    go_on.set()
    closing.join(60)
    assert running.result(60) == "done"
    assert threads.submit(work).cancelled()


def test_interpreter_ends_while_a_thread_hangs() -> None:
    program = """
import threading
from retinaray.inference.watched_threads import WatchedThreads

def work(watch):
    with watch.limited(lambda: None):
        threading.Event().wait()

threads = WatchedThreads(1, name="w", max_seconds=0.05, max_hung=1)
raise SystemExit(7 if threads.submit(work).exception(60) else 8)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(retinaray.__path__[0]).parent)}
    ended = subprocess.run(
        [sys.executable, "-c", program], timeout=120, check=False, env=environment
    )
    assert ended.returncode == 7


@pytest.mark.parametrize(
    ("threads", "max_seconds", "max_hung"),
    [(0, 1.0, 1), (1, 0.0, 1), (1, float("nan"), 1), (1, 1.0, -1)],
)
def test_watched_threads_refuses_numbers_out_of_range(
    threads: int, max_seconds: float, max_hung: int
) -> None:
    with pytest.raises(ValueError, match=f"got {threads}, {max_seconds} and {max_hung}"):
        WatchedThreads(threads, name="w", max_seconds=max_seconds, max_hung=max_hung)
