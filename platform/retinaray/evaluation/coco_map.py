"""COCO's average precision, computed by pycocotools: the twelve numbers, per class and per size."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

TWELVE = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR_1",
    "AR_10",
    "AR_100",
    "AR_small",
    "AR_medium",
    "AR_large",
)
_SIZES = ("all", "small", "medium", "large")
# Row of pycocotools' IoU axis (0.50:0.05:0.95) and index of maxDets 100 on its last axis.
_IOU_50 = 0
_MAX_100 = 2


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class; None where it has no ground truth (of that size).

    Attributes:
        category_id: COCO id.
        name: COCO name.
        num_ground_truth: Boxes that are not crowds.
        AP: Mean over IoU 0.50:0.95.
        AP50: At IoU 0.50.
        AP_small: Area under 32 x 32 pixels.
        AP_medium: Up to 96 x 96.
        AP_large: Above.
        AR_100: Mean recall with 100 detections per image.
    """

    category_id: int | str
    name: str
    num_ground_truth: int
    AP: float | None
    AP50: float | None
    AP_small: float | None
    AP_medium: float | None
    AP_large: float | None
    AR_100: float | None


@dataclass(frozen=True)
class CocoScores:
    """Scores of a set of detections.

    Attributes:
        summary: COCO's twelve numbers by the names in TWELVE; None where there is no ground truth
            for them.
        classes: One entry per category, in the order of the ground truth's table.
        num_images: Images that were scored.
        num_detections: Detections that were scored.
    """

    summary: Mapping[str, float | None]
    classes: tuple[ClassScores, ...]
    num_images: int
    num_detections: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **self.summary,
            "classes": [asdict(scores) for scores in self.classes],
            "num_images": self.num_images,
            "num_detections": self.num_detections,
        }


def restrict_truth(
    ground_truth: Mapping[str, Any], image_ids: Container[int | str]
) -> dict[str, Any]:
    """The ground truth of some of its images.

    Args:
        ground_truth: A COCO file's content.
        image_ids: Images to keep, with their boxes.

    Returns:
        A copy without the other images; everything else is the same.
    """
    return {
        **ground_truth,
        "images": [image for image in ground_truth["images"] if image["id"] in image_ids],
        "annotations": [
            entry for entry in ground_truth["annotations"] if entry["image_id"] in image_ids
        ],
    }


def evaluate_detections(
    ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]
) -> CocoScores:
    """Score COCO results against COCO ground truth.

    Args:
        ground_truth: A COCO file's content: images, annotations, categories. Missing `area` and
            `iscrowd` count as w * h and 0. Ids may be strings.
        detections: COCO results: image_id, category_id, bbox xywh in original pixels, score; may be
            empty.

    Returns:
        The scores; a class without ground truth has None, never 0.

    Raises:
        ValueError: If a detection or an annotation names an image or a category that the ground
            truth does not have.

    Source: pycocotools' COCOeval with its default parameters (maxDets 1, 10, 100).
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = _number(image["id"] for image in ground_truth["images"])
    categories = _number(category["id"] for category in ground_truth["categories"])
    truth, found = COCO(), COCO()
    truth.dataset = {
        "images": [{"id": number} for number in images.values()],
        "categories": [{"id": number} for number in categories.values()],
        "annotations": _number_truth(ground_truth["annotations"], images, categories),
    }
    found.dataset = {
        **truth.dataset,
        "annotations": _number_detections(detections, images, categories),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.createIndex()
        evaluator = COCOeval(truth, found, "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    counts = _count_truth(truth.dataset["annotations"])
    return CocoScores(
        summary=dict(zip(TWELVE, map(_or_none, evaluator.stats), strict=True)),
        classes=tuple(
            _score_class(evaluator.eval, row, category, counts.get(categories[category["id"]], 0))
            for row, category in enumerate(ground_truth["categories"])
        ),
        num_images=len(images),
        num_detections=len(detections),
    )


def _number(ids: Any) -> dict[int | str, int]:
    """Numbers from 1: pycocotools cannot sort ids of mixed or string type."""
    return {identity: number for number, identity in enumerate(ids, start=1)}


def _number_truth(
    annotations: Sequence[Mapping[str, Any]],
    images: Mapping[int | str, int],
    categories: Mapping[int | str, int],
) -> list[dict[str, Any]]:
    numbered = []
    for number, annotation in enumerate(annotations, start=1):
        _refuse_unknown(f"annotation {number}", annotation, images, categories)
        area = annotation.get("area")
        numbered.append(
            {
                "id": number,
                "image_id": images[annotation["image_id"]],
                "category_id": categories[annotation["category_id"]],
                "bbox": annotation["bbox"],
                "area": annotation["bbox"][2] * annotation["bbox"][3] if area is None else area,
                "iscrowd": annotation.get("iscrowd") or 0,
            }
        )
    return numbered


def _number_detections(
    detections: Sequence[Mapping[str, Any]],
    images: Mapping[int | str, int],
    categories: Mapping[int | str, int],
) -> list[dict[str, Any]]:
    numbered = []
    for number, detection in enumerate(detections, start=1):
        _refuse_unknown(f"detection {number}", detection, images, categories)
        width, height = detection["bbox"][2:]
        numbered.append(
            {
                "id": number,
                "image_id": images[detection["image_id"]],
                "category_id": categories[detection["category_id"]],
                "bbox": detection["bbox"],
                "score": detection["score"],
                "area": width * height,
                "iscrowd": 0,
            }
        )
    return numbered


def _refuse_unknown(
    label: str,
    record: Mapping[str, Any],
    images: Mapping[int | str, int],
    categories: Mapping[int | str, int],
) -> None:
    for key, known in (("image_id", images), ("category_id", categories)):
        if record[key] not in known:
            raise ValueError(
                f"{label} has {key}={record[key]!r}, which the ground truth does not have: "
                "evaluate against the annotations that belong to these images and classes"
            )


def _count_truth(annotations: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for annotation in annotations:
        if not annotation["iscrowd"]:
            counts[annotation["category_id"]] = counts.get(annotation["category_id"], 0) + 1
    return counts


def _score_class(
    accumulated: Mapping[str, Any], row: int, category: Mapping[str, Any], count: int
) -> ClassScores:
    # precision: IoU, recall, class, size, maxDets. recall: IoU, class, size, maxDets.
    precision = accumulated["precision"][:, :, row, :, _MAX_100]
    by_size = {size: _mean(precision[:, :, index]) for index, size in enumerate(_SIZES)}
    return ClassScores(
        category_id=category["id"],
        name=str(category.get("name", category["id"])),
        num_ground_truth=count,
        AP=by_size["all"],
        AP50=_mean(precision[_IOU_50, :, 0]),
        AP_small=by_size["small"],
        AP_medium=by_size["medium"],
        AP_large=by_size["large"],
        AR_100=_mean(accumulated["recall"][:, row, 0, _MAX_100]),
    )


def _mean(values: Float[np.ndarray, ...]) -> float | None:
    """Mean of what pycocotools did not mark absent (-1)."""
    present = values[values > -1]
    return float(present.mean()) if present.size else None


def _or_none(value: float) -> float | None:
    return None if value < 0 else float(value)
