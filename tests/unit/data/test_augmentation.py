"""Boxes follow the pixels: what is drawn in an image is found again where its box went."""

from __future__ import annotations

import colorsys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from retinaray.data.augmentation import (
    MIN_VISIBLE_SHARE,
    AugmentPlan,
    AugmentSettings,
    apply_plan,
    change_colours,
    draw_plan,
    move_boxes,
    needed_size,
)
from retinaray.data.transforms import letterbox

# Each differs from the others in which channels are lit, so that a blend with black stays its own.
COLOURS = np.array(
    [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]
)
HEIGHT, WIDTH = 240, 330
BOXES = np.array(
    [
        [10, 12, 70, 60],
        [100, 5, 180, 45],
        [250, 20, 325, 110],
        [20, 90, 60, 220],
        [110, 80, 200, 150],
        [230, 150, 310, 235],
    ],
    dtype=np.float32,
)
PLAIN = AugmentPlan(
    window=(0, 0, WIDTH, HEIGHT),
    scaled_height=HEIGHT,
    scaled_width=WIDTH,
    offset_x=0,
    offset_y=0,
    is_flipped=False,
    is_vertically_flipped=False,
    colour=(1.0, 1.0, 1.0, 0.0),
)
CANVASES = [(128, 160), (160, 96), (240, 330), (300, 420)]
SETTINGS = {
    "flip": AugmentSettings(flip=0.5),
    "vertical flip": AugmentSettings(vertical_flip=0.5),
    "jitter": AugmentSettings(scale_range=(0.5, 2.5)),
    "crop": AugmentSettings(crop=1.0),
    "all": AugmentSettings(flip=0.5, vertical_flip=0.5, scale_range=(0.6, 1.8), crop=0.7),
}


def draw_boxes(boxes_xyxy: np.ndarray, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Black image with a filled rectangle of the i-th colour at the i-th box."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    for (x1, y1, x2, y2), colour in zip(boxes_xyxy.astype(int), COLOURS, strict=False):
        pixels[y1:y2, x1:x2] = colour
    return pixels


def find_extent(canvas: np.ndarray, colour: np.ndarray) -> np.ndarray | None:
    """Box xyxy round all pixels that show at least half of a colour; none if there are none."""
    lit, dark = canvas[..., colour > 0], canvas[..., colour == 0]
    is_own = (lit.min(axis=2) >= 128) & (dark.max(axis=2) < 64)
    rows, columns = np.flatnonzero(is_own.any(axis=1)), np.flatnonzero(is_own.any(axis=0))
    if len(rows) == 0:
        return None
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def plan_for(
    seed: int,
    settings: AugmentSettings,
    canvas: tuple[int, int],
    boxes_xyxy: np.ndarray = BOXES,
    *,
    size: tuple[int, int] = (HEIGHT, WIDTH),
) -> AugmentPlan:
    return draw_plan(
        np.random.default_rng(seed),
        settings,
        height=size[0],
        width=size[1],
        boxes_xyxy=boxes_xyxy,
        canvas_height=canvas[0],
        canvas_width=canvas[1],
    )


def apply(
    plan: AugmentPlan,
    pixels: np.ndarray,
    canvas: tuple[int, int],
    boxes_xyxy: np.ndarray = BOXES,
    *,
    size: tuple[int, int] = (HEIGHT, WIDTH),
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Canvas, moved boxes, which are kept, which are stumps."""
    made = apply_plan(
        plan,
        pixels,
        height=size[0],
        width=size[1],
        canvas_height=canvas[0],
        canvas_width=canvas[1],
    )
    moved = move_boxes(plan, boxes_xyxy, canvas_height=canvas[0], canvas_width=canvas[1])
    return made, *moved


def assert_boxes_follow(
    made: np.ndarray, boxes_xyxy: np.ndarray, kept: np.ndarray, message: str
) -> int:
    """Compare each colour's extent with its box; gives the number of colours seen."""
    num_seen = 0
    for box, is_kept, colour in zip(boxes_xyxy, kept, COLOURS, strict=True):
        extent = find_extent(made, colour)
        if extent is None:
            assert not is_kept or (box[2:] - box[:2]).min() < 1.5, message
        else:
            assert is_kept, f"{message}: colour {colour} is visible without a box"
            np.testing.assert_allclose(extent, box, rtol=0, atol=1.5, err_msg=message)
            num_seen += 1
    return num_seen


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_boxes_follow_the_pixels(settings: AugmentSettings) -> None:
    pixels, num_seen, plans = draw_boxes(BOXES), 0, set()
    for seed in range(40):
        canvas = CANVASES[seed % len(CANVASES)]
        plan = plan_for(seed, settings, canvas)
        plans.add(plan)
        made, boxes, kept, _ = apply(plan, pixels, canvas)
        assert made.shape == (*canvas, 3)
        num_seen += assert_boxes_follow(made, boxes, kept, f"seed {seed}")
    assert num_seen > 90
    assert len(plans) >= 8


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_boxes_follow_the_pixels_when_the_image_was_decoded_at_half_size(
    settings: AugmentSettings,
) -> None:
    # An odd size, so that the half is rounded up as JPEG decoders do.
    size, boxes_xyxy = (4 * HEIGHT + 1, 4 * WIDTH + 3), 4 * BOXES
    full = draw_boxes(boxes_xyxy, *size)
    half = np.asarray(Image.fromarray(full).reduce(2))
    assert half.shape[:2] == (2 * HEIGHT + 1, 2 * WIDTH + 2)
    num_seen = 0
    for seed in range(30):
        plan = plan_for(seed, settings, (128, 160), boxes_xyxy, size=size)
        made, boxes, kept, _ = apply(plan, half, (128, 160), boxes_xyxy, size=size)
        num_seen += assert_boxes_follow(made, boxes, kept, f"seed {seed}")
    assert num_seen > 60


def test_draw_plan_is_the_plain_letterbox_when_nothing_is_asked_for() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for seed, canvas in enumerate(CANVASES):
        made, boxes, kept, is_stump = apply(
            plan_for(seed, AugmentSettings(), canvas), pixels, canvas
        )
        expected, placement = letterbox(
            pixels, height=HEIGHT, width=WIDTH, canvas_height=canvas[0], canvas_width=canvas[1]
        )
        np.testing.assert_array_equal(made, expected)
        np.testing.assert_array_equal(boxes, placement.to_network(BOXES))
        assert kept.all()
        assert not is_stump.any()


def test_draw_plan_depends_on_the_generator_alone() -> None:
    settings = SETTINGS["all"]
    assert plan_for(5, settings, (128, 160)) == plan_for(5, settings, (128, 160))
    assert plan_for(5, settings, (128, 160)) != plan_for(6, settings, (128, 160))


def test_draw_plan_keeps_a_whole_box_when_it_crops() -> None:
    num_cropped = 0
    for seed in range(100):
        plan = plan_for(seed, AugmentSettings(crop=1.0), (128, 160))
        left, top, right, bottom = plan.window
        assert 0 <= left < right <= WIDTH
        assert 0 <= top < bottom <= HEIGHT
        assert right - left >= 0.4 * WIDTH - 1
        assert bottom - top >= 0.4 * HEIGHT - 1
        is_whole = (BOXES[:, :2] >= (left, top)).all(1) & (BOXES[:, 2:] <= (right, bottom)).all(1)
        assert is_whole.any()
        num_cropped += plan.window != (0, 0, WIDTH, HEIGHT)
    assert num_cropped > 80


def test_draw_plan_crops_anywhere_when_there_are_no_boxes() -> None:
    windows = {
        plan_for(seed, AugmentSettings(crop=1.0), (128, 160), np.zeros((0, 4), np.float32)).window
        for seed in range(20)
    }
    assert len(windows) == 20


def test_draw_plan_keeps_everything_when_no_crop_holds_a_box() -> None:
    # Only the whole image holds a box of its own size.
    whole = np.array([[0, 0, WIDTH, HEIGHT]], dtype=np.float32)
    plan = plan_for(0, AugmentSettings(crop=1.0), (128, 160), whole)
    assert plan.window == (0, 0, WIDTH, HEIGHT)


def test_draw_plan_stays_within_its_settings() -> None:
    settings = AugmentSettings(
        flip=0.5, scale_range=(0.5, 2.0), brightness=0.2, contrast=0.3, saturation=0.4, hue=0.05
    )
    plans = [plan_for(seed, settings, (HEIGHT, WIDTH)) for seed in range(300)]
    factors = np.array([plan.scaled_width / WIDTH for plan in plans])
    assert factors.min() >= 0.5 - 1 / WIDTH
    assert factors.max() <= 2.0
    # Log-uniform: as often enlarged as shrunk, here within three standard deviations of 300 / 2.
    assert 124 <= np.sum(factors < 1) <= 176
    assert 124 <= sum(plan.is_flipped for plan in plans) <= 176
    assert not any(plan.is_vertically_flipped for plan in plans)
    colours = np.array([plan.colour for plan in plans]) - (1, 1, 1, 0)
    assert (np.abs(colours) <= (0.2, 0.3, 0.4, 0.05)).all()
    assert (colours.max(axis=0) > (0.15, 0.25, 0.35, 0.04)).all()
    for plan in plans:
        assert 0 <= plan.offset_x <= max(0, plan.scaled_width - WIDTH)
        assert 0 <= plan.offset_y <= max(0, plan.scaled_height - HEIGHT)


def test_move_boxes_gives_hand_computed_corners() -> None:
    # A window of 100x50 at (20, 10), doubled to 200x100; columns 30 to 130 land on the canvas.
    plan = replace(
        PLAIN, window=(20, 10, 120, 60), scaled_width=200, scaled_height=100, offset_x=30
    )
    box = np.array([[40, 20, 60, 50]], dtype=np.float32)
    # x: (40 - 20) * 2 - 30 = 10, (60 - 20) * 2 - 30 = 50.
    # y: (20 - 10) * 2 = 20, (50 - 10) * 2 = 80.
    moved, kept, is_stump = move_boxes(plan, box, canvas_height=120, canvas_width=100)
    assert moved.dtype == np.float32
    assert moved.tolist() == [[10, 20, 50, 80]]
    assert kept.tolist() == [True]
    assert is_stump.tolist() == [False]
    # Mirrored in the 100 columns and 100 rows that are filled: x 100 - 50, 100 - 10; y 100 - 80,
    # 100 - 20.
    mirrored = replace(plan, is_flipped=True, is_vertically_flipped=True)
    moved, _, _ = move_boxes(mirrored, box, canvas_height=120, canvas_width=100)
    assert moved.tolist() == [[50, 20, 90, 80]]


def test_move_boxes_makes_stumps_ignored_and_drops_what_has_left() -> None:
    plan = replace(PLAIN, window=(100, 0, 200, 100), scaled_width=100, scaled_height=100)
    boxes = np.array(
        [
            [71, 0, 111, 40],  # 11 of 40 columns are left: 27.5 %
            [70, 0, 110, 40],  # 10 of 40: 25 %
            [72, 0, 112, 40],  # 12 of 40: 30 %, the least that counts
            [110, 90, 150, 130],  # 10 of 40 rows: 25 %
            [120, 20, 160, 60],  # whole
            [0, 0, 100, 50],  # touches the edge only
            [210, 20, 250, 60],  # outside
        ],
        dtype=np.float32,
    )
    assert MIN_VISIBLE_SHARE == 0.3
    moved, kept, is_stump = move_boxes(plan, boxes, canvas_height=100, canvas_width=100)
    assert kept.tolist() == [True] * 5 + [False] * 2
    assert is_stump.tolist() == [True, True, False, True, False, False, False]
    assert moved[0].tolist() == [0, 0, 11, 40]


def test_move_boxes_keeps_shapes_when_there_are_no_boxes() -> None:
    empty = np.zeros((0, 4), dtype=np.float32)
    for plan in (PLAIN, replace(PLAIN, is_flipped=True, is_vertically_flipped=True)):
        moved, kept, is_stump = move_boxes(plan, empty, canvas_height=50, canvas_width=50)
        assert moved.shape == (0, 4)
        assert kept.shape == is_stump.shape == (0,)


def test_apply_plan_mirrors_only_what_the_image_fills() -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    plan = replace(PLAIN, is_flipped=True)
    made, _, _, _ = apply(plan, pixels, (HEIGHT + 20, WIDTH + 30))
    np.testing.assert_array_equal(made[:HEIGHT, :WIDTH], pixels[:, ::-1])
    assert made[HEIGHT:].sum() == made[:, WIDTH:].sum() == 0
    made, _, _, _ = apply(replace(PLAIN, is_vertically_flipped=True), pixels, (HEIGHT, WIDTH))
    np.testing.assert_array_equal(made, pixels[::-1])


def test_apply_plan_leaves_the_padding_black_when_colours_change() -> None:
    plan = replace(PLAIN, colour=(1.4, 0.5, 1.5, 0.3))
    made, _, _, _ = apply(plan, draw_boxes(BOXES), (HEIGHT + 10, WIDTH + 10))
    assert made[HEIGHT:].sum() == made[:, WIDTH:].sum() == 0
    # Contrast 0.5 lifts black towards the mean: the image itself did change.
    assert made[0, 0].min() > 0


def test_needed_size_is_enough_and_no_more() -> None:
    settings, size = AugmentSettings(crop=0.5, scale_range=(0.3, 2.0)), (2399, 3301)
    for seed in range(100):
        plan = plan_for(seed, settings, (160, 224), size=size)
        left, top, right, bottom = plan.window
        windows, scaled = (bottom - top, right - left), (plan.scaled_height, plan.scaled_width)
        needed = needed_size(plan, *size)
        for decoded, window, side, wanted in zip(needed, windows, size, scaled, strict=True):
            # As many pixels of the window as it is resized to; with one fewer there would not be.
            assert decoded * window >= wanted * side
            assert (decoded - 1) * window < wanted * side


def test_change_colours_changes_nothing_when_neutral() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert change_colours(pixels, (1.0, 1.0, 1.0, 0.0)) is pixels
    assert change_colours(pixels, (1.0, 1.0, 1.0, -0.0)) is pixels


def test_change_colours_gives_hand_computed_brightness_contrast_and_saturation() -> None:
    pixels = np.array([[[100, 60, 20], [20, 60, 100]]], dtype=np.uint8)
    brighter = change_colours(pixels, (1.5, 1.0, 1.0, 0.0))
    assert brighter.tolist() == [[[150, 90, 30], [30, 90, 150]]]
    brightest = change_colours(pixels, (3.0, 1.0, 1.0, 0.0))
    assert brightest.tolist() == [[[255, 180, 60], [60, 180, 255]]]
    # 0.299 R + 0.587 G + 0.114 B is 67.4 and 52.6; the mean of the image is that of its first
    # pixel, which stands for its neighbours.
    grey = change_colours(pixels, (1.0, 1.0, 0.0, 0.0))
    assert grey.tolist() == [[[67, 67, 67], [53, 53, 53]]]
    flatter = change_colours(pixels, (1.0, 0.5, 1.0, 0.0))
    assert flatter.tolist() == [[[84, 64, 44], [44, 64, 84]]]  # (x + 67.4) / 2
    # 1.5 (x - 67.4) + 67.4 doubled by brightness before: 3 x - 67.4.
    both = change_colours(pixels, (2.0, 1.5, 1.0, 0.0))
    assert both.tolist() == [[[233, 113, 0], [0, 113, 233]]]


def test_change_colours_takes_the_mean_of_the_whole_image() -> None:
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:, 16:] = 100
    flatter = change_colours(pixels, (1.0, 0.5, 1.0, 0.0))
    assert (flatter[:, :16] == 25).all()
    assert (flatter[:, 16:] == 75).all()


@pytest.mark.parametrize(
    ("turn", "expected"),
    [(1 / 3, [90, 200, 40]), (-1 / 3, [40, 90, 200]), (0.5, [20, 180, 130]), (1.0, [200, 40, 90])],
)
def test_change_colours_turns_the_hue_by_hand(turn: float, expected: list[int]) -> None:
    # Half a turn mirrors at the mean of the three: 2 * 110 - x.
    pixels = np.array([[[200, 40, 90]]], dtype=np.uint8)
    assert change_colours(pixels, (1.0, 1.0, 1.0, turn)).tolist() == [[expected]]


@pytest.mark.parametrize("turn", [0.02, -0.02, 0.05, -0.05])
def test_change_colours_turns_the_hue_of_photographs_as_hsv_does(turn: float) -> None:
    rng = np.random.default_rng(0)
    # Moderate saturation, as of photographs: no channel is clipped.
    pixels = (rng.integers(90, 150, (6, 6, 1)) + rng.integers(-40, 41, (6, 6, 3))).astype(np.uint8)
    turned = change_colours(pixels, (1.0, 1.0, 1.0, turn))
    for before, after in zip(pixels.reshape(-1, 3), turned.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(before / 255))
        expected = np.array(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)) * 255
        np.testing.assert_allclose(after, expected, rtol=0, atol=1 + 200 * abs(turn))
    # Greys have no hue.
    grey = np.full((2, 2, 3), 77, dtype=np.uint8)
    np.testing.assert_array_equal(change_colours(grey, (1.0, 1.0, 1.0, turn)), grey)


def test_change_colours_keeps_shape_and_type_when_pixels_are_a_view() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    view = pixels[2:-2, ::-1]
    made = change_colours(view, (0.9, 1.1, 0.8, 0.02))
    assert made.shape == view.shape
    assert made.dtype == np.uint8
    expected = change_colours(view.copy(), (0.9, 1.1, 0.8, 0.02))
    np.testing.assert_array_equal(made, expected)
