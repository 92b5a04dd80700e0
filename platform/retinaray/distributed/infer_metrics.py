"""Prometheus series of a batch inference, one set per worker, exported by Ray's agent of its node.

Ray puts `ray_` before each name and serves them on the node's metrics port, also without a
dashboard; see `GET /api/prometheus/sd` of a dashboard, or `MetricsExportPort` in `ray.nodes()`.
"""

from __future__ import annotations

import threading

from retinaray.inference.run_pace import PartReport
from retinaray.inference.stage_times import STAGE_FIELDS

_TAGS = ("run_id", "backend")
# From a handful of small pictures to a part of large ones on one core.
_PART_SECONDS = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0]


class InferMetrics:
    """Counts what one worker did; made in the worker, and safe to use from several threads.

    A counter appears when there is something to count: without errors there is no series of them.

    Series, each with run_id, backend and Ray's own WorkerId:

    - retinaray_infer_images_total, _errors_total, _detections_total, _bytes_total;
    - retinaray_infer_stage_seconds_total, with stage: fetch, decode, engine, starved or commit;
    - retinaray_infer_part_seconds: histogram, from taking a part to its commitment. Its `_sum` is
      Ray's, which takes each part for the middle of its bucket (measured with 2.60);
    - retinaray_infer_images_per_s: since the end of the worker's previous part, images with errors
      included. It vanishes soon after the worker, its counters stay.

    Args:
        run_id: Of the run.
        backend: Runtime of the engine.
    """

    def __init__(self, run_id: str, backend: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        tags = {"run_id": run_id, "backend": backend}

        def count(name: str, text: str, *more: str) -> Counter:
            counter = Counter(f"retinaray_infer_{name}_total", text, (*_TAGS, *more))
            counter.set_default_tags(tags)
            return counter

        self._images = count("images", "Images with results")
        self._errors = count("errors", "Images that could not be read or decoded")
        self._detections = count("detections", "Boxes")
        self._bytes = count("bytes", "Bytes of image files that were read")
        self._stages = count("stage_seconds", "Seconds of all threads of a stage", "stage")
        self._part_s = Histogram(
            "retinaray_infer_part_seconds",
            "Seconds from taking a part to its commitment",
            boundaries=_PART_SECONDS,
            tag_keys=_TAGS,
        )
        self._part_s.set_default_tags(tags)
        self._rate = Gauge("retinaray_infer_images_per_s", "Speed of one worker", tag_keys=_TAGS)
        self._rate.set_default_tags(tags)
        self._last_end_s: float | None = None
        self._lock = threading.Lock()

    def count(self, report: PartReport) -> None:
        """Count a committed part."""
        counted = (
            (self._images, report.num_images),
            (self._errors, report.num_errors),
            (self._detections, report.num_detections),
            (self._bytes, report.times.num_bytes),
        )
        # A counter of Ray refuses to be raised by nothing.
        for counter, number in counted:
            if number > 0:
                counter.inc(number)
        for name in STAGE_FIELDS:
            seconds = getattr(report.times, name)
            if name.endswith("_s") and seconds > 0:
                self._stages.inc(seconds, {"stage": name.removesuffix("_s")})
        self._part_s.observe(report.seconds)
        self._set_rate(report)

    def _set_rate(self, report: PartReport) -> None:
        # Parts overlap in a worker: what counts is how soon one ends after the other.
        with self._lock:
            since_s = report.began_s if self._last_end_s is None else self._last_end_s
            if report.ended_s > since_s:
                self._rate.set(report.num_inputs / (report.ended_s - since_s))
                self._last_end_s = report.ended_s
