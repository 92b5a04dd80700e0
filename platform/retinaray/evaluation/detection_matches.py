"""Which detections hit which ground truth, decided once for every score threshold and every cap.

COCO's matching is greedy by score within one image and class, so a detection's match does not
depend on any lower-scored one: whatever keeps the best of a list keeps its matches. T IoU
thresholds, D detections, K classes in the order of the ground truth's table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from retinaray.data.coco import CategoryTable
from retinaray.data.coco_results import round_boxes, round_scores
from retinaray.evaluation.candidates import CandidateSet, DetectionSetting, suppress_candidates

# The very expression of pycocotools: the values differ from 0.55, 0.60, ... in the last bit.
COCO_IOUS: Float[np.ndarray, " 10"] = np.linspace(
    0.5, 0.95, int(np.round((0.95 - 0.5) / 0.05)) + 1, endpoint=True
)
COCO_MAX_DETECTIONS = 100
"""Detections of one class in one image that COCO's AP looks at."""
# COCO's area range "all", in square pixels: what is larger is ignored.
_LARGEST_AREA = 1e5**2


@dataclass(frozen=True, eq=False)
class BoxGroup:
    """Ground truth of one class in one image, crowds and other ignored boxes last.

    Attributes:
        boxes_xywh: float64 [M, 4], original pixels.
        is_crowd: uint8 [M].
        is_ignored: bool [M].
    """

    boxes_xywh: Float[np.ndarray, "M 4"]
    is_crowd: Int[np.ndarray, " M"]
    is_ignored: Bool[np.ndarray, " M"]


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """COCO ground truth by image and class.

    Attributes:
        image_index: Number of each image id, in the order of the file.
        class_index: Number of each category id, in the order of the file.
        names: K class names.
        groups: Boxes by image and class number; absent where there are none.
        num_boxes: int64 [K], boxes that are not ignored.
    """

    image_index: Mapping[int | str, int]
    class_index: Mapping[int | str, int]
    names: tuple[str, ...]
    groups: Mapping[tuple[int, int], BoxGroup]
    num_boxes: Int[np.ndarray, " K"]


@dataclass(frozen=True, eq=False)
class MatchedDetections:
    """Detections with what they hit, by class and in each class by falling score.

    Attributes:
        starts: int64 [K + 1]; class k owns columns `starts[k]` to `starts[k + 1]`.
        scores: float64 [D], as in COCO results.
        raw_scores: float32 [D], as they were before rounding: thresholds compare with these.
        ranks: int64 [D], position among all detections of its image, from 0.
        class_ranks: int64 [D], position among those of its image and class.
        is_hit: bool [T, D], matched with a box, a crowd or another ignored box.
        is_ignored: bool [T, D], counts neither way.
        truth: What they were matched with.
    """

    starts: Int[np.ndarray, " K+1"]
    scores: Float[np.ndarray, " D"]
    raw_scores: Float[np.ndarray, " D"]
    ranks: Int[np.ndarray, " D"]
    class_ranks: Int[np.ndarray, " D"]
    is_hit: Bool[np.ndarray, "T D"]
    is_ignored: Bool[np.ndarray, "T D"]
    truth: GroundTruth


@dataclass(frozen=True, eq=False)
class _ImageDetections:
    """Detections of one image by falling score; columns as in `MatchedDetections`."""

    image: int
    boxes_xywh: Float[np.ndarray, "D 4"]
    scores: Float[np.ndarray, " D"]
    raw_scores: Float[np.ndarray, " D"]
    ranks: Int[np.ndarray, " D"]
    labels: Int[np.ndarray, " D"]


def index_ground_truth(content: Mapping[str, Any]) -> GroundTruth:
    """Group a COCO file's boxes.

    Args:
        content: images, annotations, categories. Missing `area` and `iscrowd` count as w * h and 0.
            Ids may be strings.

    Raises:
        ValueError: If an annotation names an image or a category that the file does not have.
    """
    images = {image["id"]: number for number, image in enumerate(content["images"])}
    classes = {entry["id"]: number for number, entry in enumerate(content["categories"])}
    rows: dict[tuple[int, int], list[tuple[Sequence[float], bool, bool]]] = {}
    num_boxes = np.zeros(len(classes), dtype=np.int64)
    for annotation in content["annotations"]:
        image = _find("annotation", "image_id", annotation["image_id"], images)
        label = _find("annotation", "category_id", annotation["category_id"], classes)
        box = annotation["bbox"]
        area = annotation.get("area")
        area = box[2] * box[3] if area is None else area
        is_crowd = bool(annotation.get("iscrowd") or 0)
        is_ignored = is_crowd or not 0 <= area <= _LARGEST_AREA
        num_boxes[label] += not is_ignored
        rows.setdefault((image, label), []).append((box, is_crowd, is_ignored))
    return GroundTruth(
        image_index=images,
        class_index=classes,
        names=tuple(str(entry.get("name", entry["id"])) for entry in content["categories"]),
        groups={key: _make_group(group) for key, group in rows.items()},
        num_boxes=num_boxes,
    )


def _find(label: str, key: str, value: Any, known: Mapping[int | str, int]) -> int:
    if value not in known:
        raise ValueError(
            f"{label} has {key}={value!r}, which the ground truth does not have: evaluate against "
            "the annotations that belong to these images and classes"
        )
    return known[value]


def _make_group(rows: list[tuple[Sequence[float], bool, bool]]) -> BoxGroup:
    # A stable sort: among equal overlaps the order of the file decides, as in pycocotools.
    rows = sorted(rows, key=lambda row: row[2])
    return BoxGroup(
        boxes_xywh=np.array([box for box, _, _ in rows], dtype=np.float64).reshape(-1, 4),
        is_crowd=np.array([crowd for _, crowd, _ in rows], dtype=np.uint8),
        is_ignored=np.array([ignored for _, _, ignored in rows], dtype=bool),
    )


def match_candidates(
    candidates: CandidateSet,
    setting: DetectionSetting,
    categories: CategoryTable,
    truth: GroundTruth,
    *,
    ious: Float[np.ndarray, " T"] = COCO_IOUS,
) -> MatchedDetections:
    """Apply a setting to cached candidates and match what is left.

    Args:
        candidates: Of all images; images of the ground truth that are not there have no detections.
        setting: Thresholds, suppression and cap.
        categories: The model's classes.
        truth: The ground truth.
        ious: Overlaps from which a detection hits, in [0, 1].

    Raises:
        ValueError: If a threshold is below the candidates' floor, or an image or a class that has
            detections is not in the ground truth.
    """
    numbers = np.array([truth.class_index.get(identity, -1) for identity in categories.ids])

    def place() -> Iterable[_ImageDetections]:
        for identity, placement, kept in suppress_candidates(candidates, setting):
            boxes_xywh, is_inside = round_boxes(kept.boxes_xyxy.numpy(), placement)
            labels = numbers[kept.labels.numpy()][is_inside]
            if (labels < 0).any():
                first = int(kept.labels.numpy()[is_inside][labels < 0][0])
                _find("a detection", "category_id", categories.ids[first], truth.class_index)
            raw_scores = kept.scores.numpy()[is_inside]
            yield _ImageDetections(
                image=_find("a detection", "image_id", identity, truth.image_index),
                boxes_xywh=boxes_xywh[is_inside],
                scores=round_scores(raw_scores),
                raw_scores=raw_scores,
                # What lies in the padding takes a place under the cap before it is dropped.
                ranks=np.flatnonzero(is_inside),
                labels=labels,
            )

    return _match(place(), truth, ious)


def match_results(
    results: Sequence[Mapping[str, Any]],
    truth: GroundTruth,
    *,
    ious: Float[np.ndarray, " T"] = COCO_IOUS,
) -> MatchedDetections:
    """Match COCO results, in any order.

    Args:
        results: image_id, category_id, bbox xywh in original pixels, score; may be empty.
        truth: The ground truth.
        ious: Overlaps from which a detection hits, in [0, 1].

    Raises:
        ValueError: If a detection names an image or a category that the ground truth does not have.
    """
    by_image: dict[int, list[tuple[float, int, Sequence[float]]]] = {}
    for found in results:
        image = _find("a detection", "image_id", found["image_id"], truth.image_index)
        label = _find("a detection", "category_id", found["category_id"], truth.class_index)
        by_image.setdefault(image, []).append((found["score"], label, found["bbox"]))

    def place() -> Iterable[_ImageDetections]:
        for image, rows in by_image.items():
            rows.sort(key=lambda row: -row[0])
            scores = np.array([score for score, _, _ in rows], dtype=np.float64)
            yield _ImageDetections(
                image=image,
                boxes_xywh=np.array([box for _, _, box in rows], dtype=np.float64).reshape(-1, 4),
                scores=scores,
                raw_scores=scores.astype(np.float32),
                ranks=np.arange(len(rows)),
                labels=np.array([label for _, label, _ in rows], dtype=np.int64),
            )

    return _match(place(), truth, ious)


def _match(
    images: Iterable[_ImageDetections], truth: GroundTruth, ious: Float[np.ndarray, " T"]
) -> MatchedDetections:
    # Among equal scores of a class, pycocotools goes by the order of the images in the file.
    found = sorted(images, key=lambda item: item.image)
    nothing = np.zeros((len(ious), 0), dtype=bool)
    hits, ignored, class_ranks = [nothing], [nothing], [np.zeros(0, dtype=np.int64)]
    for item in found:
        is_hit = np.zeros((len(ious), len(item.labels)), dtype=bool)
        is_ignored = np.zeros_like(is_hit)
        ranks = np.zeros(len(item.labels), dtype=np.int64)
        for label in np.unique(item.labels).tolist():
            rows = np.flatnonzero(item.labels == label)
            ranks[rows] = np.arange(len(rows))
            boxes_xywh = item.boxes_xywh[rows]
            is_hit[:, rows], is_ignored[:, rows] = match_boxes(
                boxes_xywh, truth.groups.get((item.image, label)), ious
            )
        hits.append(is_hit)
        ignored.append(is_ignored)
        class_ranks.append(ranks)
    labels = _join([item.labels for item in found], np.int64)
    scores = _join([item.scores for item in found], np.float64)
    order = np.lexsort((-scores, labels))
    num_each = np.bincount(labels, minlength=len(truth.names))
    return MatchedDetections(
        starts=np.append(0, np.cumsum(num_each)).astype(np.int64),
        scores=scores[order],
        raw_scores=_join([item.raw_scores for item in found], np.float32)[order],
        ranks=_join([item.ranks for item in found], np.int64)[order],
        class_ranks=np.concatenate(class_ranks)[order],
        is_hit=np.concatenate(hits, axis=1)[:, order],
        is_ignored=np.concatenate(ignored, axis=1)[:, order],
        truth=truth,
    )


def _join(parts: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=dtype), *parts])


def match_boxes(
    boxes_xywh: Float[np.ndarray, "D 4"], group: BoxGroup | None, ious: Float[np.ndarray, " T"]
) -> tuple[Bool[np.ndarray, "T D"], Bool[np.ndarray, "T D"]]:
    """Match detections of one class in one image, greedily by their order.

    Args:
        boxes_xywh: By falling score; D may be 0.
        group: Ground truth; none = there is none.
        ious: Overlaps from which a detection hits.

    Returns:
        Whether each hits anything at each overlap, and whether it counts neither way: because it
        hit only what is ignored, or hit nothing and is larger than COCO's largest area.

    Source: pycocotools' COCOeval.evaluateImg, area range "all". A box takes the free ground truth
    that it overlaps most (of equals the last), and an ignored one only if no other is left; only
    crowds can be taken twice.
    """
    shape = (len(ious), len(boxes_xywh))
    is_hit, is_ignored = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    if group is not None and len(boxes_xywh):
        _match_greedily(boxes_xywh, group, np.minimum(ious, 1 - 1e-10), is_hit, is_ignored)
    is_ignored |= ~is_hit & (boxes_xywh[:, 2] * boxes_xywh[:, 3] > _LARGEST_AREA)
    return is_hit, is_ignored


def _match_greedily(
    boxes_xywh: Float[np.ndarray, "D 4"],
    group: BoxGroup,
    ious: Float[np.ndarray, " T"],
    is_hit: Bool[np.ndarray, "T D"],
    is_ignored: Bool[np.ndarray, "T D"],
) -> None:
    """Fill `is_hit` and `is_ignored`."""
    from pycocotools import mask

    overlaps = np.asarray(mask.iou(boxes_xywh, group.boxes_xywh, group.is_crowd))
    num_counted = int(np.count_nonzero(~group.is_ignored))
    is_free = np.ones((len(ious), len(group.is_ignored)), dtype=bool)
    levels = np.arange(len(ious))
    for row in np.flatnonzero(overlaps.max(axis=1) >= ious.min()).tolist():
        is_open = is_free & (overlaps[row] >= ious[:, None])
        is_counted = is_open[:, :num_counted].any(axis=1)
        # An ignored box is looked at only where no other is left.
        is_open[is_counted, num_counted:] = False
        best = _last_largest(np.where(is_open, overlaps[row], -1.0))
        hit = is_open[levels, best]
        is_hit[:, row] = hit
        is_ignored[:, row] = hit & group.is_ignored[best]
        is_free[levels[hit], best[hit]] = group.is_crowd[best[hit]] > 0


def _last_largest(values: Float[np.ndarray, "T M"]) -> Int[np.ndarray, " T"]:
    return np.asarray(values.shape[1] - 1 - np.argmax(values[:, ::-1], axis=1))
