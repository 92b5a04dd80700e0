"""Which detection lies on which ground truth, whatever their classes, and what is taken for what.

`tabulate_overlaps` is done once; the confusion matrix, the error taxonomy, the calibration of
scores, the sizes and the gallery all look at its table. D detections of all images, M ground
truths, P pairs of the two that overlap, K classes in the order of the data set's table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from retinaray.data.coco import CocoDataset

LOWEST_IOU = 0.1
"""Pairs that overlap less are not kept."""
DEFAULT_MAX_DETECTIONS = 100
LARGEST_AREA = 1e5**2
"""COCO's area range "all", in square pixels: what is larger is ignored."""
# Pairs looked at together: some tens of megabytes.
_CHUNK_PAIRS = 1 << 18


@dataclass(frozen=True, eq=False)
class OverlapTable:
    """The detections of a data set, and where they overlap its ground truth.

    Attributes:
        dataset: The ground truth; its boxes are rows 0..M-1.
        positions: int64 [D], rising: the image `dataset.images[position]` of each detection; within
            an image by falling score, of equals by their order in the results.
        boxes_xywh: float64 [D, 4], original pixels.
        scores: float64 [D], in [0, 1].
        class_indices: int64 [D], in [0, K).
        pair_detections: int64 [P], rising: row of the detection.
        pair_truths: int64 [P], row of the ground truth, of any class, in the same image.
        pair_ious: float64 [P], at least LOWEST_IOU; for a crowd the share of the detection's area
            that it covers, as in COCO.
    """

    dataset: CocoDataset
    positions: Int[np.ndarray, " D"]
    boxes_xywh: Float[np.ndarray, "D 4"]
    scores: Float[np.ndarray, " D"]
    class_indices: Int[np.ndarray, " D"]
    pair_detections: Int[np.ndarray, " P"]
    pair_truths: Int[np.ndarray, " P"]
    pair_ious: Float[np.ndarray, " P"]

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def is_same_class(self) -> Bool[np.ndarray, " P"]:
        """Whether the two of a pair have one class."""
        found = self.class_indices[self.pair_detections]
        return np.asarray(found == self.dataset.class_indices[self.pair_truths])

    @property
    def is_truth_ignored(self) -> Bool[np.ndarray, " M"]:
        """Crowds and areas beyond COCO's largest: nobody has to find them, nobody errs there."""
        return np.asarray(self.dataset.is_crowd | ~(self.dataset.area <= LARGEST_AREA))


@dataclass(frozen=True, eq=False)
class ClassMatches:
    """COCO's matching within classes at one overlap.

    Attributes:
        truth_rows: int64 [D], the ground truth that a detection hits (maybe an ignored one), or -1.
        is_ignored: bool [D], detections that count neither way.
        is_found: bool [M], ground truths that count and are hit.
    """

    truth_rows: Int[np.ndarray, " D"]
    is_ignored: Bool[np.ndarray, " D"]
    is_found: Bool[np.ndarray, " M"]

    @property
    def is_hit(self) -> Bool[np.ndarray, " D"]:
        """Detections that hit a ground truth that counts."""
        return np.asarray((self.truth_rows >= 0) & ~self.is_ignored)


@dataclass(frozen=True, eq=False)
class ConfusionMatrix:
    """How often a class was taken for another, for nothing, or seen where nothing is.

    Attributes:
        counts: int64 [K + 1, K + 1]; rows are what is there, columns what was detected, the last of
            each is background. `counts[K, k]`: detections of class k on nothing. `counts[k, K]`:
            ground truths of class k that no detection took. `counts[K, K]` is 0.
        category_ids: K ids.
        names: K names.
        score_thresholds: K values; detections score above.
        iou: Overlap from which a detection takes a ground truth.
        num_ignored: Detections above the threshold that lie in a crowd and are not counted.
    """

    counts: Int[np.ndarray, "K+1 K+1"]
    category_ids: tuple[int | str, ...]
    names: tuple[str, ...]
    score_thresholds: tuple[float, ...]
    iou: float
    num_ignored: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "counts": self.counts.tolist(),
            "category_ids": list(self.category_ids),
            "names": list(self.names),
            "score_thresholds": list(self.score_thresholds),
            "iou": self.iou,
            "num_ignored": self.num_ignored,
        }


def tabulate_overlaps(
    results: Sequence[Mapping[str, Any]],
    dataset: CocoDataset,
    *,
    max_detections: int | None = DEFAULT_MAX_DETECTIONS,
) -> OverlapTable:
    """Put COCO results beside the ground truth.

    Args:
        results: image_id, category_id, bbox xywh in original pixels, score; in any order, may be
            empty.
        dataset: The ground truth.
        max_detections: The best of each image that are looked at, over all classes; None = all.

    Raises:
        ValueError: If a detection names an image or a category that the ground truth does not have,
            or its score or box is not finite.
    """
    places = {image.image_id: position for position, image in enumerate(dataset.images)}
    labels = {identity: index for index, identity in enumerate(dataset.categories.ids)}
    positions = _look_up(results, "image_id", places, dataset.source)
    class_indices = _look_up(results, "category_id", labels, dataset.source)
    scores = np.array([found["score"] for found in results], dtype=np.float64)
    boxes_xywh = np.array([found["bbox"] for found in results], dtype=np.float64).reshape(-1, 4)
    is_bad = ~(np.isfinite(scores) & np.isfinite(boxes_xywh).all(axis=1))
    if is_bad.any():
        row = int(np.argmax(is_bad))
        raise ValueError(
            f"detection {row + 1}: expected a finite score and box, got {dict(results[row])}: "
            "write the results anew"
        )
    order = np.lexsort((-scores, positions))
    if max_detections is not None:
        first = np.searchsorted(positions[order], positions[order], side="left")
        order = order[np.arange(len(order)) - first < max_detections]
    positions, boxes_xywh = positions[order], boxes_xywh[order]
    pairs = [
        np.concatenate(column)
        for column in zip(*_pair(positions, boxes_xywh, dataset), strict=True)
    ]
    return OverlapTable(dataset, positions, boxes_xywh, scores[order], class_indices[order], *pairs)


def _look_up(
    results: Sequence[Mapping[str, Any]],
    key: str,
    numbers: Mapping[int | str, int],
    source: str,
) -> Int[np.ndarray, " D"]:
    found = np.array([numbers.get(result[key], -1) for result in results], dtype=np.int64)
    if len(found) and found.min() < 0:
        row = int(np.argmin(found))
        raise ValueError(
            f"detection {row + 1} has {key}={results[row][key]!r}, which {source} does not have: "
            "compare with the annotations that belong to these images and classes"
        )
    return found


def _pair(
    positions: Int[np.ndarray, " D"], boxes_xywh: Float[np.ndarray, "D 4"], dataset: CocoDataset
) -> Iterator[tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"], Float[np.ndarray, " P"]]]:
    """Detection, ground truth and overlap of the pairs, chunk by chunk; at least one chunk."""
    corners = dataset.boxes_xyxy.astype(np.float64)
    truth_xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    num_truths = np.diff(dataset.offsets)[positions]
    ends = np.cumsum(num_truths)
    start = 0
    while True:
        begun = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, begun + _CHUNK_PAIRS, side="right")), start + 1)
        rows = np.arange(start, min(stop, len(positions)))
        found = np.repeat(rows, num_truths[rows])
        # Counts up from 0 within each detection.
        place = np.arange(len(found)) - (ends - num_truths)[found] + begun
        truths = dataset.offsets[positions[found]] + place
        ious = _measure_iou(boxes_xywh[found], truth_xywh[truths], dataset.is_crowd[truths])
        is_near = ious >= LOWEST_IOU
        yield found[is_near], truths[is_near], ious[is_near]
        start = stop
        if start >= len(positions):
            return


def _measure_iou(
    found_xywh: Float[np.ndarray, "P 4"],
    truth_xywh: Float[np.ndarray, "P 4"],
    is_crowd: Bool[np.ndarray, " P"],
) -> Float[np.ndarray, " P"]:
    """Overlap of pairs, to the last bit as pycocotools' bbIou; 0 for boxes without area."""
    far = np.minimum(found_xywh[:, :2] + found_xywh[:, 2:], truth_xywh[:, :2] + truth_xywh[:, 2:])
    sides = np.maximum(far - np.maximum(found_xywh[:, :2], truth_xywh[:, :2]), 0)
    shared = sides[:, 0] * sides[:, 1]
    area = found_xywh[:, 2] * found_xywh[:, 3]
    whole = np.where(is_crowd, area, area + truth_xywh[:, 2] * truth_xywh[:, 3] - shared)
    return np.asarray(np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0))


def match_classes(
    table: OverlapTable, *, iou: float = 0.5, area_range: tuple[float, float] = (0, np.inf)
) -> ClassMatches:
    """Match each class for itself, as COCO does, greedily by score.

    Args:
        table: Detections and ground truth.
        iou: Overlap from which a detection hits, in [LOWEST_IOU, 1].
        area_range: Square pixels, the end not included. Ground truth outside is ignored, and so are
            detections outside that hit nothing.

    Raises:
        ValueError: If `iou` is below LOWEST_IOU.

    Source: pycocotools' COCOeval.evaluateImg; see `detection_matches.match_boxes`.
    """
    if iou < LOWEST_IOU:
        raise ValueError(f"expected an overlap of at least {LOWEST_IOU}, got {iou}")
    area = table.dataset.area.astype(np.float64)
    is_ignored = table.is_truth_ignored | (area < area_range[0]) | (area >= area_range[1])
    kept = np.flatnonzero(table.is_same_class & (table.pair_ious >= min(iou, 1 - 1e-10)))
    truths = table.pair_truths[kept]
    # Ignored ones are looked at last; of equal overlaps the last ground truth is taken.
    keys = (-truths, -table.pair_ious[kept], is_ignored[truths], table.pair_detections[kept])
    truth_rows = _take_greedily(table, kept[np.lexsort(keys)])
    hits = np.flatnonzero(truth_rows >= 0)
    found_area = table.boxes_xywh[:, 2] * table.boxes_xywh[:, 3]
    is_out = (found_area < area_range[0]) | (found_area >= area_range[1])
    is_out |= found_area > LARGEST_AREA
    is_out[hits] = is_ignored[truth_rows[hits]]
    is_found = np.zeros(len(area), dtype=bool)
    is_found[truth_rows[hits]] = True
    return ClassMatches(truth_rows, is_out, is_found & ~is_ignored)


def _take_greedily(table: OverlapTable, pairs: Int[np.ndarray, " Q"]) -> Int[np.ndarray, " D"]:
    """Give each detection the first free ground truth of its pairs, or -1; crowds stay free."""
    taken = np.full(len(table), -1, dtype=np.int64)
    is_free = np.ones(len(table.dataset.area), dtype=bool).tolist()
    is_crowd = table.dataset.is_crowd.tolist()
    rows, truths = table.pair_detections[pairs].tolist(), table.pair_truths[pairs].tolist()
    done = -1
    for row, truth in zip(rows, truths, strict=True):
        if row != done and is_free[truth]:
            taken[row] = truth
            is_free[truth] = is_crowd[truth]
            done = row
    return taken


def spread_thresholds(
    score_thresholds: float | Sequence[float], num_classes: int
) -> Float[np.ndarray, " K"]:
    """One threshold per class from one for all, or from K.

    Raises:
        ValueError: If there are neither one nor K.
    """
    values = np.atleast_1d(np.asarray(score_thresholds, dtype=np.float64))
    if isinstance(score_thresholds, Sequence) and len(values) != num_classes:
        raise ValueError(f"{len(values)} score thresholds for {num_classes} classes")
    return np.broadcast_to(values, (num_classes,))


def count_confusions(
    table: OverlapTable, *, score_thresholds: float | Sequence[float] = 0.3, iou: float = 0.5
) -> ConfusionMatrix:
    """Count what was taken for what.

    Every detection above its threshold takes, by falling score, one free ground truth that it
    overlaps: one of its own class if there is any, else the one that it overlaps most. Each
    detection and each ground truth is counted once, so row k sums to the ground truths of class k
    and column k to its detections that are not in a crowd of their class.

    Args:
        table: Detections and ground truth.
        score_thresholds: A detection must score above; one for all classes, or K.
        iou: Overlap from which a detection takes a ground truth, in [LOWEST_IOU, 1].

    Raises:
        ValueError: If `iou` is below LOWEST_IOU, or the number of thresholds is neither 1 nor K.
    """
    if iou < LOWEST_IOU:
        raise ValueError(f"expected an overlap of at least {LOWEST_IOU}, got {iou}")
    categories, num_classes = table.dataset.categories, len(table.dataset.categories)
    thresholds = spread_thresholds(score_thresholds, num_classes)
    is_above = table.scores > thresholds[table.class_indices]
    is_counted = ~table.is_truth_ignored
    is_near = (table.pair_ious >= iou) & is_above[table.pair_detections]
    kept = np.flatnonzero(is_near & is_counted[table.pair_truths])
    keys = (
        -table.pair_ious[kept],
        ~table.is_same_class[kept],
        table.pair_detections[kept],
    )
    truth_rows = _take_greedily(table, kept[np.lexsort(keys)])
    is_excused = is_near & ~is_counted[table.pair_truths] & table.is_same_class
    is_ignored = np.zeros(len(table), dtype=bool)
    is_ignored[table.pair_detections[is_excused]] = True
    is_ignored &= truth_rows < 0
    rows = np.flatnonzero(is_above & ~is_ignored)
    hit = truth_rows[rows]
    actual = np.append(table.dataset.class_indices, num_classes)[hit]
    counts = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    np.add.at(counts, (actual, table.class_indices[rows]), 1)
    present = table.dataset.class_indices[is_counted]
    num_present = np.bincount(present, minlength=num_classes)
    counts[:num_classes, num_classes] = num_present - counts[:num_classes].sum(axis=1)
    return ConfusionMatrix(
        counts=counts,
        category_ids=categories.ids,
        names=categories.names,
        score_thresholds=tuple(thresholds.tolist()),
        iou=iou,
        num_ignored=int(np.count_nonzero(is_ignored)),
    )
