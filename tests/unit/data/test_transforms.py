"""The one preprocessing: sizes by hand, pixels against Pillow, boxes there and back."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from retinaray.data.transforms import (
    Placement,
    choose_canvas,
    fit_size,
    letterbox,
    resize_pixels,
)


def random_pixels(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("image", "canvas", "expected"),
    [
        ((600, 800), (600, 800), (600, 800)),
        ((300, 400), (600, 800), (600, 800)),
        ((1200, 1600), (600, 800), (600, 800)),
        # In floats 416 * (480 / 416) is 479.99999999999994.
        ((416, 416), (480, 480), (480, 480)),
        ((416, 416), (480, 640), (480, 480)),
        # Likewise 98 * (512 / 98).
        ((49, 98), (512, 512), (256, 512)),
        ((1080, 1920), (800, 1333), (749, 1333)),  # 1333 * 1080 / 1920 = 749.8
        ((480, 640), (800, 1333), (800, 1066)),  # 800 * 640 / 480 = 1066.7
        ((640, 480), (800, 1333), (800, 600)),
        ((100, 101), (50, 50), (49, 50)),  # 50 * 100 / 101 = 49.5
        ((1, 5000), (64, 64), (1, 64)),  # 64 / 5000 would be no row at all
        ((5000, 1), (64, 64), (64, 1)),
        ((1, 1), (7, 3), (3, 3)),
        ((30000, 30000), (1, 1), (1, 1)),
    ],
)
def test_fit_size_is_the_floored_size_of_the_same_aspect(
    image: tuple[int, int], canvas: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert fit_size(*image, *canvas) == expected
    # Turned by 90 degrees, all turns.
    assert fit_size(*image[::-1], *canvas[::-1]) == expected[::-1]


def test_fit_size_fills_one_side_and_never_leaves_the_canvas() -> None:
    rng = np.random.default_rng(1)
    for height, width, canvas_height, canvas_width in rng.integers(1, 3000, (2000, 4)).tolist():
        fitted = fit_size(height, width, canvas_height, canvas_width)
        assert 1 <= fitted[0] <= canvas_height
        assert 1 <= fitted[1] <= canvas_width
        assert fitted[0] == canvas_height or fitted[1] == canvas_width


def assert_close_to_pillow(made: np.ndarray, pixels: np.ndarray) -> None:
    """Pillow resizes one axis after the other and rounds in between: 2 of 255 may differ."""
    size = (made.shape[1], made.shape[0])
    pillow = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    difference = np.abs(made.astype(int) - pillow)
    assert difference.max() <= 2
    assert difference.mean() < 0.05


@pytest.mark.parametrize(
    ("image", "canvas"), [((60, 90), (64, 64)), ((37, 23), (96, 160)), ((300, 200), (64, 96))]
)
def test_letterbox_equals_pillow_top_left_on_black(
    image: tuple[int, int], canvas: tuple[int, int]
) -> None:
    pixels = random_pixels(*image)
    made, placement = letterbox(
        pixels, height=image[0], width=image[1], canvas_height=canvas[0], canvas_width=canvas[1]
    )
    height, width = placement.content_height, placement.content_width
    assert (height, width) == fit_size(*image, *canvas)
    assert made.shape == (*canvas, 3)
    assert made.dtype == np.uint8
    assert_close_to_pillow(made[:height, :width], pixels)
    assert made[height:].sum() == made[:, width:].sum() == 0


def test_letterbox_places_by_the_original_size_when_pixels_were_decoded_smaller() -> None:
    # A JPEG of 301x401 decoded at a quarter has 76x101 pixels; its own aspect is another one.
    small = random_pixels(76, 101)
    made, placement = letterbox(small, height=301, width=401, canvas_height=50, canvas_width=60)
    # 60 * 301 / 401 = 45.04
    assert placement == Placement(height=301, width=401, content_height=45, content_width=60)
    assert_close_to_pillow(made[:45], small)


@pytest.mark.parametrize("size", [(20, 33), (90, 77)], ids=["smaller", "larger"])
def test_resize_pixels_takes_views_and_read_only_arrays(size: tuple[int, int]) -> None:
    pixels = random_pixels(40, 50)
    expected = resize_pixels(pixels[:, ::-1].copy(), *size)
    assert expected.flags.c_contiguous
    np.testing.assert_array_equal(resize_pixels(pixels[:, ::-1], *size), expected)
    frozen = pixels[:, ::-1].copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(resize_pixels(frozen, *size), expected)


def test_resize_pixels_gives_the_same_array_when_the_size_is_right() -> None:
    pixels = random_pixels(5, 7)
    assert resize_pixels(pixels, 5, 7) is pixels


def test_resize_pixels_averages_when_it_shrinks() -> None:
    # An antialiased filter sees all pixels: stripes of 0 and 200 become their mean.
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 200
    assert np.abs(resize_pixels(stripes, 8, 8)[:, 1:-1].astype(int) - 100).max() <= 2


def test_placement_moves_boxes_by_hand_computed_scales() -> None:
    placement = Placement(height=100, width=101, content_height=49, content_width=50)
    boxes = np.array([[10.1, 20.0, 101.0, 100.0]], dtype=np.float32)
    # x: 50/101, 10.1 -> 5; y: 49/100, 20 -> 9.8. The far corner meets the end of the content.
    expected = np.array([[5.0, 9.8, 50.0, 49.0]])
    moved = placement.to_network(boxes)
    assert moved.dtype == np.float32
    np.testing.assert_allclose(moved, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("image", "canvas"),
    [
        ((4000, 6000), (800, 1344)),
        ((333, 500), (480, 640)),
        ((7, 5), (512, 512)),
        ((9, 900), (64, 64)),
    ],
)
def test_placement_gives_boxes_back(image: tuple[int, int], canvas: tuple[int, int]) -> None:
    placement = Placement(*image, *fit_size(*image, *canvas))
    rng = np.random.default_rng(2)
    corners = np.sort(rng.random((500, 2, 2)), axis=1) * [image[1], image[0]]
    boxes = corners.reshape(500, 4).astype(np.float32)
    restored = placement.to_original(placement.to_network(boxes))
    assert restored.dtype == np.float32
    np.testing.assert_allclose(restored, boxes, rtol=0, atol=1e-3)


def test_placement_gives_no_area_to_boxes_in_the_padding() -> None:
    placement = Placement(height=100, width=200, content_height=50, content_width=100)
    boxes = np.array(
        [
            [0, 60, 40, 90],  # below the content
            [0, 50, 100, 128],  # from its edge down
            [90, 40, 300, 300],  # half inside: 10 x 10 network pixels of 2 original ones are left
            [-20, -20, -1, -1],
        ],
        dtype=np.float32,
    )
    expected = [[0, 100, 80, 100], [0, 100, 200, 100], [180, 80, 200, 100], [0, 0, 0, 0]]
    np.testing.assert_allclose(placement.to_original(boxes), expected)


def test_placement_keeps_shape_when_there_are_no_boxes() -> None:
    placement = Placement(height=10, width=10, content_height=5, content_width=5)
    empty = np.zeros((0, 4), dtype=np.float32)
    assert placement.to_network(empty).shape == (0, 4)
    assert placement.to_original(empty).shape == (0, 4)


def canvas_of(sizes: list[tuple[int, int]], **settings: int) -> tuple[int, int]:
    heights, widths = np.array(sizes).T
    return choose_canvas(heights, widths, **settings)


@pytest.mark.parametrize(
    ("sizes", "settings", "expected"),
    [
        # The same size again, and its double.
        ([(480, 640)], {"resize": 480, "max_size": 640}, (480, 640)),
        ([(480, 640)], {"resize": 960, "max_size": 1333}, (960, 1280)),
        # 800 / 480 = 1.667 (1333 / 640 allows 2.08): 800 x 1066.7 -> 34 * 32 = 1088.
        ([(480, 640)], {"resize": 800, "max_size": 1333}, (800, 1088)),
        # max_size binds: min(800 / 1080, 1333 / 1920) = 0.6943: 749.8 x 1333 -> 768 x 1344.
        ([(1080, 1920)], {"resize": 800, "max_size": 1333}, (768, 1344)),
        ([(1080, 1920)], {"resize": 800, "max_size": 1333, "multiple": 128}, (768, 1408)),
        # 273 * (384 / 273) is 384.00000000000006 in floats, which must not take the next multiple.
        ([(273, 364)], {"resize": 384, "max_size": 1333}, (384, 512)),
        # Both orientations need a square.
        ([(480, 640), (640, 480)], {"resize": 480, "max_size": 640}, (640, 640)),
        # A panorama is shrunk by its long side: 640 / 6400 = 0.1 -> 10 x 640. It changes nothing.
        ([(480, 640), (100, 6400)], {"resize": 480, "max_size": 640}, (480, 640)),
        # Two upright images of 200 are outliers, fitted smaller; one of 50 is not.
        ([(480, 640)] * 198 + [(640, 480)] * 2, {"resize": 480, "max_size": 640}, (480, 640)),
        ([(480, 640)] * 49 + [(640, 480)], {"resize": 480, "max_size": 640}, (640, 640)),
        # Never empty.
        ([(1, 4000)], {"resize": 64, "max_size": 64}, (32, 64)),
    ],
)
def test_choose_canvas_gives_hand_computed_sides(
    sizes: list[tuple[int, int]], settings: dict[str, int], expected: tuple[int, int]
) -> None:
    assert canvas_of(sizes, **settings) == expected
    turned = [(width, height) for height, width in sizes]
    assert canvas_of(turned, **settings) == expected[::-1]


def test_choose_canvas_holds_99_of_100_images_at_their_size() -> None:
    rng = np.random.default_rng(3)
    for count in (1, 2, 10, 99, 100, 101, 500):
        heights, widths = rng.integers(200, 2000, (2, count))
        canvas = choose_canvas(heights, widths, resize=600, max_size=1000)
        scale = np.minimum(600 / np.minimum(heights, widths), 1000 / np.maximum(heights, widths))
        for sides, room in ((heights, canvas[0]), (widths, canvas[1])):
            assert np.mean(sides * scale <= room + 1e-6) >= 0.99
