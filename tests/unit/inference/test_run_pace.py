"""Counts, rates and remaining time of a run, on a clock that the test moves."""

from __future__ import annotations

import json
import sys

import pytest

from retinaray.inference.bottleneck import WorkerPool
from retinaray.inference.run_pace import PartReport, RunPace
from retinaray.inference.stage_times import StageTimes

ONE = WorkerPool(num_workers=1, read_threads=4, cores=2, has_gpu=True)
TWO = WorkerPool(num_workers=2, read_threads=4, cores=2, has_gpu=True)


class _Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


def _report(
    began_s: float,
    ended_s: float,
    *,
    worker: str = "a:1",
    images: int = 10,
    errors: int = 0,
    times: StageTimes | None = None,
) -> PartReport:
    return PartReport(worker, began_s, ended_s, images, errors, 3 * images, times or StageTimes())


def test_run_pace_says_nothing_it_does_not_know_before_the_first_part(clock: _Clock) -> None:
    pace = RunPace(num_images=100, num_done=20, pool=ONE, clock=clock)
    clock.now_s += 30
    progress = pace.progress()
    assert (progress["num_finished"], progress["num_total"]) == (20, 100)
    assert progress["eta_s"] is None
    assert progress["bottleneck"]["stage"] == "start-up"
    assert pace.summary()["first_part_s"] is None
    assert pace.summary()["images_per_s"] == 0.0


def test_run_pace_estimates_the_rest_from_images_not_from_parts(clock: _Clock) -> None:
    pace = RunPace(num_images=1000, num_done=100, pool=TWO, clock=clock)
    # Engines take 50 s to load, then each worker does its own parts of 20 s.
    clock.now_s += 70
    pace.add(_report(500, 520, worker="a:1", images=38, errors=2))
    pace.add(_report(900, 920, worker="b:1", images=60))
    progress = pace.progress()
    # 100 inputs in 20 + 20 worker seconds, two workers: 5 img/s; 800 are left.
    assert progress["recent_images_per_s"] == pytest.approx(5.0)
    assert progress["eta_s"] == pytest.approx(160.0)
    assert progress["images_per_s"] == pytest.approx(100 / 70)
    assert progress["num_finished"] == 200
    assert progress["num_errors"] == 2


def test_run_pace_follows_the_last_minute_when_the_speed_changes(clock: _Clock) -> None:
    pace = RunPace(num_images=10_000, num_done=0, pool=ONE, clock=clock)

    def work(seconds: int, images: int) -> None:
        for _ in range(seconds // 2):
            clock.now_s += 2
            pace.add(_report(clock.now_s - 2, clock.now_s, images=images))

    work(600, images=20)  # 10 img/s, 6000 images
    assert pace.progress()["recent_images_per_s"] == pytest.approx(10)
    work(60, images=4)  # 2 img/s, 120 images
    progress = pace.progress()
    assert progress["recent_images_per_s"] == pytest.approx(2)
    assert progress["eta_s"] == pytest.approx((10_000 - 6120) / 2)
    assert progress["images_per_s"] == pytest.approx(6120 / 660)


def test_run_pace_sees_the_rate_behind_bursts_of_long_parts(clock: _Clock) -> None:
    # A part of 100 images each 300 s by each of eight workers: 8 * 100 / 300 img/s. They end 20 s
    # after each other, and then nobody does for 160 s.
    pool = WorkerPool(num_workers=8, read_threads=4, cores=2, has_gpu=True)
    pace = RunPace(num_images=100_000, num_done=0, pool=pool, clock=clock)
    rates = []
    for _ in range(12):
        clock.now_s += 140
        for worker in range(8):
            clock.now_s += 20
            pace.add(_report(clock.now_s - 300, clock.now_s, worker=f"a:{worker}", images=100))
            rates.append(pace.progress()["recent_images_per_s"])
    assert rates == [pytest.approx(8 / 3, rel=0.25)] * 96


def test_run_pace_takes_no_burst_for_a_rate_before_it_knows_better(clock: _Clock) -> None:
    pace = RunPace(num_images=1000, num_done=0, pool=TWO, clock=clock)
    for now_s, worker in ((10, "a:1"), (11, "b:1"), (20, "a:1"), (21, "b:1")):
        clock.now_s = 1000.0 + now_s
        pace.add(_report(now_s - 10, now_s, worker=worker))
    # Each worker does 1 img/s; from 10 to 21 s there came 30.
    assert pace.progress()["recent_images_per_s"] == pytest.approx(2.0)


def test_run_pace_slows_down_when_nothing_comes_any_more(clock: _Clock) -> None:
    pace = RunPace(num_images=1000, num_done=0, pool=ONE, clock=clock)
    for _ in range(10):
        clock.now_s += 1
        pace.add(_report(clock.now_s - 1, clock.now_s))
    before = pace.progress()["recent_images_per_s"]
    clock.now_s += 91
    # 90 images after the first report, in 9 + 91 s.
    assert before == pytest.approx(10.0)
    assert pace.progress()["recent_images_per_s"] == pytest.approx(0.9)


def test_run_pace_counts_a_worker_once_while_its_parts_overlap(clock: _Clock) -> None:
    pace = RunPace(num_images=100, num_done=0, pool=ONE, clock=clock)
    clock.now_s += 31
    pace.add(_report(0, 10, times=StageTimes(engine_s=9)))
    pace.add(_report(5, 20, times=StageTimes(engine_s=8)))
    pace.add(_report(15, 30, times=StageTimes(engine_s=7)))
    summary = pace.summary()
    assert summary["worker_s"] == 30  # from 0 to 30, not 10 + 15 + 15
    assert summary["utilisation"]["engine"] == 0.8  # 24 / 30
    assert summary["steady_images_per_s"] == 1.0


def test_run_pace_counts_the_same_in_any_order(clock: _Clock) -> None:
    reports = [_report(0, 10), _report(10, 20), _report(5, 9, worker="b:2"), _report(40, 50)]
    forth, back = (RunPace(num_images=100, num_done=0, pool=TWO, clock=clock) for _ in range(2))
    for report in reports:
        forth.add(report)
    for report in reversed(reports):
        back.add(report)
    assert forth.summary() == back.summary()
    assert forth.summary()["worker_s"] == 54  # 0 to 50 with the pause between parts, and 5 to 9


def test_run_pace_leaves_out_start_and_end_of_a_worker(clock: _Clock) -> None:
    pace = RunPace(num_images=100, num_done=0, pool=TWO, clock=clock)
    clock.now_s += 500  # one worker loads for long, the other ends early
    pace.add(_report(480, 500, worker="late:1", times=StageTimes(engine_s=19)))
    pace.add(_report(10, 30, worker="early:1", times=StageTimes(engine_s=19)))
    summary = pace.summary()
    assert summary["utilisation"]["engine"] == 0.95  # 38 of 40 worker seconds
    assert summary["bottleneck"]["stage"] == "engine"


def test_run_pace_explains_the_last_minute_while_it_runs_and_all_at_the_end(
    clock: _Clock,
) -> None:
    pace = RunPace(num_images=10**6, num_done=0, pool=ONE, clock=clock)

    def work(seconds: int, times: StageTimes) -> None:
        for _ in range(seconds):
            clock.now_s += 1
            pace.add(_report(clock.now_s - 1, clock.now_s, times=times))

    work(300, StageTimes(engine_s=1.0))
    work(70, StageTimes(engine_s=0.1, starved_s=0.9, fetch_s=3.9, num_bytes=100))
    assert pace.progress()["bottleneck"]["stage"] == "read"
    assert pace.progress()["utilisation"]["engine"] == pytest.approx(0.1)
    summary = pace.summary()
    assert summary["bottleneck"]["stage"] == "engine"
    assert summary["utilisation"]["engine"] == round((300 + 7) / 370, 3)


def test_run_pace_summary_holds_all_figures_and_is_json(clock: _Clock) -> None:
    pace = RunPace(num_images=100, num_done=50, pool=ONE, clock=clock)
    clock.now_s += 12
    times = StageTimes(8.0, 6.0, 9.0, 0.5, 0.25, 1234)
    pace.add(_report(3, 13, images=38, errors=2, times=times))
    clock.now_s += 8
    summary = pace.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary == {
        "seconds": 20.0,
        "first_part_s": 12.0,
        "num_parts": 1,
        "num_images": 38,
        "num_errors": 2,
        "num_detections": 114,
        "num_bytes": 1234,
        "images_per_s": 2.0,  # 40 / 20
        "steady_images_per_s": 4.0,  # 40 / 10
        "num_workers": 1,
        "worker_s": 10.0,
        "stage_s": {"fetch": 8.0, "decode": 6.0, "engine": 9.0, "starved": 0.5, "commit": 0.25},
        "utilisation": {
            "engine": 0.9,
            "read": 0.2,  # 8 / (10 * 4)
            "decode": 0.3,  # 6 / (10 * 2)
            "commit": 0.025,
            "starved": 0.05,
            "readers": 0.35,  # 14 / (10 * 4)
        },
        "bottleneck": {
            "stage": "engine",
            "text": "engine-bound (engine 90 % busy): more workers or GPUs, an INT8 engine, a "
            "smaller canvas",
        },
    }


def test_run_pace_keeps_no_more_for_more_parts(clock: _Clock) -> None:
    pace = RunPace(num_images=10**9, num_done=0, pool=TWO, clock=clock)

    def held_bytes() -> int:
        return sum(sys.getsizeof(value) + _length(value) for value in vars(pace).values())

    def work(count: int, every_s: float) -> None:
        for number in range(count):
            clock.now_s += every_s
            pace.add(_report(clock.now_s - 0.1, clock.now_s, worker=f"a:{number % 2}"))

    work(2000, 0.05)
    before = held_bytes()
    work(10_000, 0.005)
    assert held_bytes() <= before + 500


def _length(value: object) -> int:
    return 100 * len(value) if hasattr(value, "__len__") else 0


@pytest.mark.parametrize("num_done", [-1, 101])
def test_run_pace_refuses_more_done_than_there_is(num_done: int) -> None:
    with pytest.raises(ValueError, match=f"got {num_done}"):
        RunPace(num_images=100, num_done=num_done, pool=ONE)


def test_part_report_reads_a_receipt() -> None:
    row = {
        "part": 4,
        "worker": "node:17",
        "began": 10.0,
        "ended": 12.5,
        "num_images": 7,
        "num_errors": 1,
        "num_detections": 9,
        "fetch_s": 1.0,
        "decode_s": 2.0,
        "engine_s": 3.0,
        "starved_s": 4.0,
        "commit_s": 5.0,
        "num_bytes": 6,
        "failure": "",
    }
    report = PartReport.from_row(row)
    assert report.times == StageTimes(1.0, 2.0, 3.0, 4.0, 5.0, 6)
    assert (report.worker, report.seconds, report.num_inputs) == ("node:17", 2.5, 8)
    del row["engine_s"]
    with pytest.raises(KeyError, match="engine_s"):
        PartReport.from_row(row)
