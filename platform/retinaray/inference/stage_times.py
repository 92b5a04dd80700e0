"""Where the time of a worker goes: reading, decoding, the engine, writing, waiting for images."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Literal

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
        self._times = StageTimes()

    @contextmanager
    def measure(self, stage: Stage) -> Iterator[None]:
        """Count the block's wall time for a stage, whether it raises or not."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add(StageTimes(**{f"{stage}_s": time.perf_counter() - start}))  # type: ignore[arg-type]

    def count_bytes(self, number: int) -> None:
        """Count the length of a file that was read."""
        self._add(StageTimes(num_bytes=number))

    @property
    def times(self) -> StageTimes:
        """What was counted so far."""
        with self._lock:
            return self._times

    def _add(self, times: StageTimes) -> None:
        with self._lock:
            self._times = self._times + times


STAGE_FIELDS = tuple(field.name for field in fields(StageTimes))
"""Names of the attributes of `StageTimes`, in their order."""
