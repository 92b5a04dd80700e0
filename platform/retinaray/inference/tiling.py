"""Where a large image is cut into overlapping tiles, and where a tile's boxes lie in the image.

Source of the idea: Akyon et al. 2022, Slicing Aided Hyper Inference (arXiv:2202.06934). Knows no
pixels, files or networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float

from retinaray.data.transforms import Placement
from retinaray.detector.postprocess import Detections
from retinaray.inference.predictor import PredictorSettings
from retinaray.inference.tile_merging import MERGE_KINDS, MergeKind, TileDetections

MAX_PER_TILE = 1000
"""Detections of one tile before the merging. A network proposes no more candidates per canvas by
default (`export`'s top-k), so that only its own suppression removes any."""
# How exactly a network puts a box to the border of what it sees, in its own pixels.
_CUT_MARGIN_PX = 2.0


@dataclass(frozen=True)
class TileSettings:
    """How images are cut, and how what was found in their tiles is merged.

    Attributes:
        tile_height: Height of a tile in pixels of the original, >= 1; lower images have lower
            tiles.
        tile_width: Width of a tile, likewise. A tile fills the network canvas best when both have
            the same aspect.
        overlap: Part of a tile's side that neighbours share at least, in [0, 1).
        has_full: Detect in the whole image too, for objects larger than a tile.
        merge: Overlap by which boxes of different tiles are the same object; see `merge_tiles`.
        merge_threshold: Above this overlap the worse one goes, in (0, 1].
        is_class_agnostic: Boxes of different classes can be the same object.
        max_detections: Detections per image at most, after merging.
        max_bytes: Decoded pixels, 3 bytes each, of all images in flight at most; an image that is
            larger is alone in flight. The default holds the largest image that is accepted by
            default, or 19 of 4000x2250.

    Raises:
        ValueError: If a value is out of its range.
    """

    tile_height: int = 640
    tile_width: int = 640
    overlap: float = 0.2
    has_full: bool = True
    merge: MergeKind = "ios"
    merge_threshold: float = 0.5
    is_class_agnostic: bool = False
    max_detections: int = 1000
    max_bytes: int = 1 << 29

    def __post_init__(self) -> None:
        rules = [
            (min(self.tile_height, self.tile_width) >= 1, "tile_height, tile_width", ">= 1"),
            (0 <= self.overlap < 1, "overlap", "in [0, 1)"),
            (self.merge in MERGE_KINDS, "merge", f"one of {', '.join(MERGE_KINDS)}"),
            (0 < self.merge_threshold <= 1, "merge_threshold", "in (0, 1]"),
            (self.max_detections >= 1, "max_detections", ">= 1"),
            (self.max_bytes >= 1, "max_bytes", ">= 1"),
        ]
        faults = [f"{names} must be {rule}" for is_met, names, rule in rules if not is_met]
        if faults:
            raise ValueError(f"{'; '.join(faults)}: got {self}")


@dataclass(frozen=True)
class Tile:
    """A part of an image, in whole pixels of the upright original."""

    top: int
    left: int
    height: int
    width: int


def make_tile_predictor_settings(settings: PredictorSettings) -> PredictorSettings:
    """The same runtime for tiles: `max_detections` is for images, and applied after the merging."""
    return replace(settings, max_detections=MAX_PER_TILE)


def cut_tiles(height: int, width: int, settings: TileSettings) -> tuple[Tile, ...]:
    """Cover an image.

    Args:
        height: Upright height of the image, >= 1.
        width: Upright width, >= 1.
        settings: Size and overlap.

    Returns:
        Tiles row by row; then the whole image, if that is asked for and not the only tile. Along
        each axis there are as few tiles as the overlap permits, moved together evenly so that the
        last one ends at the edge: all have the full size, and an object that is no larger than the
        overlap is whole in one of them.
    """
    tile_height, tile_width = min(height, settings.tile_height), min(width, settings.tile_width)
    tiles = tuple(
        Tile(top, left, tile_height, tile_width)
        for top in _starts(height, settings.tile_height, settings.overlap)
        for left in _starts(width, settings.tile_width, settings.overlap)
    )
    if settings.has_full and len(tiles) > 1:
        return (*tiles, Tile(0, 0, height, width))
    return tiles


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    """First pixels of the tiles along one axis."""
    if length <= tile:
        return [0]
    # 1e-9: 0.1 x 30 must be 3 pixels, not 4.
    overlap_px = min(math.ceil(tile * overlap - 1e-9), tile - 1)
    num_steps = -(-(length - tile) // (tile - overlap_px))
    return [step * (length - tile) // num_steps for step in range(num_steps + 1)]


def move_to_image(
    detections: Detections, placement: Placement, tile: Tile, *, height: int, width: int
) -> TileDetections:
    """What was found in a tile, in pixels of the image.

    Args:
        detections: In network pixels, on the CPU.
        placement: Where the tile lay on the canvas.
        tile: Where it lies in the image.
        height: Height of the image.
        width: Width of the image.

    Returns:
        The detections in the same order, clipped to the tile; those in the padding are left out.
        One is cut if it ends within two network pixels of a border of the tile that is none of the
        image.
    """
    network_boxes = detections.boxes_xyxy.numpy()
    boxes_xyxy = placement.to_original(network_boxes)
    has_area = (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(axis=1)
    corner = np.array([tile.left, tile.top, tile.left, tile.top], dtype=np.float32)
    is_kept = torch.from_numpy(has_area)
    return TileDetections(
        Detections(
            boxes_xyxy=torch.from_numpy(boxes_xyxy + corner)[is_kept],
            scores=detections.scores[is_kept],
            labels=detections.labels[is_kept],
        ),
        is_cut=_find_cut(network_boxes, placement, tile, height, width)[has_area],
    )


def _find_cut(
    network_boxes: Float[np.ndarray, "D 4"],
    placement: Placement,
    tile: Tile,
    height: int,
    width: int,
) -> Bool[np.ndarray, " D"]:
    is_inner = np.array(
        [
            tile.left > 0,
            tile.top > 0,
            tile.left + tile.width < width,
            tile.top + tile.height < height,
        ]
    )
    room = np.array([placement.content_width, placement.content_height], dtype=np.float32)
    distances = np.concatenate([network_boxes[:, :2], room - network_boxes[:, 2:]], axis=1)
    return np.asarray(((distances <= _CUT_MARGIN_PX) & is_inner).any(axis=1))
