"""Batches of canvases from sources: loaded ahead, in order, errors in their places."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from retinaray.data.transforms import Placement
from retinaray.inference.batch_stream import BatchMemory
from retinaray.inference.canvas_loading import Canvas, DeviceCanvas, LoadedCanvas
from retinaray.inference.image_sources import (
    IMAGE_FAULTS,
    ImageResult,
    ImageSource,
    failed_result,
)
from retinaray.inference.stage_times import StageClock

# Batches that are fetched and decoded while the network works on one.
_BATCHES_AHEAD = 3

StartLoading = Callable[[ImageSource, Canvas], Future[LoadedCanvas] | Future[DeviceCanvas]]
"""Starts to load an image; it may use the array for the canvas, or not."""


@dataclass(frozen=True)
class CanvasBatch:
    """Some images in the order of their sources, and the canvases of those that could be loaded.

    Attributes:
        items: An error, or an image and where it lies on its canvas.
        memory: The canvases, those in front; the rest holds anything. None if there are none here.
        num_canvases: How many.
        on_device: The canvases, if the loader left them on the network's device.
    """

    items: tuple[ImageResult | tuple[ImageSource, Placement], ...]
    memory: UInt8[np.ndarray, "N H W 3"] | None
    num_canvases: int
    on_device: UInt8[Tensor, "n 3 H W"] | None = None

    @property
    def images(self) -> UInt8[Tensor, "n 3 H W"] | None:
        """The canvases, not copied: pixel by pixel in memory; none if there are none."""
        if self.memory is None:
            return self.on_device
        return torch.from_numpy(self.memory[: self.num_canvases]).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class _Entry:
    source: ImageSource
    memory: UInt8[np.ndarray, "N H W 3"]
    slot: Canvas
    loading: Future[LoadedCanvas] | Future[DeviceCanvas]


class CanvasBatches:
    """Iterates over batches.

    Args:
        sources: Images, consumed as needed; may be endless.
        start: Starts to load one.
        batch: Sources per batch, whether or not they can be loaded; the last one has fewer.
        ahead: Sources that are taken beyond the batch that was given last, at least a batch.
        canvas: Network height and width.
        clock: Counts the waiting for canvases as `starved`.
    """

    def __init__(
        self,
        sources: Iterable[ImageSource],
        start: StartLoading,
        *,
        batch: int,
        ahead: int,
        canvas: tuple[int, int],
        clock: StageClock,
    ) -> None:
        self._sources = iter(sources)
        self._start = start
        self._batch = batch
        self._ahead = ahead
        self._clock = clock
        self._memory = BatchMemory(batch, canvas)
        self._num_started = 0
        self._waiting: deque[_Entry] = deque()

    def __iter__(self) -> Iterator[CanvasBatch]:
        self._refill()
        while self._waiting:
            entries = [self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))]
            batch = self._settle(entries)
            self._refill()
            yield batch

    def recycle(self, batch: CanvasBatch) -> None:
        """Use a batch's memory for a later one: nobody reads it any more."""
        if batch.memory is not None:
            self._memory.give_back(batch.memory)

    def cancel(self) -> None:
        """What was asked for and has not begun need not begin."""
        for entry in self._waiting:
            entry.loading.cancel()

    def _refill(self) -> None:
        for source in islice(self._sources, self._ahead - len(self._waiting)):
            index = self._num_started % self._batch
            memory = self._memory.take() if index == 0 else self._waiting[-1].memory
            slot = memory[index]
            self._waiting.append(_Entry(source, memory, slot, self._start(source, slot)))
            self._num_started += 1

    def _settle(self, entries: list[_Entry]) -> CanvasBatch:
        """Wait for some images, and move their canvases together."""
        with self._clock.measure("starved"):
            for entry in entries:
                entry.loading.exception()
        memory = entries[0].memory
        items: list[ImageResult | tuple[ImageSource, Placement]] = []
        num_canvases = 0
        on_device: list[UInt8[Tensor, "3 H W"]] = []
        for index, entry in enumerate(entries):
            try:
                pixels, placement = entry.loading.result()
            except IMAGE_FAULTS as error:
                items.append(failed_result(entry.source, error))
                continue
            if isinstance(pixels, Tensor):
                on_device.append(pixels)
            elif pixels is not entry.slot or num_canvases != index:
                _copy_canvas(pixels, memory[num_canvases], entry.source)
            num_canvases += 1
            items.append((entry.source, placement))
        if num_canvases == 0 or on_device:
            # It may wait long behind a batch that is in the network, with others of its kind.
            self._memory.give_back(memory)
            return CanvasBatch(tuple(items), None, num_canvases, _stack_on_device(on_device))
        return CanvasBatch(tuple(items), memory, num_canvases)


def count_ahead(batch: int, threads: int) -> int:
    """How many canvases are made ready beyond the batch in the network."""
    # Small batches must not leave threads without work.
    return max(batch * _BATCHES_AHEAD, threads)


def _copy_canvas(pixels: Canvas, slot: Canvas, source: ImageSource) -> None:
    if pixels.shape != slot.shape or pixels.dtype != slot.dtype:
        raise ValueError(
            f"expected a canvas of {slot.shape}, {slot.dtype}, from the loader for {source.uri}, "
            f"got {pixels.shape}, {pixels.dtype}: make the loader for this network"
        )
    slot[:] = pixels


def _stack_on_device(canvases: list[UInt8[Tensor, "3 H W"]]) -> UInt8[Tensor, "n 3 H W"] | None:
    if not canvases:
        return None
    stacked = torch.stack(canvases)
    if stacked.is_cuda:
        # The network reads them on a stream of its own.
        torch.cuda.current_stream(stacked.device).synchronize()
    return stacked
