"""Whole images decoded ahead, in order, within a bound on their bytes.

No thread ever waits here for another one: an image is fetched, and decoded when there is room, in
two steps of work. So a process can end while nobody takes what was loaded. What lies in memory:

- compressed files: one per thread, of at most `ReadSettings.max_bytes`;
- decoded pixels: `TileSettings.max_bytes`, or one image if that is larger;
- in each thread that decodes, for that moment: as much as `estimate_decode_bytes` says, 3 to 20
  bytes per pixel of its image;
- for each thread that hangs: its file, and what decoding it takes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8

from retinaray.data.image_decoding import decode_image, read_image_size
from retinaray.inference.canvas_loading import ReadSettings, fetch_file
from retinaray.inference.image_sources import ImageSource
from retinaray.inference.stage_times import StageClock
from retinaray.inference.tiling import Tile, TileSettings, cut_tiles
from retinaray.inference.watched_threads import Watch, WatchedThreads

Value = TypeVar("Value")

_BYTES_PER_PIXEL = 3


@dataclass(eq=False)
class TiledImage:
    """One decoded image.

    Attributes:
        source: Which.
        height: Upright height in pixels.
        width: Upright width in pixels.
        tiles: Its tiles, at least one.
        pixels: Upright RGB, until the image is released. Smaller than the image only if that is
            one tile.
    """

    source: ImageSource
    height: int
    width: int
    tiles: tuple[Tile, ...]
    pixels: UInt8[np.ndarray, "h w 3"] | None


@dataclass(eq=False)
class _Order:
    """One image that somebody waits for.

    Attributes:
        source: Which.
        content: The file, once it has been fetched.
        size_bytes: Room for its pixels; none until the header has been read.
        loaded: The outcome.
    """

    source: ImageSource
    content: bytes | None = None
    size_bytes: int | None = None
    loaded: Future[TiledImage] = field(default_factory=Future)


class ImageLoader:
    """Fetches and decodes images in threads.

    Args:
        canvas: Network height and width: an image of one tile is decoded no larger than it needs.
        read: Gives the bytes at a URI; raises StorageError.
        settings: Threads, and the limits of decoding.
        tiling: Cutting, and the bound on memory.
        clock: Counts fetching and decoding.
    """

    def __init__(
        self,
        *,
        canvas: tuple[int, int],
        read: Callable[[str], bytes],
        settings: ReadSettings,
        tiling: TileSettings,
        clock: StageClock | None = None,
    ) -> None:
        self._canvas = canvas
        self._read = read
        self._settings = settings
        self._tiling = tiling
        self._clock = clock or StageClock()
        self._threads = WatchedThreads(
            settings.threads,
            name="load",
            max_seconds=settings.max_seconds,
            max_hung=settings.max_hung,
        )
        self._lock = threading.RLock()
        self._unfetched: deque[_Order] = deque()
        # Fetched or being fetched, and not let in to decoding; they are let in in their order.
        self._waiting: deque[_Order] = deque()
        self._num_open = 0
        self._used_bytes = 0
        self._is_closed = False

    def load(self, source: ImageSource) -> Future[TiledImage]:
        """Load an image when those before it have been.

        Whoever releases the images in this order gets all of them: the first one has room when
        nothing else is held.

        Returns:
            The image; or its ImageError or UnreadableFileError, or whatever else was raised;
            InferenceError if too many threads hang.
        """
        order = _Order(source)
        with self._lock:
            self._unfetched.append(order)
            self._go_on()
        return order.loaded

    def release(self, image: TiledImage) -> None:
        """Drop an image's pixels, and make room."""
        image.pixels = None
        with self._lock:
            self._used_bytes -= _size_bytes(image.height, image.width)
            self._go_on()

    def close(self) -> None:
        """Stop; what was not loaded never will be."""
        with self._lock:
            self._is_closed = True
        self._threads.close()

    def _go_on(self) -> None:
        """Start what has become possible; the caller holds the lock."""
        if self._is_closed:
            return
        while self._waiting and self._may_leave(self._waiting[0]):
            order = self._waiting.popleft()
            if order.content is None:
                self._num_open -= 1
            else:
                self._used_bytes += order.size_bytes or 0
                self._start(self._decode, order, self._end_decode)
        while self._unfetched and self._num_open < self._settings.threads:
            order = self._unfetched.popleft()
            self._num_open += 1
            self._waiting.append(order)
            self._start(self._fetch, order, self._end_fetch)

    def _start(
        self,
        work: Callable[[_Order, Watch], Value],
        order: _Order,
        end: Callable[[_Order, Future[Value]], None],
    ) -> None:
        doing = self._threads.submit(lambda watch: work(order, watch))
        # Whoever ends it: the thread that did it, or the one that let go of that.
        doing.add_done_callback(lambda done: None if done.cancelled() else end(order, done))

    def _may_leave(self, order: _Order) -> bool:
        """Whether an order that is first in the queue failed, or has a header and room."""
        if order.loaded.done():
            return True
        if order.size_bytes is None:
            return False
        has_room = self._used_bytes + order.size_bytes <= self._tiling.max_bytes
        return has_room or self._used_bytes == 0

    def _fetch(self, order: _Order, watch: Watch) -> tuple[bytes, int]:
        settings = self._settings
        content = fetch_file(
            order.source, self._read, max_bytes=settings.max_bytes, clock=self._clock
        )
        with self._clock.measure("decode"), watch.limited(lambda: None):
            size = read_image_size(content, max_pixels=settings.max_pixels)
        return content, _size_bytes(*size)

    def _end_fetch(self, order: _Order, fetching: Future[tuple[bytes, int]]) -> None:
        error = fetching.exception()
        with self._lock:
            if error is None:
                order.content, order.size_bytes = fetching.result()
            else:
                order.loaded.set_exception(error)
            self._go_on()

    def _decode(self, order: _Order, watch: Watch) -> TiledImage:
        with self._clock.measure("decode"), watch.limited(lambda: None):
            return self._decode_whole(order)

    def _end_decode(self, order: _Order, decoding: Future[TiledImage]) -> None:
        error = decoding.exception()
        with self._lock:
            if error is None:
                order.loaded.set_result(decoding.result())
            else:
                self._used_bytes -= order.size_bytes or 0
                order.loaded.set_exception(error)
            self._num_open -= 1
            self._go_on()

    def _decode_whole(self, order: _Order) -> TiledImage:
        assert order.content is not None
        height, width = read_image_size(order.content, max_pixels=self._settings.max_pixels)
        tiles = cut_tiles(height, width, self._tiling)
        # One tile is the whole image: it is decoded as it would be without tiles.
        fit_height, fit_width = self._canvas if len(tiles) == 1 else (None, None)
        decoded = decode_image(
            order.content,
            fit_height=fit_height,
            fit_width=fit_width,
            max_pixels=self._settings.max_pixels,
            allow_truncated=self._settings.allow_truncated,
        )
        return TiledImage(order.source, height, width, tiles, decoded.pixels)


def _size_bytes(height: int, width: int) -> int:
    return height * width * _BYTES_PER_PIXEL
