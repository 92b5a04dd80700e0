"""From detections on a canvas to COCO results in original pixels, rounded in one way everywhere.

Fresh inference and the replay of cached candidates both end here, so that they can be compared
number by number. D detections of one image.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from retinaray.data.coco import CategoryTable
from retinaray.data.transforms import Placement
from retinaray.detector.postprocess import Detections
from retinaray.errors import DatasetError

BOX_DIGITS = 2
"""Corners are rounded to a hundredth of a pixel, below what any runtime repeats."""
SCORE_DIGITS = 6
"""Scores are rounded to a millionth, below what any runtime repeats."""
_RESULT_KEYS = ("image_id", "category_id", "bbox", "score")
_SIDES = 4
_LONGEST_SHOWN = 60


def check_coco_results(content: Any, *, source: str) -> list[dict[str, Any]]:
    """The detections of a JSON file, of whatever origin.

    Args:
        content: What the file holds.
        source: Its name, for faults.

    Returns:
        The same: dicts with image_id, category_id, bbox (four finite numbers, xywh) and score (a
        finite number). Whether a data set has the ids is not known here.

    Raises:
        DatasetError: If it is no list of these; the first that is none is told by its number, from
            1, with what came.
    """
    if not isinstance(content, list):
        is_dataset = isinstance(content, dict) and "images" in content
        found = "a data set" if is_dataset else type(content).__name__
        raise DatasetError(
            f"{source}: expected a COCO results list, found {found}; give the detections.json "
            "of `retinaray infer`, or a model"
        )
    for number, entry in enumerate(content, start=1):
        fault = _find_fault(entry)
        if fault:
            raise DatasetError(
                f"{source}: detection {number}: {fault}; write each as image_id, category_id, bbox "
                "(x, y, width, height in pixels) and score"
            )
    return content


def _find_fault(entry: Any) -> str:
    if not isinstance(entry, dict):
        return f"expected an object, found {_show(entry)}"
    missing = [name for name in _RESULT_KEYS if name not in entry]
    if missing:
        return f"lacks {', '.join(missing)}"
    for name in ("image_id", "category_id"):
        if not isinstance(entry[name], (int, str)) or isinstance(entry[name], bool):
            return f"{name}: expected a whole number or a text, found {_show(entry[name])}"
    bbox, score = entry["bbox"], entry["score"]
    if not (isinstance(bbox, list) and len(bbox) == _SIDES and all(map(_is_finite, bbox))):
        return f"bbox: expected four finite numbers, found {_show(bbox)}"
    return "" if _is_finite(score) else f"score: expected a finite number, found {_show(score)}"


def _is_finite(value: Any) -> bool:
    # Larger integers than a float can hold are no coordinates, and `isfinite` cannot take them.
    if type(value) is int:
        return abs(value) <= sys.float_info.max
    return type(value) is float and math.isfinite(value)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


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
