"""One image with the boxes of two runtimes: what both found, and what only one of them has."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from retinaray.detector.postprocess import Detections
from retinaray.evaluation.parity_matching import ImageDifferences

REFERENCE_COLOUR = (0, 114, 232)
CANDIDATE_COLOUR = (255, 122, 0)
# A white line below a coloured one keeps it visible on any picture.
_HALO = (255, 255, 255)
_DRAWN_SIDE = 900
_CLEAR_SHIFT = 2.0
_MAX_MOVED_LABELS = 3
_JPEG_QUALITY = 82

Rectangle = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the drawn picture."""


def draw_differences(
    pixels: UInt8[np.ndarray, "h w 3"],
    reference: Detections,
    candidate: Detections,
    differences: ImageDifferences,
    *,
    names: Sequence[str],
    score_thresholds: Sequence[float],
) -> bytes:
    """Draw two sets of boxes: the reference solid, the candidate dashed over it.

    Boxes that came, went or changed their class are thick and have class and score; the three pairs
    with the largest shifts have both scores, if they are clear.

    Args:
        pixels: The picture as it lies on the canvas, without its border.
        reference: Detections in pixels of the picture.
        candidate: The same from the other runtime.
        differences: Between the two.
        names: Of the classes.
        score_thresholds: Of the classes; lower boxes are not drawn.

    Returns:
        A JPEG file.
    """
    height, width = pixels.shape[:2]
    scale = max(1.0, _DRAWN_SIDE / max(height, width))
    size = (round(width * scale), round(height * scale))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    canvas = _Canvas(image, scale)
    alone = {*differences.missing, *(place for place, _ in differences.flips)}
    added = {*differences.extra, *(place for _, place in differences.flips)}
    for place in _list_drawn(reference, score_thresholds):
        canvas.box(reference, place, REFERENCE_COLOUR, is_thick=place in alone)
    for place in _list_drawn(candidate, score_thresholds):
        canvas.box(candidate, place, CANDIDATE_COLOUR, is_thick=place in added, is_dashed=True)
    for place in sorted(alone):
        canvas.label(reference, place, _describe(reference, place, names), REFERENCE_COLOUR)
    for place in sorted(added):
        canvas.label(candidate, place, _describe(candidate, place, names), CANDIDATE_COLOUR)
    for row in np.argsort(-differences.shifts, kind="stable")[:_MAX_MOVED_LABELS]:
        if differences.shifts[row] > _CLEAR_SHIFT:
            one, other = (int(place) for place in differences.pairs[row])
            scores = f"{reference.scores[one]:.2f} / {candidate.scores[other]:.2f}"
            canvas.label(candidate, other, f"{differences.box_px[row]:.0f} px, {scores}", (60,) * 3)
    stream = io.BytesIO()
    # Subsampled colours would blur thin lines.
    image.save(stream, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return stream.getvalue()


def _list_drawn(found: Detections, score_thresholds: Sequence[float]) -> Iterator[int]:
    # The best last, so that it lies on top.
    for place in reversed(range(len(found))):
        if float(found.scores[place]) > score_thresholds[int(found.labels[place])]:
            yield place


def _describe(found: Detections, place: int, names: Sequence[str]) -> str:
    return f"{names[int(found.labels[place])]} {float(found.scores[place]):.2f}"


class _Canvas:
    """A picture that is drawn on in its own pixels before it was enlarged."""

    def __init__(self, image: Image.Image, scale: float) -> None:
        self._draw = ImageDraw.Draw(image)
        self._size = image.size
        self._scale = scale
        self._line = max(2, round(max(image.size) / 300))
        self._font = ImageFont.load_default(size=max(13, round(max(image.size) / 38)))
        self._labels: list[Rectangle] = []

    def _corners(self, found: Detections, place: int) -> Rectangle:
        left, top, right, bottom = (found.boxes_xyxy[place] * self._scale).tolist()
        return left, top, right, bottom

    def box(
        self,
        found: Detections,
        place: int,
        colour: tuple[int, int, int],
        *,
        is_thick: bool,
        is_dashed: bool = False,
    ) -> None:
        corners = self._corners(found, place)
        width = self._line * (2 if is_thick else 1)
        if not is_dashed:
            if is_thick:
                self._draw.rectangle(_grow(corners, 2), outline=_HALO, width=width + 4)
            self._draw.rectangle(corners, outline=colour, width=width)
            return
        # On the reference's line, which lies inside the corners.
        inside = _grow(corners, -(width - 1) / 2)
        for start, end in _dash(inside, 5.0 * self._line):
            if is_thick:
                self._draw.line([start, end], fill=_HALO, width=width + 4)
            self._draw.line([start, end], fill=colour, width=width)

    def label(self, found: Detections, place: int, text: str, colour: tuple[int, int, int]) -> None:
        left, top, right, bottom = self._draw.textbbox((0, 0), text, font=self._font)
        width, height = right - left + 8, bottom - top + 6
        spot = find_label_spot(
            self._corners(found, place),
            width=width,
            height=height,
            taken=self._labels,
            picture=self._size,
        )
        self._labels.append(spot)
        self._draw.rectangle(spot, fill=colour, outline=_HALO)
        origin = (spot[0] + 4 - left, spot[1] + 3 - top)
        self._draw.text(origin, text, fill=_HALO, font=self._font)


def find_label_spot(
    box: Rectangle,
    *,
    width: float,
    height: float,
    taken: Sequence[Rectangle],
    picture: tuple[int, int],
) -> Rectangle:
    """A place for a label beside its box, inside the picture.

    Args:
        box: What is labelled: left, top, right, bottom.
        width: Of the label.
        height: Of the label.
        taken: Places of other labels.
        picture: Width and height of the picture.

    Returns:
        Above the box's left corner where that is free, else the next of several places that is; on
        another label when none is.
    """
    left, top, right, bottom = box
    corners = [
        (left, top - height),
        (left, bottom),
        (right - width, top - height),
        (right - width, bottom),
        (left, top),
        (left, bottom - height),
        *((left, top + step * height) for step in range(1, 8)),
    ]
    spots = [_move_inside(corner, width, height, picture) for corner in corners]
    free = [spot for spot in spots if not any(_overlap(spot, other) for other in taken)]
    return (free or spots)[0]


def _move_inside(
    corner: tuple[float, float], width: float, height: float, picture: tuple[int, int]
) -> Rectangle:
    left = min(max(corner[0], 0), max(0, picture[0] - width - 1))
    top = min(max(corner[1], 0), max(0, picture[1] - height - 1))
    return left, top, left + width, top + height


def _grow(box: Rectangle, pixels: float) -> Rectangle:
    return box[0] - pixels, box[1] - pixels, box[2] + pixels, box[3] + pixels


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _dash(
    box: Rectangle, length: float
) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    """Pieces of the four sides, as long as the gaps between them; at least two on a side."""
    left, top, right, bottom = box
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    for (x1, y1), (x2, y2) in itertools.pairwise(corners):
        side = abs(x2 - x1) + abs(y2 - y1)
        num_pieces = max(2, round(side / (2 * length)))
        for number in range(num_pieces):
            start, end = (
                (2 * number + 0.5) / (2 * num_pieces),
                (2 * number + 1.5) / (2 * num_pieces),
            )
            yield (
                (x1 + (x2 - x1) * start, y1 + (y2 - y1) * start),
                (x1 + (x2 - x1) * end, y1 + (y2 - y1) * end),
            )
