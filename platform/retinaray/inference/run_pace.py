"""How fast a batch inference goes: counts, rates and times of stages from the reports of parts.

Knows neither Ray nor terminals. What it keeps grows with the number of workers, never with the
number of parts or images.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from retinaray.inference.bottleneck import WorkerPool, find_bottleneck, measure_load
from retinaray.inference.stage_times import STAGE_FIELDS, StageTimes

_RECENT_S = 60.0
# A window of less than some parts per worker sees bursts, not a rate.
_RECENT_PARTS = 4
_SAMPLES = 60


@dataclass(frozen=True)
class PartReport:
    """What a worker says of a part that it committed.

    Attributes:
        worker: Name of the process; another one after a restart.
        began_s: When it took the part, in seconds of its own clock.
        ended_s: When the part was committed, by the same clock.
        num_images: Images with results.
        num_errors: Images without.
        num_detections: Boxes.
        times: Seconds of each stage since the worker's last report.
    """

    worker: str
    began_s: float
    ended_s: float
    num_images: int
    num_errors: int
    num_detections: int
    times: StageTimes

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> PartReport:
        """Read a receipt: worker, began, ended, the counts and the fields of `StageTimes`.

        Raises:
            KeyError: If a column is missing.
        """
        return cls(
            worker=row["worker"],
            began_s=row["began"],
            ended_s=row["ended"],
            num_images=row["num_images"],
            num_errors=row["num_errors"],
            num_detections=row["num_detections"],
            times=StageTimes(**{name: row[name] for name in STAGE_FIELDS}),
        )

    @property
    def seconds(self) -> float:
        """From taking the part to its commitment."""
        return max(0.0, self.ended_s - self.began_s)

    @property
    def num_inputs(self) -> int:
        """Images that went in, whatever became of them."""
        return self.num_images + self.num_errors


@dataclass(frozen=True)
class _Sample:
    at_s: float
    num_inputs: int
    worker_s: float
    times: StageTimes


class RunPace:
    """Adds up the parts of one command, and tells how fast it is and why not faster.

    Args:
        num_images: Images of the run.
        num_done: Of these, finished by an earlier command.
        pool: The workers.
        clock: Seconds that never go back; another one in tests.

    Raises:
        ValueError: If num_done is not in [0, num_images].
    """

    def __init__(
        self,
        *,
        num_images: int,
        num_done: int,
        pool: WorkerPool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 <= num_done <= num_images:
            raise ValueError(
                f"expected num_done between 0 and num_images={num_images}, got {num_done}: count "
                "images, not parts"
            )
        self._total, self._resumed, self._pool, self._clock = num_images, num_done, pool, clock
        self._start_s = clock()
        self._first_part_s: float | None = None
        self._num_parts = self._num_images = self._num_errors = self._num_detections = 0
        self._part_s = 0.0
        self._times = StageTimes()
        # First begin and last end of each worker's parts. Parts overlap in a worker, so their
        # seconds do not add up to its time; and a worker that comes late, or has no part left,
        # does not count as idle.
        self._spans: dict[str, tuple[float, float]] = {}
        self._worker_s = 0.0
        self._samples: deque[_Sample] = deque()

    def add(self, report: PartReport) -> None:
        """Count a part."""
        now_s = self._clock()
        if self._first_part_s is None:
            self._first_part_s = now_s - self._start_s
        self._num_parts += 1
        self._num_images += report.num_images
        self._num_errors += report.num_errors
        self._num_detections += report.num_detections
        self._part_s += report.seconds
        self._times += report.times
        self._extend_span(report)
        self._sample(now_s)

    def progress(self) -> dict[str, Any]:
        """What a person wants to see now.

        Returns:
            num_total, num_finished (of earlier commands too), num_errors, images_per_s (since the
            start), recent_images_per_s (about the last minute), eta_s (None before the first part),
            utilisation and bottleneck as in `summary`, of about the last minute.
        """
        now_s = self._clock()
        since = self._samples[0] if len(self._samples) > 1 else None
        recent_per_s = self._recent_rate(since, now_s)
        num_left = self._total - self._resumed - self._num_inputs
        return {
            "num_total": self._total,
            "num_finished": self._resumed + self._num_inputs,
            "num_errors": self._num_errors,
            "images_per_s": self._overall_rate(now_s),
            "recent_images_per_s": recent_per_s,
            "eta_s": max(0, num_left) / recent_per_s if recent_per_s else None,
            **self._explain(since),
        }

    def summary(self) -> dict[str, Any]:
        """What this command did, for run.json; numbers of earlier commands are not in it.

        Returns:
            Counts (num_parts, num_images, num_errors, num_detections, num_bytes: all as read);
            seconds since the start; first_part_s until the first part was there (None when none
            was); images_per_s over all seconds and steady_images_per_s as with all workers at work,
            both of images with and without errors; worker_s and stage_s, sums over workers (of
            threads in fetch and decode); utilisation, shares of 0 to 1; bottleneck with stage and
            text.
        """
        now_s = self._clock()
        return {
            "seconds": round(now_s - self._start_s, 3),
            "first_part_s": None if self._first_part_s is None else round(self._first_part_s, 3),
            "num_parts": self._num_parts,
            "num_images": self._num_images,
            "num_errors": self._num_errors,
            "num_detections": self._num_detections,
            "num_bytes": self._times.num_bytes,
            "images_per_s": round(self._overall_rate(now_s), 3),
            "steady_images_per_s": round(self._steady_rate(), 3),
            "num_workers": self._pool.num_workers,
            "worker_s": round(self._worker_s, 3),
            "stage_s": {
                name.removesuffix("_s"): round(getattr(self._times, name), 3)
                for name in STAGE_FIELDS
                if name.endswith("_s")
            },
            **self._explain(None),
        }

    @property
    def _num_inputs(self) -> int:
        return self._num_images + self._num_errors

    def _extend_span(self, report: PartReport) -> None:
        before = self._spans.get(report.worker)
        first_s, last_s = before or (report.began_s, report.began_s)
        after = min(first_s, report.began_s), max(last_s, report.ended_s)
        self._spans[report.worker] = after
        self._worker_s += (after[1] - after[0]) - (last_s - first_s)

    def _sample(self, now_s: float) -> None:
        window_s = max(_RECENT_S, _RECENT_PARTS * self._part_s / self._num_parts)
        samples = self._samples
        # Of what comes at once the end counts, so that no burst lies half in the window.
        width_s = window_s / _SAMPLES
        if samples and now_s // width_s == samples[-1].at_s // width_s:
            samples.pop()
        samples.append(_Sample(now_s, self._num_inputs, self._worker_s, self._times))
        while len(samples) > 2 and samples[1].at_s <= now_s - window_s:
            samples.popleft()

    def _overall_rate(self, now_s: float) -> float:
        return _divide(self._num_inputs, now_s - self._start_s)

    def _steady_rate(self) -> float:
        return _divide(self._num_inputs * self._pool.num_workers, self._worker_s)

    def _recent_rate(self, since: _Sample | None, now_s: float) -> float:
        """Of the last minute; before there are some parts of each worker, as they were so far."""
        if since is None or self._num_parts < _RECENT_PARTS * self._pool.num_workers:
            return self._steady_rate()
        return _divide(self._num_inputs - since.num_inputs, now_s - since.at_s)

    def _explain(self, since: _Sample | None) -> dict[str, Any]:
        times, wall_s = self._times, self._worker_s / self._pool.num_workers
        recent_s = wall_s - since.worker_s / self._pool.num_workers if since else 0.0
        if since is not None and recent_s >= _RECENT_S / 2:
            times, wall_s = _subtract(times, since.times), recent_s
        load = measure_load(times, wall_s=wall_s, pool=self._pool)
        found = find_bottleneck(times, wall_s=wall_s, pool=self._pool)
        return {
            "utilisation": {
                field.name: round(getattr(load, field.name), 3) for field in fields(load)
            },
            "bottleneck": {"stage": found.stage, "text": found.text},
        }


def _subtract(times: StageTimes, earlier: StageTimes) -> StageTimes:
    return StageTimes(
        **{name: getattr(times, name) - getattr(earlier, name) for name in STAGE_FIELDS}
    )


def _divide(number: float, seconds: float) -> float:
    return number / seconds if seconds > 0 else 0.0
