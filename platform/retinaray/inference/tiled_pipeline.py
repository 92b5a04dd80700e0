"""From files to detections by tiles: cut at full size, batched across images, merged by image.

The counterpart of `pipeline` for objects that a whole image on one canvas would make too small.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from retinaray.data.coco import CategoryTable
from retinaray.data.coco_results import coco_results
from retinaray.data.transforms import Placement
from retinaray.detector.postprocess import Detections
from retinaray.inference.batch_stream import BatchMemory, predict_stream
from retinaray.inference.canvas_loading import ReadSettings
from retinaray.inference.image_loader import TiledImage
from retinaray.inference.image_sources import ImageResult, ImageSource
from retinaray.inference.predictor import Predictor
from retinaray.inference.stage_times import StageClock
from retinaray.inference.tile_feed import TileFeed
from retinaray.inference.tile_merging import TileDetections, merge_tiles
from retinaray.inference.tiling import Tile, TileSettings, move_to_image


@dataclass(frozen=True)
class _UnderWay:
    """An image, and what was found in those of its tiles that have been through the network."""

    image: TiledImage
    found: list[TileDetections] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return len(self.found) == len(self.image.tiles)


@dataclass(frozen=True)
class _TileBatch:
    """Tiles in the order of their canvases: whose they are, which part, and where it lies."""

    pieces: list[tuple[_UnderWay, Tile, Placement]]
    memory: UInt8[np.ndarray, "N H W 3"] | None

    @property
    def images(self) -> UInt8[Tensor, "n 3 H W"] | None:
        if self.memory is None:
            return None
        return torch.from_numpy(self.memory[: len(self.pieces)]).permute(0, 3, 1, 2)


def detect_tiled(
    predictor: Predictor,
    sources: Iterable[ImageSource],
    *,
    read: Callable[[str], bytes],
    batch: int,
    settings: ReadSettings,
    tiling: TileSettings,
    clock: StageClock | None = None,
) -> Iterator[ImageResult]:
    """Detect in many images, each cut into overlapping tiles at full resolution.

    Args:
        predictor: The model, loaded with `make_tile_predictor_settings`: what it gives at most for
            a canvas is the cap of a tile.
        sources: Images; see `TileFeed`; may be endless.
        read: Gives the bytes at a URI; raises StorageError.
        batch: Tiles per network call, of one image or of several; only the last call has fewer.
        settings: Reading.
        tiling: Cutting, merging, and the bound on memory.
        clock: Counts where the time goes: fetch, decode, engine, starved, bytes.

    Raises:
        StorageError: If the store fails for other reasons than one file.
        InferenceError: If too many threads hang in decoding.

    Yields:
        One result per source, in their order, the detections of its tiles merged. Images that
        cannot be read or decoded have an error. An image of one tile has the detections that
        `detect_images` gives it.
    """
    under_way: deque[_UnderWay | ImageResult] = deque()
    clock = clock or StageClock()
    memory = BatchMemory(batch, predictor.canvas)
    feed = TileFeed(
        sources,
        canvas=predictor.canvas,
        read=read,
        batch=batch,
        settings=settings,
        tiling=tiling,
        clock=clock,
    )
    batches = _gather(feed, under_way, memory, batch)
    with closing(feed), closing(predict_stream(predictor, batches, clock)) as stream:
        for tiles, found in stream:
            _hand_out(tiles, found)
            if tiles.memory is not None:
                memory.give_back(tiles.memory)
            yield from _pop_finished(under_way, predictor.card.categories, tiling)


def _gather(
    feed: TileFeed, under_way: deque[_UnderWay | ImageResult], memory: BatchMemory, batch: int
) -> Iterator[_TileBatch]:
    """Whole batches of tiles, the last one smaller; one without tiles for an image that failed."""
    canvases = memory.take()
    pieces: list[tuple[_UnderWay, Tile, Placement]] = []
    for item in feed:
        if isinstance(item, ImageResult):
            under_way.append(item)
            yield _TileBatch([], None)
            continue
        canvases[len(pieces)] = item.pixels
        pieces.append((_find_owner(under_way, item.image), item.tile, item.placement))
        if len(pieces) == batch:
            yield _TileBatch(pieces, canvases)
            canvases, pieces = memory.take(), []
    if pieces:
        yield _TileBatch(pieces, canvases)


def _hand_out(tiles: _TileBatch, found: list[Detections]) -> None:
    for (owner, tile, placement), detections in zip(tiles.pieces, found, strict=True):
        image = owner.image
        owner.found.append(
            move_to_image(detections, placement, tile, height=image.height, width=image.width)
        )


def _find_owner(under_way: deque[_UnderWay | ImageResult], image: TiledImage) -> _UnderWay:
    """The last image if the tile is of it; else the tile begins a new one."""
    last = under_way[-1] if under_way else None
    if isinstance(last, _UnderWay) and last.image is image:
        return last
    under_way.append(owner := _UnderWay(image))
    return owner


def _pop_finished(
    under_way: deque[_UnderWay | ImageResult], categories: CategoryTable, tiling: TileSettings
) -> Iterator[ImageResult]:
    """Results from the front, up to the first image whose tiles are not all through."""
    while under_way:
        first = under_way[0]
        if isinstance(first, _UnderWay) and not first.is_complete:
            return
        under_way.popleft()
        yield first if isinstance(first, ImageResult) else _merge(first, categories, tiling)


def _merge(complete: _UnderWay, categories: CategoryTable, tiling: TileSettings) -> ImageResult:
    image = complete.image
    merged = merge_tiles(
        complete.found,
        kind=tiling.merge,
        threshold=tiling.merge_threshold,
        max_detections=tiling.max_detections,
        is_class_agnostic=tiling.is_class_agnostic,
    )
    unscaled = Placement(image.height, image.width, image.height, image.width)
    return ImageResult(
        source=image.source,
        height=image.height,
        width=image.width,
        detections=tuple(coco_results(merged, unscaled, categories)),
    )
