"""From files to detections by tiles: cut at full size, batched across images, merged by image.

The counterpart of `pipeline` for objects that a whole image on one canvas would make too small.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

from retinaray.data.coco import CategoryTable
from retinaray.data.coco_results import coco_results
from retinaray.data.transforms import Placement
from retinaray.inference.image_loader import TiledImage
from retinaray.inference.pipeline import ImageResult, ImageSource, ReadSettings, predict_canvases
from retinaray.inference.predictor import Predictor
from retinaray.inference.tile_feed import TileCanvas, TileFeed
from retinaray.inference.tile_merging import TileDetections, merge_tiles
from retinaray.inference.tiling import TileSettings, move_to_image


@dataclass(frozen=True)
class _UnderWay:
    """An image, and what was found in those of its tiles that have been through the network."""

    image: TiledImage
    found: list[TileDetections] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return len(self.found) == len(self.image.tiles)


def detect_tiled(
    predictor: Predictor,
    sources: Iterable[ImageSource],
    *,
    read: Callable[[str], bytes],
    batch: int,
    settings: ReadSettings,
    tiling: TileSettings,
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

    Raises:
        StorageError: If the store fails for other reasons than one file.

    Yields:
        One result per source, in their order, the detections of its tiles merged. Images that
        cannot be read or decoded have an error. An image of one tile has the detections that
        `detect_images` gives it.
    """
    under_way: deque[_UnderWay | ImageResult] = deque()
    canvases: list[TileCanvas] = []
    owners: list[_UnderWay] = []

    def run_network() -> None:
        found = predict_canvases(predictor, [canvas.pixels for canvas in canvases])
        for owner, canvas, detections in zip(owners, canvases, found, strict=True):
            image, tile = canvas.image, canvas.tile
            owner.found.append(
                move_to_image(
                    detections, canvas.placement, tile, height=image.height, width=image.width
                )
            )
        canvases.clear()
        owners.clear()

    feed = TileFeed(
        sources,
        canvas=predictor.canvas,
        read=read,
        batch=batch,
        settings=settings,
        tiling=tiling,
    )
    with closing(feed):
        for item in feed:
            if isinstance(item, ImageResult):
                under_way.append(item)
            else:
                canvases.append(item)
                owners.append(_find_owner(under_way, item.image))
            if len(canvases) == batch:
                run_network()
            yield from _pop_finished(under_way, predictor.card.categories, tiling)
        run_network()
        yield from _pop_finished(under_way, predictor.card.categories, tiling)


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
