"""What the times of the stages say: shares, the stage that holds up, and the advice."""

from __future__ import annotations

import pytest

from retinaray.inference.bottleneck import StageLoad, WorkerPool, find_bottleneck, measure_load
from retinaray.inference.stage_times import StageTimes

# Two workers of eight reading threads on four cores, watched for 100 s: 200 s of engines, 1600 s of
# threads, 800 s of cores.
GPU = WorkerPool(num_workers=2, read_threads=8, cores=4, has_gpu=True)
CPU = WorkerPool(num_workers=2, read_threads=8, cores=4, has_gpu=False)


def test_measure_load_divides_by_what_each_stage_could_do() -> None:
    times = StageTimes(
        fetch_s=480, decode_s=400, engine_s=150, starved_s=30, commit_s=10, num_bytes=7
    )
    load = measure_load(times, wall_s=100, pool=GPU)
    assert load.engine == pytest.approx(0.75)  # 150 / (100 * 2)
    assert load.read == pytest.approx(0.30)  # 480 / (100 * 2 * 8)
    assert load.decode == pytest.approx(0.50)  # 400 / (100 * 2 * min(8, 4))
    assert load.commit == pytest.approx(0.05)  # 10 / (100 * 2)
    assert load.starved == pytest.approx(0.15)  # 30 / (100 * 2)
    assert load.readers == pytest.approx(0.55)  # (480 + 400) / (100 * 2 * 8)
    assert load.idle == pytest.approx(0.25)


def test_measure_load_counts_threads_not_cores_when_there_are_fewer_threads() -> None:
    pool = WorkerPool(num_workers=1, read_threads=2, cores=16, has_gpu=True)
    assert measure_load(StageTimes(decode_s=15), wall_s=10, pool=pool).decode == 0.75  # / (10 * 2)


def test_measure_load_stays_within_one_when_threads_queue_for_cores() -> None:
    # Eight threads always "decoding" on four cores: twice what four could do.
    load = measure_load(StageTimes(decode_s=1600, engine_s=201), wall_s=100, pool=GPU)
    assert (load.decode, load.engine) == (1.0, 1.0)


def test_measure_load_starves_nobody_while_the_engine_is_busy() -> None:
    # Two parts at once: each waits for images while the engine has the other.
    load = measure_load(StageTimes(engine_s=180, starved_s=150), wall_s=100, pool=GPU)
    assert load.starved == pytest.approx(0.1)


def test_measure_load_is_zero_when_no_time_passed() -> None:
    assert measure_load(StageTimes(engine_s=1), wall_s=0, pool=GPU) == StageLoad()


def test_measure_load_refuses_time_that_runs_back() -> None:
    with pytest.raises(ValueError, match=r"wall_s=-1"):
        measure_load(StageTimes(), wall_s=-1, pool=GPU)


@pytest.mark.parametrize("name", ["num_workers", "read_threads", "cores"])
def test_worker_pool_refuses_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        WorkerPool(
            **{"num_workers": 1, "read_threads": 1, "cores": 1, name: 0},  # type: ignore[arg-type]
            has_gpu=False,
        )


@pytest.mark.parametrize(
    ("times", "pool", "stage", "text"),
    [
        pytest.param(
            StageTimes(engine_s=186, starved_s=14, decode_s=700),
            GPU,
            "engine",
            "engine-bound (engine 93 % busy): more workers or GPUs, an INT8 engine, a smaller "
            "canvas",
            id="engine at its limit, although decoders are nearly",
        ),
        pytest.param(
            StageTimes(engine_s=186, starved_s=4, decode_s=160),
            CPU,
            "engine",
            # 160 s of 800 s of cores
            "engine-bound (engine 93 % busy, decoding takes up to 20 % of the same cores): more "
            "machines or a GPU, an INT8 model, a smaller canvas",
            id="engine that shares its cores",
        ),
        pytest.param(
            StageTimes(engine_s=120, starved_s=50, decode_s=300, fetch_s=400),
            GPU,
            "engine",
            "engine-bound (engine 60 % busy): more workers or GPUs, an INT8 engine, a smaller "
            "canvas",
            id="engine busy most of the time, and nothing else at its limit",
        ),
        pytest.param(
            StageTimes(engine_s=70, starved_s=124, decode_s=776, fetch_s=100),
            GPU,
            "decode",
            "decode-bound (engine starved 62 % of the time, decoders 97 % busy): more cores per "
            "worker or more machines, smaller source images",
            id="cores at their limit",
        ),
        pytest.param(
            StageTimes(engine_s=130, starved_s=66, decode_s=776, fetch_s=100),
            GPU,
            "decode",
            "decode-bound (engine starved 33 % of the time, decoders 97 % busy): more cores per "
            "worker or more machines, smaller source images",
            id="cores at their limit, although the engine is busy most of the time",
        ),
        pytest.param(
            # 8 of 16 cores can decode at once: 100 s * 2 * 8 = 1600 s
            StageTimes(engine_s=70, starved_s=124, decode_s=1520, fetch_s=40),
            WorkerPool(num_workers=2, read_threads=8, cores=16, has_gpu=True),
            "decode",
            "decode-bound (engine starved 62 % of the time, decoders 95 % busy): raise "
            "--read-threads (8 threads for 16 cores now)",
            id="fewer threads than cores",
        ),
        pytest.param(
            # 1400 + 150 of 1600 s; 2800 MB in 1400 s of threads
            StageTimes(engine_s=40, starved_s=150, decode_s=150, fetch_s=1400, num_bytes=2_800e6),  # type: ignore[arg-type]
            GPU,
            "read",
            "read-bound (engine starved 75 % of the time, reading threads 97 % busy, 2 MB/s each): "
            "raise --read-threads (8 threads now), or the store is slow",
            id="threads wait for bytes",
        ),
        pytest.param(
            StageTimes(engine_s=60, starved_s=20, commit_s=110),
            GPU,
            "commit",
            "commit-bound (engine 30 % busy, parts being written 55 % of the time): the store of "
            "the output is slow; write fewer pictures, or add workers, which write beside each "
            "other",
            id="writing instead of detecting",
        ),
        pytest.param(
            StageTimes(engine_s=190, commit_s=180),
            GPU,
            "engine",
            "engine-bound (engine 95 % busy): more workers or GPUs, an INT8 engine, a smaller "
            "canvas",
            id="writing beside detecting",
        ),
        pytest.param(
            StageTimes(engine_s=60, starved_s=100, fetch_s=160, decode_s=80),
            GPU,
            "hand-over",
            "hand-over-bound (engine idle 70 % of the time, reading threads 15 % busy): work comes "
            "in pieces too small to keep it going; raise --part-size, or take fewer workers",
            id="starved, but its readers idle",
        ),
        pytest.param(
            StageTimes(engine_s=60, starved_s=20, commit_s=20, fetch_s=800),
            GPU,
            "hand-over",
            "hand-over-bound (engine idle 70 % of the time, reading threads 50 % busy): work comes "
            "in pieces too small to keep it going; raise --part-size, or take fewer workers",
            id="no part in hand",
        ),
    ],
)
def test_find_bottleneck_names_the_stage_and_the_remedy(
    times: StageTimes, pool: WorkerPool, stage: str, text: str
) -> None:
    found = find_bottleneck(times, wall_s=100, pool=pool)
    assert (found.stage, found.text) == (stage, text)


def test_find_bottleneck_waits_for_five_seconds_of_work() -> None:
    busy = StageTimes(engine_s=10)
    assert find_bottleneck(busy, wall_s=4.9, pool=GPU).text == "start-up: not enough done yet"
    assert find_bottleneck(busy, wall_s=5.0, pool=GPU).stage == "engine"  # 10 / (5 * 2) = 1


def test_find_bottleneck_does_not_depend_on_the_number_of_workers_or_seconds() -> None:
    times = StageTimes(fetch_s=900, decode_s=300, engine_s=70, starved_s=110, num_bytes=10**9)
    ten = StageTimes(fetch_s=9000, decode_s=3000, engine_s=700, starved_s=1100, num_bytes=10**10)
    twenty = WorkerPool(num_workers=20, read_threads=8, cores=4, has_gpu=True)
    one = find_bottleneck(times, wall_s=100, pool=GPU)
    assert one.stage == "read"
    assert find_bottleneck(ten, wall_s=100, pool=twenty) == one
    assert find_bottleneck(ten, wall_s=1000, pool=GPU) == one
