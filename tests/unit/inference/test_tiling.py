"""Where tiles lie: hand-computed grids, full cover, nothing up to the overlap cut everywhere."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from retinaray.data.transforms import Placement
from retinaray.detector.postprocess import Detections
from retinaray.inference.predictor import PredictorSettings
from retinaray.inference.tiling import (
    MAX_PER_TILE,
    Tile,
    TileSettings,
    cut_tiles,
    make_tile_predictor_settings,
    move_to_image,
)


def settings_of(tile: int | tuple[int, int], overlap: float, **options: object) -> TileSettings:
    height, width = (tile, tile) if isinstance(tile, int) else tile
    return replace(TileSettings(tile_height=height, tile_width=width, overlap=overlap), **options)


def starts_of(tiles: tuple[Tile, ...]) -> tuple[list[int], list[int]]:
    return sorted({tile.top for tile in tiles}), sorted({tile.left for tile in tiles})


@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap", "tops", "lefts"),
    [
        # 128 px shared at least, so steps of 512 at most: 3360 in 7 steps of 480, 1610 in 4.
        (2250, 4000, 640, 0.2, [0, 402, 805, 1207, 1610], list(range(0, 3361, 480))),
        # 440 in one step; 1280 in 3 steps of 426 2/3.
        (1080, 1920, 640, 0.2, [0, 440], [0, 426, 853, 1280]),
        (640, 1000, 640, 0.2, [0], [0, 360]),
        (128, 192, 64, 0.0, [0, 64], [0, 64, 128]),
        (129, 192, 64, 0.0, [0, 32, 65], [0, 64, 128]),
        (641, 640, 640, 0.2, [0, 1], [0]),
        (640, 641, 640, 0.0, [0], [0, 1]),
        # Half a tile is shared: 160 in 5 steps of 32.
        (64, 224, 64, 0.5, [0], [0, 32, 64, 96, 128, 160]),
        # 0.1 x 30 is 3 pixels: one step of 27 is enough.
        (30, 57, 30, 0.1, [0], [0, 27]),
        # A step is one pixel at least.
        (4, 6, 4, 0.99, [0], [0, 1, 2]),
        (1, 3, 1, 0.9, [0], [0, 1, 2]),
        # Tiles of another shape: 60 x 100, 20 rows and 20 columns shared.
        (120, 260, (60, 100), 0.2, [0, 30, 60], [0, 80, 160]),
    ],
)
def test_cut_tiles_gives_hand_computed_grids(
    height: int,
    width: int,
    tile: int | tuple[int, int],
    overlap: float,
    tops: list[int],
    lefts: list[int],
) -> None:
    tiles = cut_tiles(height, width, settings_of(tile, overlap, has_full=False))
    tile_height, tile_width = (tile, tile) if isinstance(tile, int) else tile
    assert tiles == tuple(
        Tile(top, left, tile_height, tile_width) for top in tops for left in lefts
    )


def test_cut_tiles_adds_the_whole_image_last_when_asked() -> None:
    tiles = cut_tiles(100, 150, settings_of(100, 0.2, has_full=True))
    assert tiles == (Tile(0, 0, 100, 100), Tile(0, 50, 100, 100), Tile(0, 0, 100, 150))


@pytest.mark.parametrize("has_full", [False, True])
@pytest.mark.parametrize(("height", "width"), [(100, 100), (99, 1), (1, 100), (1, 1)])
def test_cut_tiles_gives_one_tile_when_the_image_fits(
    height: int, width: int, has_full: bool
) -> None:
    tiles = cut_tiles(height, width, settings_of(100, 0.2, has_full=has_full))
    assert tiles == (Tile(0, 0, height, width),)


def test_cut_tiles_keeps_the_image_s_height_when_only_the_width_is_larger() -> None:
    tiles = cut_tiles(40, 150, settings_of(100, 0.2, has_full=False))
    assert tiles == (Tile(0, 0, 40, 100), Tile(0, 50, 40, 100))


def draw_cases(num: int) -> list[tuple[int, int, int, int, float]]:
    rng = random.Random(7)
    return [
        (
            rng.randint(1, 300),
            rng.randint(1, 300),
            rng.randint(1, 120),
            rng.randint(1, 120),
            rng.choice([0.0, 0.1, 0.2, 0.25, 0.5, 0.75, rng.random()]),
        )
        for _ in range(num)
    ]


@pytest.mark.parametrize(
    ("height", "width", "tile_height", "tile_width", "overlap"), draw_cases(60)
)
def test_cut_tiles_covers_and_overlaps_as_promised(
    height: int, width: int, tile_height: int, tile_width: int, overlap: float
) -> None:
    settings = settings_of((tile_height, tile_width), overlap, has_full=False)
    tiles = cut_tiles(height, width, settings)
    covered = np.zeros((height, width), dtype=np.bool_)
    for tile in tiles:
        assert (tile.height, tile.width) == (min(tile_height, height), min(tile_width, width))
        assert 0 <= tile.top <= height - tile.height
        assert 0 <= tile.left <= width - tile.width
        covered[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width] = True
    assert covered.all()
    assert len(set(tiles)) == len(tiles)
    for starts, side, length in zip(
        starts_of(tiles), (tile_height, tile_width), (height, width), strict=True
    ):
        shared = min(side - 1, int(np.ceil(side * overlap - 1e-9)))
        assert all(b - a <= side - shared for a, b in pairwise(starts))
        # An object as large as the overlap is whole in a tile wherever it lies.
        for first in range(length - shared + 1):
            assert any(a <= first and first + shared <= a + side for a in starts)
        # With one tile less the overlap could not be kept.
        if len(starts) > 1:
            assert side + (len(starts) - 2) * (side - shared) < length


def test_move_to_image_gives_pixels_of_the_image() -> None:
    # A tile of 100x200 at (300, 400), at half size on the canvas: 50 rows and 100 columns.
    placement = Placement(height=100, width=200, content_height=50, content_width=100)
    found = Detections(
        torch.tensor([[10.0, 5, 30, 20], [90, 40, 120, 60], [100, 0, 120, 10], [0, 50, 9, 64]]),
        torch.tensor([0.9, 0.8, 0.7, 0.6]),
        torch.tensor([2, 1, 0, 0]),
    )
    tile = Tile(top=300, left=400, height=100, width=200)
    moved = move_to_image(found, placement, tile, height=900, width=900)
    # The second is clipped to the tile; the others lie in the padding.
    assert moved.detections.boxes_xyxy.tolist() == [[420, 310, 460, 340], [580, 380, 600, 400]]
    assert moved.detections.boxes_xyxy.dtype == torch.float32
    assert moved.detections.scores.tolist() == pytest.approx([0.9, 0.8])
    assert moved.detections.labels.tolist() == [2, 1]
    assert moved.is_cut.tolist() == [False, True]
    assert len(moved) == 2


@pytest.mark.parametrize(
    ("network_box", "inner_borders"),
    [
        ([2, 10, 9, 20], {"left"}),
        ([2.1, 10, 9, 20], set()),
        ([10, 1.9, 20, 9], {"top"}),
        ([10, 10, 58, 20], {"right"}),
        ([10, 10, 57.9, 20], set()),
        ([10, 10, 20, 40], {"bottom"}),
        # The canvas goes on below the tile: what is found there ends at the tile's border too.
        ([10, 10, 20, 60], {"bottom"}),
        ([0, 10, 60, 20], {"left", "right"}),
    ],
)
@pytest.mark.parametrize(
    ("tile", "borders_of_the_image"),
    [
        (Tile(50, 70, 80, 120), set()),
        (Tile(0, 0, 80, 120), {"left", "top"}),
        (Tile(920, 880, 80, 120), {"right", "bottom"}),
        (Tile(0, 70, 80, 120), {"top"}),
    ],
)
def test_move_to_image_says_what_may_be_cut(
    network_box: list[float], inner_borders: set[str], tile: Tile, borders_of_the_image: set[str]
) -> None:
    # At half size: 40 rows and 60 columns.
    placement = Placement(height=80, width=120, content_height=40, content_width=60)
    found = Detections(torch.tensor([network_box]), torch.ones(1), torch.zeros(1, dtype=torch.long))
    moved = move_to_image(found, placement, tile, height=1000, width=1000)
    assert moved.is_cut.tolist() == [bool(inner_borders - borders_of_the_image)]


def test_move_to_image_keeps_nothing_when_nothing_was_found() -> None:
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    moved = move_to_image(
        nothing, Placement(10, 10, 10, 10), Tile(5, 5, 10, 10), height=90, width=90
    )
    assert len(moved) == 0
    assert moved.detections.boxes_xyxy.shape == (0, 4)
    assert moved.is_cut.shape == (0,)


def test_make_tile_predictor_settings_lifts_the_cap_of_an_image_only() -> None:
    settings = PredictorSettings(batch=3, canvas=(64, 64), score_threshold=0.2, max_detections=7)
    changed = make_tile_predictor_settings(settings)
    assert changed == replace(settings, max_detections=MAX_PER_TILE)
    assert MAX_PER_TILE == 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_height": 0}, "tile_height, tile_width must be >= 1: got .*tile_height=0"),
        ({"tile_width": -1}, "tile_width=-1"),
        ({"overlap": 1.0}, r"overlap must be in \[0, 1\).*overlap=1.0"),
        ({"overlap": -0.1}, "overlap=-0.1"),
        ({"overlap": float("nan")}, "overlap must be in"),
        ({"merge": "union"}, "merge must be one of nms, ios: got .*'union'"),
        ({"merge_threshold": 0.0}, r"merge_threshold must be in \(0, 1\]"),
        ({"merge_threshold": 1.1}, "merge_threshold=1.1"),
        ({"max_detections": 0}, "max_detections must be >= 1"),
        ({"max_bytes": 0}, "max_bytes must be >= 1"),
        ({"overlap": 2, "max_bytes": 0}, r"overlap must be in \[0, 1\); max_bytes must be >= 1"),
    ],
)
def test_tile_settings_name_the_value_when_it_is_out_of_range(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TileSettings(**options)  # type: ignore[arg-type]
