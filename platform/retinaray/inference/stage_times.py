"""Where the time of a worker goes: reading, decoding, the engine, writing, waiting for images."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

Stage = Literal["fetch", "decode", "engine", "starved", "commit"]


@dataclass(frozen=True)
class StageTimes:
    """Seconds spent in each stage; of stages with several threads the sum over the threads.

    Attributes:
        fetch_s: Waiting for the bytes of images.
        decode_s: From bytes to canvases.
        engine_s: In the network, thresholds and NMS included.
        starved_s: The engine had nothing to do, because no image was ready.
        commit_s: Writing parts.
        num_bytes: Bytes of the files that were read.
    """

    fetch_s: float = 0.0
    decode_s: float = 0.0
    engine_s: float = 0.0
    starved_s: float = 0.0
    commit_s: float = 0.0
    num_bytes: int = 0

    def __add__(self, other: StageTimes) -> StageTimes:
        mine, theirs = asdict(self), asdict(other)
        return StageTimes(**{key: mine[key] + theirs[key] for key in mine})


class StageClock:
    """Adds up times of many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[Stage, float] = dict.fromkeys(get_args(Stage), 0.0)
        self._num_bytes = 0

    @contextmanager
    def measure(self, stage: Stage) -> Iterator[None]:
        """Count the block's wall time for a stage, whether it raises or not."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.count(stage, time.perf_counter() - start)

    def count(self, stage: Stage, seconds: float) -> None:
        """Count time that was measured elsewhere."""
        with self._lock:
            self._seconds[stage] += seconds

    def count_bytes(self, number: int) -> None:
        """Count the length of a file that was read."""
        with self._lock:
            self._num_bytes += number

    @property
    def times(self) -> StageTimes:
        """What was counted so far."""
        with self._lock:
            seconds = {f"{stage}_s": value for stage, value in self._seconds.items()}
            return StageTimes(num_bytes=self._num_bytes, **seconds)


STAGE_FIELDS = tuple(field.name for field in fields(StageTimes))
"""Names of the attributes of `StageTimes`, in their order."""
