"""Sums of stage times, from one thread and from many."""

from __future__ import annotations

import threading

import pytest

from retinaray.inference import stage_times
from retinaray.inference.stage_times import STAGE_FIELDS, StageClock, StageTimes


def test_stage_times_add_field_by_field() -> None:
    one = StageTimes(1.0, 2.0, 3.0, 4.0, 5.0, 6)
    two = StageTimes(10.0, 20.0, 30.0, 40.0, 50.0, 60)
    assert one + two == StageTimes(11.0, 22.0, 33.0, 44.0, 55.0, 66)
    assert one + StageTimes() == one


def test_stage_fields_are_all_attributes_in_order() -> None:
    assert STAGE_FIELDS == (
        "fetch_s",
        "decode_s",
        "engine_s",
        "starved_s",
        "commit_s",
        "num_bytes",
    )


@pytest.mark.parametrize("stage", ["fetch", "decode", "engine", "starved", "commit"])
def test_stage_clock_measures_one_stage_only(
    stage: stage_times.Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([100.0, 102.5])
    monkeypatch.setattr(stage_times.time, "perf_counter", lambda: next(now))
    clock = StageClock()
    with clock.measure(stage):
        pass
    assert clock.times == StageTimes(**{f"{stage}_s": 2.5})  # type: ignore[arg-type]


def test_stage_clock_counts_the_time_of_what_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 5.0])
    monkeypatch.setattr(stage_times.time, "perf_counter", lambda: next(now))
    clock = StageClock()
    with pytest.raises(OSError, match="gone"), clock.measure("fetch"):
        raise OSError("gone")
    assert clock.times == StageTimes(fetch_s=4.0)


def test_stage_clock_counts_bytes_beside_seconds() -> None:
    clock = StageClock()
    clock.count_bytes(300)
    clock.count_bytes(0)
    clock.count_bytes(41)
    assert clock.times == StageTimes(num_bytes=341)


def test_stage_clock_keeps_what_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StageClock()
    clock.count_bytes(1)
    before = clock.times
    clock.count_bytes(2)
    assert (before.num_bytes, clock.times.num_bytes) == (1, 3)


def test_stage_clock_loses_nothing_when_many_threads_count() -> None:
    clock = StageClock()
    start = threading.Barrier(8)

    def count() -> None:
        start.wait()
        for _ in range(500):
            clock.count_bytes(1)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.times.num_bytes == 8 * 500
