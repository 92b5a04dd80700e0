"""A detection data set made on the spot: handwritten digits pasted on photographs, no download.

The digits are scikit-learn's 1,797 samples of 8x8 pixels. The photographs lie in the wheels of
scikit-learn (CC BY 2.0, credits in its `datasets/images/README.txt`) and scikit-image. Training,
validation and test share neither a digit sample nor a photograph, so that no score can come from
remembering one. Sizes are log-uniform from 8 to 160 px: a third of the digits are below 24 px,
where the anchors decide what can be learnt.
"""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64
from PIL import Image

from retinaray.errors import DatasetError

CLASS_NAMES = tuple(f"digit-{number}" for number in range(10))
MIN_SIZE_PX, MAX_SIZE_PX = 8, 160
MIN_DIGITS, MAX_DIGITS = 4, 12
# Ink of less than this share of its full strength is too faint to count as part of the digit.
VISIBLE_INK = 0.3
_PHOTOS = {
    "train": ("china", "coffee", "astronaut", "hubble_deep_field", "brick", "grass", "camera"),
    "val": ("chelsea", "gravel", "moon"),
    "test": ("flower", "rocket", "ihc"),
}
_DIGIT_SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_JPEG_QUALITY = 90

Picture = Float32[np.ndarray, "height width 3"]
Ink = Float32[np.ndarray, "ink_height ink_width"]
Matrix = Float64[np.ndarray, "2 2"]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class SceneSet:
    """Where a made data set lies.

    Attributes:
        images: Folder of all images; a file's name begins with its split.
        train: COCO JSON of the training images; file names are relative to `images`.
        val: The same for validation.
        test: The same for the test.
        num_boxes: Digits in all three.
    """

    images: Path
    train: Path
    val: Path
    test: Path
    num_boxes: int


@dataclass(frozen=True)
class DigitSamples:
    """Handwritten digits of one split: ink in [0, 1], and which digit each is."""

    ink: Float32[np.ndarray, "S 8 8"]
    digits: Int64[np.ndarray, " S"]


def make_scene_set(
    folder: Path,
    *,
    num_train: int,
    num_val: int,
    num_test: int,
    image_size: tuple[int, int] = (320, 320),
    seed: int = 0,
) -> SceneSet:
    """Write `images/*.jpg`, `train.json`, `val.json` and `test.json` below a folder.

    The same arguments give the same bytes (with the same numpy and Pillow); image k of a split does
    not depend on how many follow.

    Args:
        folder: Where to; made if absent, otherwise it must hold no earlier set.
        num_train: Images to train on; may be 0, as may the two below.
        num_val: Images to validate on.
        num_test: Images to test on.
        image_size: Height and width in px, each at least 64. In images lower or narrower than 320
            px the largest digit is half the shorter side.
        seed: Chooses samples, places, colours and the split of the digit samples.

    Returns:
        The paths, and the number of boxes.

    Raises:
        ValueError: If a count is negative or the size is too small.
        DatasetError: If the folder holds images, or scikit-learn or scikit-image is missing.
    """
    counts = {"train": num_train, "val": num_val, "test": num_test}
    if min(counts.values()) < 0 or min(image_size) < 64:
        raise ValueError(
            f"expected counts of 0 or more and an image of 64x64 px or more, got {counts} and "
            f"height, width = {image_size}"
        )
    images = folder / "images"
    if images.is_dir() and any(images.iterdir()):
        raise DatasetError(f"expected no earlier images in {images}; delete or name another folder")
    samples = split_digit_samples(seed)
    images.mkdir(parents=True, exist_ok=True)
    num_boxes = 0
    for index, (split, count) in enumerate(counts.items()):
        photos = [load_photo(name) for name in _PHOTOS[split]] if count else []
        entries: list[tuple[str, list[tuple[int, Box]]]] = []
        for number in range(count):
            rng = np.random.default_rng([seed, index, number])
            background = crop_background(photos[rng.integers(len(photos))], image_size, rng)
            picture, truth = paste_digits(background, samples[split], rng)
            name = f"{split}-{number + 1:05}.jpg"
            pixels = np.rint(picture).astype(np.uint8)
            Image.fromarray(pixels).save(images / name, quality=_JPEG_QUALITY)
            entries.append((name, truth))
        text = json.dumps(_describe_as_coco(entries, image_size))
        (folder / f"{split}.json").write_text(text, encoding="utf-8")
        num_boxes += sum(len(truth) for _, truth in entries)
    train, val, test = (folder / f"{split}.json" for split in counts)
    return SceneSet(images=images, train=train, val=val, test=test, num_boxes=num_boxes)


def split_digit_samples(seed: int) -> dict[str, DigitSamples]:
    """Deal the digit samples out to train, val and test, each sample to one, every digit alike.

    Raises:
        DatasetError: If scikit-learn is not installed.
    """
    _package_folder("sklearn")
    from sklearn.datasets import load_digits

    loaded = load_digits()
    ink, digits = (loaded.images / 16).astype(np.float32), loaded.target.astype(np.int64)
    rng = np.random.default_rng(seed)
    dealt: dict[str, list[Any]] = {split: [] for split in _DIGIT_SHARES}
    for digit in range(len(CLASS_NAMES)):
        order = rng.permutation(np.flatnonzero(digits == digit))
        ends = np.rint(np.cumsum(list(_DIGIT_SHARES.values())) * len(order)).astype(int)
        for split, chosen in zip(dealt, np.split(order, ends[:-1]), strict=True):
            dealt[split].append(chosen)
    chosen_by_split = {split: np.concatenate(parts) for split, parts in dealt.items()}
    return {split: DigitSamples(ink[at], digits[at]) for split, at in chosen_by_split.items()}


def load_photo(name: str) -> Image.Image:
    """Load one of the photographs that come inside the installed wheels, in RGB.

    Raises:
        DatasetError: If its package is not installed or no longer has it.
    """
    for package, folder in (("sklearn", "datasets/images"), ("skimage", "data")):
        for suffix in (".jpg", ".png"):
            # Read as a file: skimage.data would try to download what it does not find.
            path = _package_folder(package) / folder / (name + suffix)
            if path.is_file():
                with Image.open(path) as photo:
                    return photo.convert("RGB")
    raise DatasetError(
        f"expected the photograph {name!r} inside scikit-learn or scikit-image, it is in neither; "
        "install the versions that retinaray[demo] names"
    )


def crop_background(
    photo: Image.Image, image_size: tuple[int, int], rng: np.random.Generator
) -> Picture:
    """Cut a random part out of a photograph, maybe mirrored, with its own light and tint.

    Returns:
        Values in [0, 255] of the size asked for; the part keeps its proportions.
    """
    height, width = image_size
    largest = min(photo.height / height, photo.width / width)
    scale = largest * rng.uniform(0.5, 1.0)
    left = rng.uniform(0, photo.width - scale * width)
    top = rng.uniform(0, photo.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    resized = photo.resize((width, height), Image.Resampling.BICUBIC, box=box)
    picture = np.asarray(resized, dtype=np.float32)
    if rng.random() < 0.5:
        picture = picture[:, ::-1]
    tint = rng.uniform(0.75, 1.1) * rng.uniform(0.9, 1.1, size=3)
    noise = rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(rng.uniform(0, 5))
    lit: Picture = np.clip(picture * tint.astype(np.float32) + noise, 0, 255)
    return lit


def paste_digits(
    background: Picture, samples: DigitSamples, rng: np.random.Generator
) -> tuple[Picture, list[tuple[int, Box]]]:
    """Paste 4 to 12 digits, large ones first, so that none hides below a larger one.

    Args:
        background: Values in [0, 255]; left as it is.
        samples: What to choose from.
        rng: Source of every choice.

    Returns:
        The picture, and per digit its class index and box (left, top, right, bottom) round the
        visible ink, in px. Boxes overlap by an IoU of at most 0.2.
    """
    picture = background.copy()
    # A drawing is of whole px and may miss its size by 1 px.
    smallest = MIN_SIZE_PX + 0.5
    largest = min(MAX_SIZE_PX, min(picture.shape[:2]) // 2) - 0.5
    num_digits = rng.integers(MIN_DIGITS, MAX_DIGITS + 1)
    sizes = np.exp(rng.uniform(math.log(smallest), math.log(largest), size=num_digits))
    truth: list[tuple[int, Box]] = []
    for size in sorted(sizes.tolist(), reverse=True):
        choice = rng.integers(len(samples.digits))
        digit = int(samples.digits[choice])
        # Where a digit finds no room a smaller one may; only a very full picture goes without.
        while size >= smallest:
            ink = draw_digit(samples.ink[choice], size, rng)
            place = _find_place(ink, picture.shape[:2], [box for _, box in truth], rng)
            if place is not None:
                left, top, box = place
                _blend(picture, ink, left, top, box, rng)
                truth.append((digit, box))
                break
            size *= 0.8
    return picture, truth


def draw_digit(sample: Float32[np.ndarray, "8 8"], size_px: float, rng: np.random.Generator) -> Ink:
    """Draw a sample with smooth edges at any size, slightly rotated and slanted.

    Args:
        sample: Ink in [0, 1].
        size_px: Longer side of the visible ink; the drawing keeps it to a pixel.
        rng: Source of angle, slant and stroke width.

    Returns:
        Ink in [0, 1] with a margin in which it fades out.
    """
    angle, slant = rng.normal(0, 0.15), rng.normal(0, 0.12)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    shape = turn @ np.array([[1, slant], [0, 1 + rng.normal(0, 0.06)]])
    middle = rng.uniform(0.38, 0.48)
    # The extent of the ink is known only once it is drawn: begin with a small, quick drawing.
    target = min(size_px, 32.0)
    scale = target / 8
    for _ in range(10):  # at most 4 were needed in 6,000 drawings
        ink = _render(sample, shape * scale, middle)
        left, top, right, bottom = _bounds(ink)
        drawn = max(right - left, bottom - top)
        if target == size_px and abs(drawn - size_px) <= 1:
            break
        target = size_px
        scale *= size_px / drawn
    return ink


def _render(sample: Float32[np.ndarray, "8 8"], shape: Matrix, middle: float) -> Ink:
    """Map the sample through a 2x2 matrix (px per sample px); ink begins round the middle value."""
    padded = Image.fromarray(np.pad(sample, 2))
    corners = np.abs(shape) @ np.array([5.0, 5.0])
    width, height = (2 * math.ceil(extent) + 2 for extent in corners)
    inverse = np.linalg.inv(shape)
    offset = 6 - inverse @ np.array([width, height]) / 2
    matrix = (*inverse[0], offset[0], *inverse[1], offset[1])
    smooth = padded.transform(
        (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
    )
    # An edge one px wide: from one px to the next the value changes by about that much.
    edge = float(np.clip(1.2 / math.sqrt(abs(np.linalg.det(shape))), 0.1, 0.7))
    ink: Ink = np.clip((np.asarray(smooth, dtype=np.float32) - middle) / edge + 0.5, 0, 1)
    return ink


def _bounds(ink: Ink) -> Box:
    """Box (left, top, right, bottom) round the visible ink; all zero if there is none."""
    rows = np.flatnonzero((ink >= VISIBLE_INK).any(axis=1))
    columns = np.flatnonzero((ink >= VISIBLE_INK).any(axis=0))
    if not len(rows):
        return (0, 0, 0, 0)
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _find_place(
    ink: Ink, image_size: tuple[int, ...], taken: list[Box], rng: np.random.Generator
) -> tuple[int, int, Box] | None:
    """Find room: where the drawing's corner goes and the box of what is then visible, or None."""
    height, width = image_size
    left, top, right, bottom = _bounds(ink)
    ink_width, ink_height = right - left, bottom - top
    for _ in range(40):
        # Some of the larger digits are cut off by the edge of the picture.
        beyond = 0.2 if max(ink_width, ink_height) >= 24 and rng.random() < 0.3 else 0.0
        x = int(rng.integers(-int(beyond * ink_width), width - int((1 - beyond) * ink_width)))
        y = int(rng.integers(-int(beyond * ink_height), height - int((1 - beyond) * ink_height)))
        x, y = x - left, y - top
        inside = _bounds(ink[max(0, -y) : height - y, max(0, -x) : width - x])
        right_by, down_by = max(0, x), max(0, y)
        box = (inside[0] + right_by, inside[1] + down_by, inside[2] + right_by, inside[3] + down_by)
        if all(_is_apart(box, other) for other in taken):
            return x, y, box
    return None


def _is_apart(one: Box, other: Box) -> bool:
    """Say whether two boxes overlap so little that both digits stay legible."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    common = max(0, wide) * max(0, high)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return common <= 0.2 * (sum(areas) - common) and common <= 0.3 * min(areas)


def _blend(
    picture: Picture, ink: Ink, left: int, top: int, box: Box, rng: np.random.Generator
) -> None:
    """Lay ink of a fitting colour over the picture, in place."""
    height, width = picture.shape[:2]
    rows = slice(max(0, top), min(height, top + ink.shape[0]))
    columns = slice(max(0, left), min(width, left + ink.shape[1]))
    visible = ink[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    colour = _choose_colour(picture[box[1] : box[3], box[0] : box[2]], rng)
    # A change of light over the digit, as on a painted surface.
    light = np.linspace(rng.uniform(0.85, 1.1), rng.uniform(0.85, 1.1), num=visible.shape[0])
    alpha = (visible * np.float32(rng.uniform(0.75, 1.0)))[..., None]
    paint = np.clip(colour * light[:, None, None], 0, 255).astype(np.float32)
    picture[rows, columns] += alpha * (paint - picture[rows, columns])


def _choose_colour(behind: Picture, rng: np.random.Generator) -> Float32[np.ndarray, " 3"]:
    """Choose a colour that stands out from what lies behind; one in eight only just does."""
    brightness = behind @ _LUMINANCE
    wanted = rng.uniform(30, 55) if rng.random() < 0.125 else rng.uniform(75, 150)
    wanted += 0.7 * float(brightness.std())
    candidates = rng.uniform(0, 255, size=(32, 3)).astype(np.float32)
    contrast = np.abs(candidates @ _LUMINANCE - brightness.mean())
    # The first that stands out enough, else the one that stands out most.
    enough = np.flatnonzero(contrast >= wanted)
    chosen: Float32[np.ndarray, " 3"] = candidates[enough[0] if len(enough) else contrast.argmax()]
    return chosen


def _describe_as_coco(
    entries: list[tuple[str, list[tuple[int, Box]]]], image_size: tuple[int, int]
) -> dict[str, Any]:
    """Put file names and boxes into COCO's form: ids from 1, boxes as x, y, width, height."""
    height, width = image_size
    annotations: list[dict[str, Any]] = []
    for image_id, (_, truth) in enumerate(entries, start=1):
        for digit, (left, top, right, bottom) in truth:
            size = (right - left, bottom - top)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": digit + 1,
                    "bbox": [left, top, *size],
                    "area": size[0] * size[1],
                    "iscrowd": 0,
                }
            )
    return {
        "info": {"description": "Handwritten digits pasted on photographs (retinaray demo)"},
        "images": [
            {"id": image_id, "file_name": name, "height": height, "width": width}
            for image_id, (name, _) in enumerate(entries, start=1)
        ],
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name} for number, name in enumerate(CLASS_NAMES, start=1)
        ],
    }


def _package_folder(name: str) -> Path:
    """Find an installed package's folder without importing it, which can take seconds.

    Raises:
        DatasetError: If it is not installed.
    """
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise DatasetError(
            f"expected the package {name} for the demo's pictures, it is not installed; "
            "run: pip install 'retinaray[demo]'"
        )
    return Path(found.submodule_search_locations[0])
