"""Batches through a predictor, one after the other or one ahead where the predictor can do that."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from retinaray.detector.postprocess import Detections
from retinaray.inference.predictor import Predictor
from retinaray.inference.stage_times import StageClock


@runtime_checkable
class StreamPredictor(Protocol):
    """A predictor that takes the next batch in while it computes one."""

    def predict_batches(
        self, batches: Iterable[UInt8[Tensor, "N 3 H W"]]
    ) -> Iterator[list[Detections]]:
        """Detections of each batch, in order; a batch has at least one image."""
        ...


class HasImages(Protocol):
    """What goes through a predictor as one batch.

    Attributes:
        images: At most as many as the predictor takes at once; none = the predictor is not asked.
    """

    @property
    def images(self) -> UInt8[Tensor, "N 3 H W"] | None:
        """See above."""
        ...


Batch = TypeVar("Batch", bound=HasImages)


def predict_stream(
    predictor: Predictor, batches: Iterator[Batch], clock: StageClock
) -> Generator[tuple[Batch, list[Detections]], None, None]:
    """Detect in many batches.

    Args:
        predictor: The model; `predict_batches` is used if it has one.
        batches: Drawn as needed, by the thread that asks for the detections: with `predict_batches`
            one beyond the one whose detections are given, those without images not counted. The
            images must stay as they are until the detections have been given.
        clock: Counts the network's time as `engine`, without the time of drawing. Of a network that
            computes meanwhile it is the time that was spent on waiting for it.

    Yields:
        Each batch with the detections of its images in network pixels, on the CPU; in order.
    """
    if not isinstance(predictor, StreamPredictor):
        for batch in batches:
            found: list[Detections] = []
            if batch.images is not None:
                with clock.measure("engine"):
                    found = predictor.predict(batch.images)
            yield batch, found
        return
    yield from _predict_ahead(predictor, batches, clock)


def _predict_ahead(
    predictor: StreamPredictor, batches: Iterator[Batch], clock: StageClock
) -> Generator[tuple[Batch, list[Detections]], None, None]:
    under_way: deque[Batch] = deque()
    engine = ExitStack()
    stream = predictor.predict_batches(_feed(batches, under_way, engine, clock))
    try:
        while True:
            with engine:
                engine.enter_context(clock.measure("engine"))
                results = next(stream, None)
            while under_way and (results is None or under_way[0].images is None):
                yield under_way.popleft(), []
            if results is None:
                return
            yield under_way.popleft(), results
    finally:
        # It may hold the engine, which others wait for.
        if isinstance(stream, Generator):
            stream.close()


def _feed(
    batches: Iterator[Batch], under_way: deque[Batch], engine: ExitStack, clock: StageClock
) -> Iterator[UInt8[Tensor, "N 3 H W"]]:
    """Images for the engine; its time stands still while it has to wait for them."""
    engine.close()
    for batch in batches:
        under_way.append(batch)
        if batch.images is not None:
            engine.enter_context(clock.measure("engine"))
            yield batch.images
            engine.close()
    engine.enter_context(clock.measure("engine"))


class BatchMemory:
    """Memory for batches of canvases, used again and again.

    New memory would cost a page fault for every 4 KiB of each batch.

    Args:
        batch: Canvases per batch.
        canvas: Their height and width.
    """

    def __init__(self, batch: int, canvas: tuple[int, int]) -> None:
        self._shape = (batch, *canvas, 3)
        self._free: list[UInt8[np.ndarray, "N H W 3"]] = []

    def take(self) -> UInt8[np.ndarray, "N H W 3"]:
        """Room for a batch, holding anything."""
        return self._free.pop() if self._free else np.empty(self._shape, dtype=np.uint8)

    def give_back(self, memory: UInt8[np.ndarray, "N H W 3"]) -> None:
        """Nobody reads it any more."""
        self._free.append(memory)
