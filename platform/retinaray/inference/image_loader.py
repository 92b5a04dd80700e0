"""Whole images decoded ahead, in order, within a bound on their bytes.

No thread ever waits here for another one: an image is fetched, and decoded when there is room, in
two steps of work. So a process can end while nobody takes what was loaded. What lies in memory:

- compressed files: one per thread;
- decoded pixels: `TileSettings.max_bytes`, or one image if that is larger;
- in each thread that decodes, for that moment: nothing else for an upright JPEG, four times the
  image for PNG and turned photos, six and a half times for WebP (measured at 8000 x 4504).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8

from retinaray.data.image_decoding import decode_image, read_image_size
from retinaray.inference.pipeline import ImageSource, ReadSettings
from retinaray.inference.tiling import Tile, TileSettings, cut_tiles

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
    """

    def __init__(
        self,
        *,
        canvas: tuple[int, int],
        read: Callable[[str], bytes],
        settings: ReadSettings,
        tiling: TileSettings,
    ) -> None:
        self._canvas = canvas
        self._read = read
        self._settings = settings
        self._tiling = tiling
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="load")
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
            The image; or its ImageError or UnreadableFileError, or whatever else was raised.
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
        self._pool.shutdown(cancel_futures=True)

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
                self._pool.submit(self._decode, order)
        while self._unfetched and self._num_open < self._settings.threads:
            order = self._unfetched.popleft()
            self._num_open += 1
            self._waiting.append(order)
            self._pool.submit(self._fetch, order)

    def _may_leave(self, order: _Order) -> bool:
        """Whether an order that is first in the queue failed, or has a header and room."""
        if order.loaded.done():
            return True
        if order.size_bytes is None:
            return False
        has_room = self._used_bytes + order.size_bytes <= self._tiling.max_bytes
        return has_room or self._used_bytes == 0

    def _fetch(self, order: _Order) -> None:
        try:
            content = self._read(order.source.uri)
            size = read_image_size(content, max_pixels=self._settings.max_pixels)
        except BaseException as error:
            order.loaded.set_exception(error)
            raise
        else:
            with self._lock:
                order.content, order.size_bytes = content, _size_bytes(*size)
        finally:
            with self._lock:
                self._go_on()

    def _decode(self, order: _Order) -> None:
        try:
            image = self._decode_whole(order)
        except BaseException as error:
            with self._lock:
                self._used_bytes -= order.size_bytes or 0
            order.loaded.set_exception(error)
            raise
        else:
            order.loaded.set_result(image)
        finally:
            with self._lock:
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
