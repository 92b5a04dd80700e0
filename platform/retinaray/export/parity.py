"""Do two runtimes of one model find the same boxes? Compared box by box on the same canvases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.ops import box_iou

from retinaray.detector.postprocess import Detections
from retinaray.inference.predictor import Predictor

# Scores may differ by this much for rounding alone, so that detections this close to their
# threshold may fall on either side of it.
SCORE_MARGIN = 0.02
_SAME_BOX_IOU = 0.5


@dataclass(frozen=True)
class ParityReport:
    """How far a candidate lies from its reference.

    Attributes:
        num_images: Canvases that were compared.
        num_boxes: Detections of the reference that score clearly above the threshold.
        num_missing: Those for which the candidate has no box of the same class.
        num_extra: Clear detections of the candidate for which the reference has none.
        max_box_px: Largest corner difference of a matched box.
        mean_box_px: Mean of the largest corner difference per box.
        max_score: Largest difference of score.
    """

    num_images: int
    num_boxes: int
    num_missing: int
    num_extra: int
    max_box_px: float
    mean_box_px: float
    max_score: float


def compare_predictors(
    reference: Predictor, candidate: Predictor, canvases: Sequence[UInt8[Tensor, "3 H W"]]
) -> ParityReport:
    """Run both on the same canvases and match their boxes.

    Args:
        reference: Defines what is right.
        candidate: Is compared with it; takes canvases of the same size.
        canvases: Images; may be empty.
    """
    num_boxes = num_missing = num_extra = 0
    box_differences: list[float] = []
    score_differences: list[float] = []
    for canvas in canvases:
        expected = reference.predict(canvas[None])[0]
        found = candidate.predict(canvas[None])[0]
        limits = torch.tensor(reference.card.score_thresholds) + SCORE_MARGIN
        num_extra += sum(
            _find_partner(found, index, expected) is None for index in _list_clear(found, limits)
        )
        for index in _list_clear(expected, limits):
            num_boxes += 1
            partner = _find_partner(expected, index, found)
            if partner is None:
                num_missing += 1
                continue
            box = expected.boxes_xyxy[index]
            box_differences.append(float((found.boxes_xyxy[partner] - box).abs().max()))
            score_differences.append(float((found.scores[partner] - expected.scores[index]).abs()))
    return ParityReport(
        num_images=len(canvases),
        num_boxes=num_boxes,
        num_missing=num_missing,
        num_extra=num_extra,
        max_box_px=max(box_differences, default=0.0),
        mean_box_px=float(np.mean(box_differences)) if box_differences else 0.0,
        max_score=max(score_differences, default=0.0),
    )


def _list_clear(detections: Detections, limits: Tensor) -> list[int]:
    """Indices of the detections that score clearly above the threshold of their class."""
    is_clear = detections.scores > limits[detections.labels]
    return [int(index) for index in is_clear.nonzero()[:, 0]]


def _find_partner(detections: Detections, index: int, others: Detections) -> int | None:
    """Index of the other of that class which overlaps the box most; none below half."""
    if len(others) == 0:
        return None
    overlaps = box_iou(detections.boxes_xyxy[index][None], others.boxes_xyxy)[0]
    overlaps = overlaps * (others.labels == detections.labels[index])
    return int(overlaps.argmax()) if float(overlaps.max()) >= _SAME_BOX_IOU else None


def make_test_canvases(
    canvas: tuple[int, int], count: int = 4, seed: int = 0
) -> list[UInt8[Tensor, "3 H W"]]:
    """Pictures of rectangles and noise, for a check without images.

    Args:
        canvas: Height and width.
        count: Number of pictures.
        seed: Of their contents.
    """
    height, width = canvas
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        picture = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        picture = picture.repeat(8, 0).repeat(8, 1)[:height, :width]
        for _ in range(12):
            top, left = int(rng.integers(0, height)), int(rng.integers(0, width))
            side = int(rng.integers(8, max(9, min(height, width) // 2)))
            picture[top : top + side, left : left + side] = rng.integers(0, 256, 3)
        pictures.append(torch.from_numpy(picture.copy()).permute(2, 0, 1))
    return pictures
