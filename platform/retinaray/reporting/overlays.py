"""Detections and ground truth drawn on images, and galleries of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

# Distinct on light and dark pictures; by class index.
_PALETTE = (
    (230, 25, 75),
    (60, 180, 75),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (0, 160, 160),
    (240, 50, 230),
    (128, 128, 0),
    (170, 110, 40),
    (70, 70, 220),
)
_TRUTH_COLOUR = (255, 255, 255)
# Smaller pictures are enlarged so that lines and letters stay legible.
_MIN_DRAWN_SIDE = 640
_LEGIBLE_CONTRAST = 4.5


def draw_detections(
    pixels: UInt8[np.ndarray, "h w 3"],
    detections: Sequence[Mapping[str, Any]],
    truth: Sequence[Mapping[str, Any]],
    *,
    names: Mapping[int | str, str],
) -> UInt8[np.ndarray, "height width 3"]:
    """Draw ground truth in white, detections in their class colour with name and score.

    Args:
        pixels: RGB.
        detections: COCO results of this image: category_id, bbox xywh, score; may be empty.
        truth: COCO annotations of this image: bbox xywh; may be empty.
        names: Category names by id, in the order of the class index.

    Returns:
        RGB, enlarged when the picture is small.
    """
    # Importing torchvision takes seconds, and only those who draw need it.
    from torchvision.utils import draw_bounding_boxes

    height, width = pixels.shape[:2]
    scale = max(1, -(-_MIN_DRAWN_SIDE // min(height, width)))
    large = Image.fromarray(pixels).resize(
        (width * scale, height * scale), Image.Resampling.BICUBIC
    )
    image = torch.from_numpy(np.array(large)).permute(2, 0, 1)
    line = max(2, round(min(height, width) * scale / 320))
    if truth:
        boxes = _corners(truth) * scale
        image = draw_bounding_boxes(image, boxes, colors=_TRUTH_COLOUR, width=line + 2)
    if detections:
        # The best last, so that its label lies on top.
        ordered = sorted(detections, key=lambda found: found["score"])
        positions = {identity: index for index, identity in enumerate(names)}
        colours = [_PALETTE[positions[d["category_id"]] % len(_PALETTE)] for d in ordered]
        boxes = _corners(ordered) * scale
        image = draw_bounding_boxes(image, boxes, colors=list(colours), width=line)
        # The labels above all lines, which a crowded picture draws across each other.
        image = draw_bounding_boxes(
            image,
            boxes,
            labels=[f"{names[found['category_id']]} {found['score']:.2f}" for found in ordered],
            width=0,
            font=_find_font(),
            font_size=max(12, line * 6),
            label_colors=[choose_text_colour(colour) for colour in colours],
            label_background_colors=list(colours),
            fill_labels=True,
        )
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def choose_text_colour(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """White where it is legible on an RGB colour, black elsewhere.

    Source: contrast ratio of WCAG 2.2, (L1 + 0.05) / (L2 + 0.05) of relative luminances, which asks
    for 4.5; where white has less, black has more.
    """
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (value / 255 for value in background)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (255, 255, 255) if 1.05 / (luminance + 0.05) >= _LEGIBLE_CONTRAST else (0, 0, 0)


def write_contact_sheet(
    pictures: Sequence[UInt8[np.ndarray, "h w 3"]], path: Path, *, columns: int = 3, side: int = 640
) -> None:
    """Write pictures side by side as one PNG, each fitted into a square cell.

    Args:
        pictures: RGB, at least one.
        path: File to write.
        columns: Pictures per row.
        side: Side of a cell in pixels.
    """
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), (30, 30, 30))
    for index, picture in enumerate(pictures):
        image = Image.fromarray(picture)
        image.thumbnail((side - 8, side - 8))
        left = (index % columns) * side + (side - image.width) // 2
        top = (index // columns) * side + (side - image.height) // 2
        sheet.paste(image, (left, top))
    sheet.save(path)


def _corners(entries: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    boxes = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _find_font() -> str:
    """A scalable font that every installation has: matplotlib brings it along."""
    from matplotlib import font_manager

    return str(font_manager.findfont("DejaVu Sans"))
