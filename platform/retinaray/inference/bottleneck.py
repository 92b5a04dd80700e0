"""What holds a batch inference up: how busy each stage of its workers was, and what follows.

Knows numbers only. A worker has one engine, fed by threads that fetch and decode, and writes parts
beside it; times are sums over workers, of threads that wait as well as of threads that compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retinaray.inference.stage_times import StageTimes

BoundBy = Literal["start-up", "engine", "decode", "read", "commit", "hand-over"]

_ENOUGH_S = 5.0
# Waiting for locks and for Python costs some per cent: a stage at the limit never shows 100 %.
_BUSY = 0.8
_HALF = 0.5


@dataclass(frozen=True)
class WorkerPool:
    """What the workers of a run have.

    Attributes:
        num_workers: Processes, each with one engine.
        read_threads: Threads that fetch and decode, per worker; of several parts at once the sum.
        cores: Processors that the decoders of one worker can use; at least 1.
        has_gpu: Whether the engines run on GPUs; else they share the cores with the decoders.

    Raises:
        ValueError: If one of the numbers is not positive.
    """

    num_workers: int
    read_threads: int
    cores: float
    has_gpu: bool

    def __post_init__(self) -> None:
        if self.num_workers < 1 or self.read_threads < 1 or self.cores < 1:
            raise ValueError(
                f"expected at least one worker, thread and core, got {self}: pass what the plan of "
                "the run gives to one worker"
            )


@dataclass(frozen=True)
class StageLoad:
    """How busy the stages were, each a share of what its workers could have done, 0 to 1.

    Attributes:
        engine: Of the time, at least one batch was in the network.
        read: Of the reading threads' time, waiting for bytes. No processor works meanwhile.
        decode: Of the time of as many threads as can decode at once: one per core, if there are as
            many. Threads that wait for a core count as decoding, so 1 may mean any shortage.
        commit: Of the time, a part was being written, beside the engine or instead of it.
        starved: Of the time, the engine was idle and a part waited for its images.
        readers: Of the reading threads' time, fetching or decoding; the rest they had to wait for
            the engine, or had no part.
    """

    engine: float = 0.0
    read: float = 0.0
    decode: float = 0.0
    commit: float = 0.0
    starved: float = 0.0
    readers: float = 0.0

    @property
    def idle(self) -> float:
        """Share of the time in which the engine had nothing to do, for whatever reason."""
        return 1.0 - self.engine


@dataclass(frozen=True)
class Bottleneck:
    """What holds a run up.

    Attributes:
        stage: Where.
        text: The same with the figures, and what to do about it.
    """

    stage: BoundBy
    text: str


def measure_load(times: StageTimes, *, wall_s: float, pool: WorkerPool) -> StageLoad:
    """How busy each stage was.

    Args:
        times: Sums over all workers.
        wall_s: Seconds that these workers were at work, on average; their start does not count.
        pool: The workers.

    Returns:
        Shares; more than a stage could do, as rounding and threads gives it, counts as 1. All 0
        when no time has passed.

    Raises:
        ValueError: If wall_s is negative.
    """
    if wall_s < 0:
        raise ValueError(f"expected a time that passed, got wall_s={wall_s}: swap its ends")
    if wall_s == 0:
        return StageLoad()
    worker_s = wall_s * pool.num_workers
    engine = _share(times.engine_s, worker_s)
    return StageLoad(
        engine=engine,
        read=_share(times.fetch_s, worker_s * pool.read_threads),
        decode=_share(times.decode_s, worker_s * min(pool.read_threads, pool.cores)),
        commit=_share(times.commit_s, worker_s),
        # A part that waits for images while the engine has another part starves nobody.
        starved=min(_share(times.starved_s, worker_s), 1.0 - engine),
        readers=_share(times.fetch_s + times.decode_s, worker_s * pool.read_threads),
    )


def find_bottleneck(times: StageTimes, *, wall_s: float, pool: WorkerPool) -> Bottleneck:
    """What to change to make a run faster.

    The engine is meant to be the slowest stage. Where it idles instead, the reason is what it
    waited for most: images, the writing of parts, or the next part. Images come late because
    the processors cannot decode faster, or because threads wait for bytes; the first is no matter
    of threads and the second is none of processors.

    Args:
        times: Sums over all workers.
        wall_s: Seconds that these workers were at work, on average.
        pool: The workers.

    Returns:
        "start-up" before there are five seconds of each worker, whose first batches are slow.

    Raises:
        ValueError: If wall_s is negative.
    """
    load = measure_load(times, wall_s=wall_s, pool=pool)
    if wall_s < _ENOUGH_S:
        return Bottleneck("start-up", "start-up: not enough done yet")
    between = max(0.0, load.idle - load.starved - load.commit)
    waits_for_images = load.starved >= max(load.commit, between)
    # More engine is no help while decoders or readers are at their limit.
    is_input_full = waits_for_images and max(load.decode, load.readers) >= _BUSY
    if load.engine >= _BUSY or (load.engine > _HALF and not is_input_full):
        return Bottleneck("engine", _blame_engine(load, pool))
    if waits_for_images and max(load.decode, load.readers) >= _HALF:
        return _blame_input(times, load, pool)
    if not waits_for_images and load.commit >= between:
        return Bottleneck(
            "commit",
            f"commit-bound (engine {_percent(load.engine)} busy, parts being written "
            f"{_percent(load.commit)} of the time): the store of the output is slow; write fewer "
            "pictures, or add workers, which write beside each other",
        )
    return Bottleneck(
        "hand-over",
        f"hand-over-bound (engine idle {_percent(load.idle)} of the time, reading threads "
        f"{_percent(load.readers)} busy): work comes in pieces too small to keep it going; raise "
        "--part-size, or take fewer workers",
    )


def _blame_engine(load: StageLoad, pool: WorkerPool) -> str:
    busy = f"engine-bound (engine {_percent(load.engine)} busy"
    if pool.has_gpu:
        return f"{busy}): more workers or GPUs, an INT8 engine, a smaller canvas"
    # Their load is of as many threads as can decode at once; of the cores it may be less.
    of_cores = load.decode * min(pool.read_threads, pool.cores) / pool.cores
    return (
        f"{busy}, decoding takes up to {_percent(of_cores)} of the same cores): more machines or "
        "a GPU, an INT8 model, a smaller canvas"
    )


def _blame_input(times: StageTimes, load: StageLoad, pool: WorkerPool) -> Bottleneck:
    starved = f"engine starved {_percent(load.starved)} of the time"
    has_spare_cores = load.decode < _BUSY or pool.read_threads < pool.cores
    if load.decode >= _BUSY or times.decode_s >= times.fetch_s:
        remedy = (
            f"raise --read-threads ({pool.read_threads} threads for {pool.cores:g} cores now)"
            if has_spare_cores
            else "more cores per worker or more machines, smaller source images"
        )
        text = f"decode-bound ({starved}, decoders {_percent(load.decode)} busy): {remedy}"
        return Bottleneck("decode", text)
    rate = times.num_bytes / times.fetch_s / 1e6
    return Bottleneck(
        "read",
        f"read-bound ({starved}, reading threads {_percent(load.readers)} busy, {rate:.3g} MB/s "
        f"each): raise --read-threads ({pool.read_threads} threads now), or the store is slow",
    )


def _share(part_s: float, whole_s: float) -> float:
    return max(0.0, min(1.0, part_s / whole_s))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
