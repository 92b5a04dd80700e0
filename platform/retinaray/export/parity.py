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

# Detections this close to the threshold may fall on either side of it by rounding alone.
_SCORE_MARGIN = 0.02
_SAME_BOX_IOU = 0.5


@dataclass(frozen=True)
class ParityReport:
    """How far a candidate lies from its reference.

    Attributes:
        num_images: Canvases that were compared.
        num_boxes: Detections of the reference that score clearly above the threshold.
        num_missing: Those for which the candidate has no box of the same class.
        max_box_px: Largest corner difference of a matched box.
        mean_box_px: Mean of the largest corner difference per box.
        max_score: Largest difference of score.
    """

    num_images: int
    num_boxes: int
    num_missing: int
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
    num_boxes = num_missing = 0
    box_differences: list[float] = []
    score_differences: list[float] = []
    for canvas in canvases:
        expected = reference.predict(canvas[None])[0]
        found = candidate.predict(canvas[None])[0]
        is_clear = expected.scores > float(min(reference.card.score_thresholds)) + _SCORE_MARGIN
        for box, score, label in zip(
            expected.boxes_xyxy[is_clear],
            expected.scores[is_clear],
            expected.labels[is_clear],
            strict=True,
        ):
            num_boxes += 1
            partner = _find_partner(box, label, found)
            if partner is None:
                num_missing += 1
                continue
            box_differences.append(float((found.boxes_xyxy[partner] - box).abs().max()))
            score_differences.append(float((found.scores[partner] - score).abs()))
    return ParityReport(
        num_images=len(canvases),
        num_boxes=num_boxes,
        num_missing=num_missing,
        max_box_px=max(box_differences, default=0.0),
        mean_box_px=float(np.mean(box_differences)) if box_differences else 0.0,
        max_score=max(score_differences, default=0.0),
    )


def _find_partner(box: Tensor, label: Tensor, found: Detections) -> int | None:
    """Index of the detection of that class which overlaps the box most; none below half."""
    overlaps = box_iou(box[None], found.boxes_xyxy)[0] * (found.labels == label)
    if len(found) == 0 or float(overlaps.max()) < _SAME_BOX_IOU:
        return None
    return int(overlaps.argmax())


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
