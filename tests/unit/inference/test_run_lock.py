"""One driver per run, on nothing but "write if absent"."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from retinaray.errors import ClusterError, ConfigError, StorageError
from retinaray.inference.run_lock import STALE_S, RunLock
from retinaray.storage import Storage


class Clock:
    """A clock that moves when somebody sleeps."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.slept = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.slept += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make_lock(root: Path, clock: Clock) -> RunLock:
    return RunLock(str(root), Storage(), now=clock.now, sleep=clock.sleep)


def pretend_owner(root: Path, number: int, **changes: object) -> None:
    """Let the owner of a lock be somebody else."""
    path = root / "lock" / f"driver-{number:06}.json"
    owner = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps(owner), encoding="utf-8")


def test_held_leaves_nothing_behind(tmp_path: Path, clock: Clock) -> None:
    with make_lock(tmp_path, clock).held() as lock:
        assert (tmp_path / "lock" / "driver-000001.json").is_file()
        lock.check()
    assert list((tmp_path / "lock").iterdir()) == []
    assert clock.slept == 0


def test_acquire_refuses_at_once_when_the_owner_shows_life(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = make_lock(tmp_path, clock)
    owner.acquire()
    second = make_lock(tmp_path, clock)

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        owner.look()

    monkeypatch.setattr(second, "_sleep", sleep)
    with pytest.raises(ConfigError, match=rf"another driver is at work .* process {os.getpid()}"):
        second.acquire()
    assert clock.slept == 1.0
    owner.check()


def test_acquire_waits_for_a_silent_owner_elsewhere_and_takes_over(
    tmp_path: Path, clock: Clock
) -> None:
    lost = make_lock(tmp_path, clock)
    lost.acquire()
    pretend_owner(tmp_path, 1, host="another")
    winner = make_lock(tmp_path, clock)
    winner.acquire()
    assert STALE_S <= clock.slept <= STALE_S + 1
    assert sorted(path.name for path in (tmp_path / "lock").iterdir()) == [
        "driver-000002.beat",
        "driver-000002.json",
    ]
    lost.look()
    with pytest.raises(ClusterError, match="another driver took over this run"):
        lost.check()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_acquire_takes_over_at_once_when_the_owner_was_killed_here(
    tmp_path: Path, clock: Clock
) -> None:
    make_lock(tmp_path, clock).acquire()
    # The same process number, begun at another time: as after kill -9 and a new process.
    pretend_owner(tmp_path, 1, started="1")
    make_lock(tmp_path, clock).acquire()
    assert clock.slept == 0


def test_held_hands_on_what_ended_the_run_when_the_lock_cannot_be_removed(
    tmp_path: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lock = make_lock(tmp_path, clock)

    def refuse(uri: str) -> None:
        raise StorageError(f"cannot delete {uri}: the session token has expired")

    monkeypatch.setattr(Storage, "delete", lambda _, uri: refuse(uri))
    with pytest.raises(ClusterError, match="parts were not finished"), lock.held():
        raise ClusterError("2 of 4 parts were not finished")
    assert "could not be removed" in caplog.text
    monkeypatch.undo()
    # The lock is still there, and nobody's.
    assert (tmp_path / "lock" / "driver-000001.json").is_file()
    make_lock(tmp_path, clock).acquire()
    assert clock.slept == 0


def test_acquire_has_one_winner_when_two_meet(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_lock(tmp_path, clock), make_lock(tmp_path, clock)
    beat = second._beat

    def beat_after_the_other_was_faster() -> None:
        monkeypatch.setattr(second, "_beat", beat)
        first.acquire()
        beat()

    monkeypatch.setattr(second, "_beat", beat_after_the_other_was_faster)

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        first.look()

    monkeypatch.setattr(second, "_sleep", sleep)
    with pytest.raises(ConfigError, match="another driver is at work"):
        second.acquire()
    first.look()
    first.check()


def test_release_leaves_the_lock_of_the_driver_that_took_over(tmp_path: Path, clock: Clock) -> None:
    lost = make_lock(tmp_path, clock)
    lost.acquire()
    pretend_owner(tmp_path, 1, host="another")
    make_lock(tmp_path, clock).acquire()
    lost.release()
    assert (tmp_path / "lock" / "driver-000002.json").is_file()
