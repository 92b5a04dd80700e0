"""What a model found in one image, in the image's own pixels: to count, filter, draw and write."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image

from retinaray.data.coco import CategoryTable, ImageTargets
from retinaray.data.coco_results import coco_results, round_boxes
from retinaray.data.transforms import Placement
from retinaray.detector.postprocess import Detections
from retinaray.errors import ImageError, RetinarayError
from retinaray.reporting.overlays import draw_detections

# What a notebook shows is looked at, not measured.
_LONGEST_SHOWN_SIDE = 1280
_MAX_LISTED = 5


class DetectedObject(NamedTuple):
    """One object.

    Attributes:
        box_xyxy: Corners in pixels of the image.
        score: In [0, 1].
        class_index: In [0, K).
        category_id: The class's id in COCO files.
        name: The class's name.
    """

    box_xyxy: tuple[float, float, float, float]
    score: float
    class_index: int
    category_id: int | str
    name: str


@dataclass(frozen=True, eq=False, repr=False)
class ImageDetections:
    """What was found in one image, D objects by falling score; D may be 0.

    Iterating gives `DetectedObject`; `len` is D. A notebook shows the image with its boxes.

    Attributes:
        image: Path or URI of the image, or `images[i]` for one that came as bytes or pixels.
        height: Upright height in pixels; 0 if the image could not be read.
        width: Upright width in pixels; 0 if the image could not be read.
        boxes_xyxy: float32 [D, 4], corners in pixels of the upright image, inside it.
        scores: float32 [D], in [0, 1].
        class_indices: int64 [D], in [0, K).
        categories: The model's classes: `categories.names[i]`, `categories.ids[i]`.
        error: Why nothing could be found; empty when the image was read.
    """

    image: str
    height: int
    width: int
    boxes_xyxy: Float[np.ndarray, "D 4"]
    scores: Float[np.ndarray, " D"]
    class_indices: Int[np.ndarray, " D"]
    categories: CategoryTable
    error: str = ""
    _decode: Callable[[], UInt8[np.ndarray, "h w 3"]] | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[DetectedObject]:
        for box, score, index in zip(
            self.boxes_xyxy.tolist(), self.scores.tolist(), self.class_indices.tolist(), strict=True
        ):
            left, top, right, bottom = box
            category = self.categories.categories[index]
            corners = (left, top, right, bottom)
            yield DetectedObject(corners, score, index, category.id, category.name)

    def __repr__(self) -> str:
        if self.error:
            return f"ImageDetections({self.image}: not read: {self.error})"
        found = [f"{item.name} {item.score:.2f}" for item in self]
        more = [f"{len(self) - _MAX_LISTED} more"] if len(self) > _MAX_LISTED else []
        listed = ", ".join(found[:_MAX_LISTED] + more) or "nothing found"
        return f"ImageDetections({self.image}, {self.height}x{self.width}: {listed})"

    @property
    def category_ids(self) -> tuple[int | str, ...]:
        """COCO category id of each object."""
        return tuple(self.categories.ids[index] for index in self.class_indices.tolist())

    @property
    def names(self) -> tuple[str, ...]:
        """Class name of each object."""
        return tuple(self.categories.names[index] for index in self.class_indices.tolist())

    def filter(self, score_threshold: float) -> ImageDetections:
        """The objects that score above a threshold, which is what a model loaded with it finds."""
        # float32, as where the model compares; in float64 0.3 is less than the score 0.3.
        kept = self.scores > np.float32(score_threshold)
        return replace(
            self,
            boxes_xyxy=self.boxes_xyxy[kept],
            scores=self.scores[kept],
            class_indices=self.class_indices[kept],
        )

    def to_coco(self, image_id: int | str) -> list[dict[str, object]]:
        """COCO results, rounded as `evaluate` and `infer` write them.

        Args:
            image_id: The image's id in the COCO file.

        Returns:
            One entry per object: image_id, category_id, bbox [x, y, width, height] in pixels,
            score; best first.
        """
        # The boxes are the image's own already: nothing is left to scale.
        placement = Placement(self.height, self.width, self.height, self.width)
        found = Detections(
            torch.from_numpy(self.boxes_xyxy),
            torch.from_numpy(self.scores),
            torch.from_numpy(self.class_indices),
        )
        results = coco_results(found, placement, self.categories) if len(self) else ()
        return [{"image_id": image_id, **entry} for entry in results]

    def draw(self, truth: ImageTargets | None = None) -> Image.Image:
        """The image with boxes, names and scores; small images are enlarged.

        An image that came as a path or URI is read again, pixels are taken as they are now.

        Args:
            truth: Ground truth of this image, drawn in white; see `read_dataset`.

        Raises:
            ImageError: If it cannot be decoded.
            StorageError: If it is no longer there.
        """
        if self.error or self._decode is None:
            raise ImageError(
                f"{self.image}: cannot be drawn: {self.error or 'there are no pixels'}"
            )
        names = {category.id: category.name for category in self.categories.categories}
        boxes = [] if truth is None else list_truth(truth)
        return Image.fromarray(draw_detections(self._decode(), self.to_coco(0), boxes, names=names))

    def _repr_png_(self) -> bytes | None:
        """The picture for a notebook; none if the image can no longer be had."""
        try:
            picture = self.draw()
        except RetinarayError:
            return None
        picture.thumbnail((_LONGEST_SHOWN_SIDE, _LONGEST_SHOWN_SIDE))
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        return stream.getvalue()


def place_detections(
    found: Detections,
    placement: Placement,
    *,
    image: str,
    categories: CategoryTable,
    score_threshold: float | None,
    decode: Callable[[], UInt8[np.ndarray, "h w 3"]],
) -> ImageDetections:
    """Detections of a network as those of its image.

    Args:
        found: In network pixels, on the CPU.
        placement: Where the image lies on its canvas.
        image: What it is called.
        categories: The model's classes.
        score_threshold: Only what scores above; none = everything.
        decode: Gives the image's pixels.

    Returns:
        In original pixels. Boxes that lie in the padding are left out, as in COCO results.
    """
    _, is_inside = round_boxes(found.boxes_xyxy.numpy(), placement)
    boxes_xyxy = placement.to_original(found.boxes_xyxy.numpy())
    placed = ImageDetections(
        image=image,
        height=placement.height,
        width=placement.width,
        boxes_xyxy=boxes_xyxy[is_inside],
        scores=found.scores.numpy()[is_inside],
        class_indices=found.labels.numpy().astype(np.int64)[is_inside],
        categories=categories,
        _decode=decode,
    )
    return placed if score_threshold is None else placed.filter(score_threshold)


def fail_detections(image: str, categories: CategoryTable, error: str) -> ImageDetections:
    """The entry of an image that could not be read."""
    return ImageDetections(
        image=image,
        height=0,
        width=0,
        boxes_xyxy=np.zeros((0, 4), dtype=np.float32),
        scores=np.zeros(0, dtype=np.float32),
        class_indices=np.zeros(0, dtype=np.int64),
        categories=categories,
        error=error,
    )


def list_truth(truth: ImageTargets) -> list[Mapping[str, object]]:
    """Ground truth as COCO annotations, as far as drawing wants them."""
    corners = truth.boxes_xyxy.astype(np.float64)
    xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    return [{"bbox": box} for box in xywh.tolist()]
