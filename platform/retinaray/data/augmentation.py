"""Random changes to a training image whose boxes follow the pixels: zoom, crop, flip, colour.

First a plan is drawn (pure numbers), then it is applied; the plan also says how large the image
must be decoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from retinaray.data.transforms import fit_size, resize_pixels

# A box of which less than this is left after a cut teaches neither object nor background.
MIN_VISIBLE_SHARE = 0.3
_CROP_TRIES = 10
_MIN_CROP_SIDE = 0.4
# The others show what surrounds the objects, where false positives come from.
_WINDOWS_ON_OBJECTS = 0.75
_GREY = np.array([0.299, 0.587, 0.114])
# Every so many rows and columns are enough for the mean of an image.
_MEAN_STRIDE = 8


@dataclass(frozen=True)
class AugmentSettings:
    """Strength of each change; the defaults change nothing.

    Attributes:
        flip: Probability of a left-right mirror.
        vertical_flip: Probability of a top-bottom mirror.
        scale_range: Factor on the fitted size, lowest and highest, > 0.
        crop: Probability of a zoom into a part that keeps at least one whole box.
        brightness: Factor drawn from 1 +- this.
        contrast: Factor drawn from 1 +- this.
        saturation: Factor drawn from 1 +- this.
        hue: Shift drawn from +- this part of the colour circle.
        mosaic: Probability of four images on one canvas.
    """

    flip: float = 0.0
    vertical_flip: float = 0.0
    scale_range: tuple[float, float] = (1.0, 1.0)
    crop: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    mosaic: float = 0.0


@dataclass(frozen=True)
class AugmentPlan:
    """One draw of the settings for one image.

    Attributes:
        window: Part of the original that is used: left, top, right, bottom in whole pixels.
        scaled_height: Rows that the window is resized to.
        scaled_width: Columns that the window is resized to.
        offset_x: Column of the resized window that lands in the canvas's first column.
        offset_y: Row of the resized window that lands in the canvas's first row.
        is_flipped: Mirror left-right.
        is_vertically_flipped: Mirror top-bottom.
        colour: Factors of brightness, contrast and saturation, and the hue shift.
    """

    window: tuple[int, int, int, int]
    scaled_height: int
    scaled_width: int
    offset_x: int
    offset_y: int
    is_flipped: bool
    is_vertically_flipped: bool
    colour: tuple[float, float, float, float]


@dataclass(frozen=True)
class Surroundings:
    """What a canvas that is a window onto an image is cut from.

    Attributes:
        fit: Height and width that the whole image is fitted to.
        class_indices: Class of each box; none = all of one class.
    """

    fit: tuple[int, int]
    class_indices: Int[np.ndarray, " M"] | None = None


def draw_plan(
    rng: np.random.Generator,
    settings: AugmentSettings,
    *,
    height: int,
    width: int,
    boxes_xyxy: Float[np.ndarray, "M 4"],
    canvas_height: int,
    canvas_width: int,
    around: Surroundings | None = None,
) -> AugmentPlan:
    """Draw what happens to one image.

    Args:
        rng: Source of all randomness.
        settings: Strengths.
        height: Upright height of the original.
        width: Upright width of the original.
        boxes_xyxy: Ground truth in original pixels; a crop keeps at least one of them whole.
        canvas_height: Height of the canvas.
        canvas_width: Width of the canvas.
        around: Where the canvas is a window onto the image; none = the image is fitted to it.

    Returns:
        The plan; with default settings it is the plain letterbox. A window is anywhere for one in
        four images. For the others it holds the centre of an object: of a class drawn among those
        in the image, so that the rare ones are seen as often as the others beside them.
    """
    window = (0, 0, width, height)
    if rng.random() < settings.crop:
        window = _draw_window(rng, height, width, boxes_xyxy)
    fit_height, fit_width = around.fit if around else (canvas_height, canvas_width)
    fitted = fit_size(window[3] - window[1], window[2] - window[0], fit_height, fit_width)
    factor = float(np.exp(rng.uniform(*np.log(settings.scale_range))))
    scaled_height, scaled_width = (max(1, int(side * factor)) for side in fitted)
    ranges = np.array(
        [(0, max(0, scaled_width - canvas_width)), (0, max(0, scaled_height - canvas_height))]
    )
    if around is not None and rng.random() < _WINDOWS_ON_OBJECTS:
        scale = np.array([scaled_width, scaled_height]) / (np.array(window[2:]) - window[:2])
        ranges = _narrow_to_object(
            rng,
            ranges,
            (boxes_xyxy - (window[:2] * 2)) * np.tile(scale, 2),
            around.class_indices,
            (canvas_width, canvas_height),
        )
    return AugmentPlan(
        window=window,
        scaled_height=scaled_height,
        scaled_width=scaled_width,
        offset_x=int(rng.integers(ranges[0, 0], ranges[0, 1] + 1)),
        offset_y=int(rng.integers(ranges[1, 0], ranges[1, 1] + 1)),
        is_flipped=bool(rng.random() < settings.flip),
        is_vertically_flipped=bool(rng.random() < settings.vertical_flip),
        colour=(
            1 + float(rng.uniform(-settings.brightness, settings.brightness)),
            1 + float(rng.uniform(-settings.contrast, settings.contrast)),
            1 + float(rng.uniform(-settings.saturation, settings.saturation)),
            float(rng.uniform(-settings.hue, settings.hue)),
        ),
    )


def _draw_window(
    rng: np.random.Generator, height: int, width: int, boxes_xyxy: Float[np.ndarray, "M 4"]
) -> tuple[int, int, int, int]:
    """A random part that holds at least one box whole; everything when none is found."""
    for _ in range(_CROP_TRIES):
        part_height = max(1, int(height * rng.uniform(_MIN_CROP_SIDE, 1)))
        part_width = max(1, int(width * rng.uniform(_MIN_CROP_SIDE, 1)))
        left = int(rng.integers(0, width - part_width + 1))
        top = int(rng.integers(0, height - part_height + 1))
        right, bottom = left + part_width, top + part_height
        is_whole = (boxes_xyxy[:, :2] >= (left, top)).all(1) & (
            boxes_xyxy[:, 2:] <= (right, bottom)
        ).all(1)
        if len(boxes_xyxy) == 0 or is_whole.any():
            return left, top, right, bottom
    return 0, 0, width, height


def _narrow_to_object(
    rng: np.random.Generator,
    ranges: Int[np.ndarray, "2 2"],
    boxes_xyxy: Float[np.ndarray, "M 4"],
    class_indices: Int[np.ndarray, " M"] | None,
    canvas_xy: tuple[int, int],
) -> Int[np.ndarray, "2 2"]:
    """Offsets (x and y, first and last) at which the canvas holds the centre of a random box.

    Args:
        rng: Source of the choice.
        ranges: All offsets.
        boxes_xyxy: In pixels of the resized part; none, or none with its centre there = `ranges`.
        class_indices: Of the boxes; a class is drawn before one of its boxes.
        canvas_xy: Width and height of the canvas.
    """
    centres = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
    inside = np.flatnonzero(((centres >= 0) & (centres < ranges[:, 1] + canvas_xy)).all(1))
    if len(inside) == 0:
        return ranges
    if class_indices is not None:
        own = class_indices[inside]
        inside = inside[own == rng.choice(np.unique(own))]
    centre = np.floor(centres[rng.choice(inside)]).astype(np.int64)
    first = np.maximum(ranges[:, 0], centre - canvas_xy + 1)
    return np.stack([np.minimum(first, ranges[:, 1]), np.minimum(ranges[:, 1], centre)], axis=1)


def needed_size(plan: AugmentPlan, height: int, width: int) -> tuple[int, int]:
    """Height and width at which the original must be decoded for the plan to lose no detail."""
    left, top, right, bottom = plan.window
    return (
        -(-plan.scaled_height * height // (bottom - top)),
        -(-plan.scaled_width * width // (right - left)),
    )


def apply_plan(
    plan: AugmentPlan,
    pixels: UInt8[np.ndarray, "h w 3"],
    *,
    height: int,
    width: int,
    canvas_height: int,
    canvas_width: int,
) -> UInt8[np.ndarray, "canvas_height canvas_width 3"]:
    """The pixels of the canvas.

    Args:
        plan: What to do.
        pixels: The upright original, possibly decoded at reduced size.
        height: Upright height of the original at full size.
        width: Upright width of the original at full size.
        canvas_height: Height of the canvas.
        canvas_width: Width of the canvas.

    Returns:
        RGB canvas, black where there is no image.
    """
    left, top, right, bottom = _scale_window(plan.window, pixels, height, width)
    part = np.ascontiguousarray(pixels[top:bottom, left:right])
    scaled = resize_pixels(part, plan.scaled_height, plan.scaled_width)
    cut = scaled[
        plan.offset_y : plan.offset_y + canvas_height, plan.offset_x : plan.offset_x + canvas_width
    ]
    cut = change_colours(cut, plan.colour)
    if plan.is_flipped:
        cut = cut[:, ::-1]
    if plan.is_vertically_flipped:
        cut = cut[::-1]
    canvas = np.zeros((canvas_height, canvas_width, 3), dtype=np.uint8)
    canvas[: cut.shape[0], : cut.shape[1]] = cut
    return canvas


def _scale_window(
    window: tuple[int, int, int, int], pixels: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> tuple[int, int, int, int]:
    """The window in the pixels of a copy that was decoded at reduced size."""
    scale_y, scale_x = pixels.shape[0] / height, pixels.shape[1] / width
    left, top = int(window[0] * scale_x), int(window[1] * scale_y)
    right = max(left + 1, round(window[2] * scale_x))
    return left, top, right, max(top + 1, round(window[3] * scale_y))


def move_boxes(
    plan: AugmentPlan,
    boxes_xyxy: Float[np.ndarray, "M 4"],
    *,
    canvas_height: int,
    canvas_width: int,
) -> tuple[Float[np.ndarray, "M 4"], Bool[np.ndarray, " M"], Bool[np.ndarray, " M"]]:
    """Boxes in canvas pixels after the plan.

    Args:
        plan: What was done to the pixels.
        boxes_xyxy: Boxes in original pixels.
        canvas_height: Height of the canvas.
        canvas_width: Width of the canvas.

    Returns:
        The clipped boxes (float32); which of them still have area on the canvas; and which have so
        little left that they count as ignored regions.
    """
    left, top, right, bottom = plan.window
    scale = np.array([plan.scaled_width / (right - left), plan.scaled_height / (bottom - top)] * 2)
    shift = np.array([plan.offset_x, plan.offset_y] * 2)
    moved = (boxes_xyxy.astype(np.float64) - np.array([left, top] * 2)) * scale - shift
    cut_width = min(canvas_width, plan.scaled_width - plan.offset_x)
    cut_height = min(canvas_height, plan.scaled_height - plan.offset_y)
    if plan.is_flipped:
        moved[:, [0, 2]] = cut_width - moved[:, [2, 0]]
    if plan.is_vertically_flipped:
        moved[:, [1, 3]] = cut_height - moved[:, [3, 1]]
    clipped = np.clip(moved, 0, [cut_width, cut_height] * 2)
    area, visible = _areas(moved), _areas(clipped)
    has_area = (clipped[:, 2:] > clipped[:, :2]).all(1)
    is_stump = has_area & (visible < MIN_VISIBLE_SHARE * area)
    return clipped.astype(np.float32), has_area, is_stump


def _areas(boxes_xyxy: Float[np.ndarray, "M 4"]) -> Float[np.ndarray, " M"]:
    sides = np.maximum(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], 0)
    return np.asarray(sides[:, 0] * sides[:, 1])


def change_colours(
    pixels: UInt8[np.ndarray, "h w 3"], colour: tuple[float, float, float, float]
) -> UInt8[np.ndarray, "h w 3"]:
    """Apply brightness, contrast and saturation factors, then a hue shift in turns.

    (1, 1, 1, 0) changes nothing. All four are one affine map of a pixel's RGB, rounded and clipped
    once: contrast scales around the image's mean grey, saturation around a pixel's own, and the hue
    turns around the grey axis, a third of a turn making red green and green blue.

    Source: P. Haeberli, Matrix Operations for Image Processing, 1993; grey is that of ITU-R BT.601.
    """
    brightness, contrast, saturation, hue = colour
    if colour == (1.0, 1.0, 1.0, 0.0):
        return pixels
    shift = 0.0
    if contrast != 1.0:
        sample = pixels[::_MEAN_STRIDE, ::_MEAN_STRIDE]
        shift = (1 - contrast) * brightness * float(sample.mean(axis=(0, 1)) @ _GREY)
    to_grey = np.tile(_GREY, (3, 1))
    matrix = _turn_hue(hue) @ (saturation * np.eye(3) + (1 - saturation) * to_grey)
    matrix *= contrast * brightness
    # Grey stays where it is under saturation and hue, and so does the shift.
    rows = np.column_stack((matrix, np.full(3, shift)))
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.convert("RGB", tuple(rows.ravel().tolist())))


def _turn_hue(turns: float) -> Float[np.ndarray, "3 3"]:
    """Rotation of RGB around its grey axis (Rodrigues' formula)."""
    cosine, sine = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    turned: Float[np.ndarray, "3 3"] = cosine * np.eye(3) + (1 - cosine) / 3 + sine * across
    return turned
