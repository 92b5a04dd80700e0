"""One engine for several threads: they read ahead beside each other, and take turns in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from retinaray.detector.postprocess import Detections
from retinaray.inference.predictor import Predictor


def share_predictor(predictor: Predictor) -> SharedPredictor:
    """The same predictor, safe to call from several threads at once.

    One that takes a stream of batches (`predict_batches`) still does: a stream keeps the engine to
    its end.
    """
    if hasattr(predictor, "predict_batches"):
        return _SharedStream(predictor)
    return SharedPredictor(predictor)


class SharedPredictor:
    """A predictor behind a lock, which knows how long the engine was at work.

    Args:
        predictor: The engine; nobody else may use it.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.backend = predictor.backend
        self.card = predictor.card
        self.canvas = predictor.canvas
        # Of what runs it; a stream reaches for more than the protocol.
        self._inner: Any = predictor
        self._lock = threading.Lock()
        self._busy_lock = threading.Lock()
        self._busy_s = 0.0

    def predict(self, images: UInt8[Tensor, "N 3 H W"]) -> list[Detections]:
        """Detections of each image; waits while another thread has the engine."""
        with self._lock:
            start = time.perf_counter()
            try:
                found: list[Detections] = self._inner.predict(images)
                return found
            finally:
                self._count(time.perf_counter() - start)

    def take_busy_s(self) -> float:
        """Seconds that the engine was at work since the last call, for whichever thread."""
        with self._busy_lock:
            busy_s, self._busy_s = self._busy_s, 0.0
            return busy_s

    def _count(self, seconds: float) -> None:
        with self._busy_lock:
            self._busy_s += seconds


class _SharedStream(SharedPredictor):
    def predict_batches(
        self, batches: Iterable[UInt8[Tensor, "N 3 H W"]]
    ) -> Iterator[list[Detections]]:
        """Detections batch by batch; what waits for the next batch does not count as work."""

        def pull() -> Iterator[UInt8[Tensor, "N 3 H W"]]:
            start = time.perf_counter()
            for images in batches:
                self._count(start - time.perf_counter())
                yield images
                start = time.perf_counter()
            self._count(start - time.perf_counter())

        with self._lock:
            start = time.perf_counter()
            for found in self._inner.predict_batches(pull()):
                self._count(time.perf_counter() - start)
                yield found
                start = time.perf_counter()
            self._count(time.perf_counter() - start)
