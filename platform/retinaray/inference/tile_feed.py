"""The tiles of many images as canvases: cut and letterboxed when their batch comes near.

What lies in memory: images as `ImageLoader` bounds them, and `count_ahead` canvases beside those
that the caller keeps.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8

from retinaray.data.transforms import Placement, letterbox
from retinaray.inference.canvas_batches import count_ahead
from retinaray.inference.canvas_loading import ReadSettings
from retinaray.inference.image_loader import ImageLoader, TiledImage
from retinaray.inference.image_sources import (
    IMAGE_FAULTS,
    ImageResult,
    ImageSource,
    failed_result,
)
from retinaray.inference.stage_times import StageClock
from retinaray.inference.tiling import Tile, TileSettings

Value = TypeVar("Value")


@dataclass(frozen=True)
class TileCanvas:
    """One tile as the network takes it.

    Attributes:
        image: The image that it is a part of.
        tile: Which part.
        pixels: RGB on a canvas of the network's size.
        placement: Where the tile lies on the canvas.
    """

    image: TiledImage
    tile: Tile
    pixels: UInt8[np.ndarray, "H W 3"]
    placement: Placement


class TileFeed:
    """Iterates over the canvases of images, in order; an image that fails gives its error instead.

    Args:
        sources: Images; `count_ahead` of them at most are taken beyond the image that is cut.
        canvas: Network height and width.
        read: Gives the bytes at a URI; raises StorageError.
        batch: Tiles per network call.
        settings: Reading.
        tiling: Cutting, and the bound on memory.
        clock: Counts fetching, decoding with cutting, and the waiting for tiles as `starved`.
    """

    def __init__(
        self,
        sources: Iterable[ImageSource],
        *,
        canvas: tuple[int, int],
        read: Callable[[str], bytes],
        batch: int,
        settings: ReadSettings,
        tiling: TileSettings,
        clock: StageClock | None = None,
    ) -> None:
        self._sources = iter(sources)
        self._canvas = canvas
        self._num_ahead = count_ahead(batch, settings.threads)
        self._clock = clock or StageClock()
        self._loader = ImageLoader(
            canvas=canvas, read=read, settings=settings, tiling=tiling, clock=self._clock
        )
        # Threads of their own, so that no tile waits for a slow download.
        self._cutters = ThreadPoolExecutor(settings.threads, thread_name_prefix="cut")
        self._loading: deque[tuple[ImageSource, Future[TiledImage]]] = deque()
        self._uncut: Iterator[tuple[TiledImage, Tile]] = iter(())
        self._ahead: deque[ImageResult | tuple[TiledImage, Tile, Future[TileCanvas]]] = deque()

    def __iter__(self) -> Iterator[ImageResult | TileCanvas]:
        self._cut_ahead()
        while self._ahead:
            yield self._take_first()
            self._cut_ahead()

    def close(self) -> None:
        """Stop reading ahead; nobody waits for what was queued."""
        self._loader.close()
        self._cutters.shutdown(cancel_futures=True)

    def _cut_ahead(self) -> None:
        while len(self._ahead) < self._num_ahead:
            piece = next(self._uncut, None)
            if piece is not None:
                self._ahead.append((*piece, self._cutters.submit(self._cut, *piece)))
            elif not self._take_image():
                return

    def _take_image(self) -> bool:
        """Go on to the next image; False if there is none, or none yet and others can go first."""
        self._load_ahead()
        if not self._loading or (self._ahead and not self._loading[0][1].done()):
            return False
        source, loading = self._loading.popleft()
        self._load_ahead()
        try:
            image = self._wait_for(loading)
        except IMAGE_FAULTS as error:
            self._ahead.append(failed_result(source, error))
        else:
            self._uncut = ((image, tile) for tile in image.tiles)
        return True

    def _load_ahead(self) -> None:
        for source in islice(self._sources, self._num_ahead - len(self._loading)):
            self._loading.append((source, self._loader.load(source)))

    def _take_first(self) -> ImageResult | TileCanvas:
        first = self._ahead.popleft()
        if isinstance(first, ImageResult):
            return first
        image, tile, cutting = first
        canvas = self._wait_for(cutting)
        if tile is image.tiles[-1]:
            self._loader.release(image)
        return canvas

    def _cut(self, image: TiledImage, tile: Tile) -> TileCanvas:
        assert image.pixels is not None
        part = image.pixels
        start = time.perf_counter()
        if (tile.height, tile.width) != (image.height, image.width):
            part = part[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
        pixels, placement = letterbox(
            part,
            height=tile.height,
            width=tile.width,
            canvas_height=self._canvas[0],
            canvas_width=self._canvas[1],
        )
        self._clock.count("decode", time.perf_counter() - start)
        return TileCanvas(image, tile, pixels, placement)

    def _wait_for(self, future: Future[Value]) -> Value:
        if future.done():
            return future.result()
        with self._clock.measure("starved"):
            return future.result()
