"""From detections on a canvas to COCO results in original pixels, rounded in one way everywhere.

Fresh inference and the replay of cached candidates both end here, so that they can be compared
number by number. D detections of one image.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float

from retinaray.data.coco import CategoryTable
from retinaray.data.transforms import Placement
from retinaray.detector.postprocess import Detections

BOX_DIGITS = 2
"""Corners are rounded to a hundredth of a pixel, below what any runtime repeats."""
SCORE_DIGITS = 6
"""Scores are rounded to a millionth, below what any runtime repeats."""


def round_boxes(
    boxes_xyxy: Float[np.ndarray, "D 4"], placement: Placement
) -> tuple[Float[np.ndarray, "D 4"], Bool[np.ndarray, " D"]]:
    """Boxes as they stand in results.

    Args:
        boxes_xyxy: In network pixels; D may be 0.
        placement: Where the image lies on its canvas.

    Returns:
        Boxes xywh in original pixels, float64, rounded corner by corner so that none leaves its
        image; and whether each has an area there. Those that lie in the padding have none.
    """
    corners = placement.to_original(boxes_xyxy).astype(np.float64).round(BOX_DIGITS)
    sides = corners[:, 2:] - corners[:, :2]
    bbox_xywh = np.concatenate([corners[:, :2], sides.round(BOX_DIGITS)], axis=1)
    return bbox_xywh, (sides[:, 0] > 0) & (sides[:, 1] > 0)


def round_scores(scores: Float[np.ndarray, " D"]) -> Float[np.ndarray, " D"]:
    """Scores as they stand in results, float64."""
    return scores.astype(np.float64).round(SCORE_DIGITS)


def coco_results(
    detections: Detections, placement: Placement, categories: CategoryTable
) -> Iterator[dict[str, object]]:
    """COCO results of one image, without their image_id.

    Args:
        detections: In network pixels, on the CPU.
        placement: Where the image lies on its canvas.
        categories: Class index to category.

    Yields:
        category_id, bbox xywh in original pixels, score; in the order of the detections. Boxes that
        lie in the padding are left out.
    """
    bbox_xywh, is_inside = round_boxes(detections.boxes_xyxy.numpy(), placement)
    ids = categories.ids
    for bbox, score, label, inside in zip(
        bbox_xywh.tolist(),
        round_scores(detections.scores.numpy()).tolist(),
        detections.labels.tolist(),
        is_inside.tolist(),
        strict=True,
    ):
        if inside:
            yield {"category_id": ids[label], "bbox": bbox, "score": score}
