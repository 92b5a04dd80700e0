"""Which images a report shows, and what is right and wrong in them.

Best, worst, most confused and some taken by a hash, so that the same run shows the same images and
a gallery is no selection of successes. Opens no image. Every box carries a score, so that a page
can move the threshold: a detection shows if its score is above, a ground truth is missed unless
its `hit_score` is above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from retinaray.evaluation.confusion import spread_thresholds
from retinaray.evaluation.error_taxonomy import ErrorLabels, Verdict

GROUPS = ("best", "worst", "confused", "random")


@dataclass(frozen=True)
class GalleryDetection:
    """One detection.

    Attributes:
        box_xyxy: Original pixels.
        class_index: In [0, K).
        score: In [0, 1].
        verdict: `hit`, `classification`, `localisation`, `both`, `duplicate`, `background` or
            `ignored`; see `error_taxonomy.Verdict`.
    """

    box_xyxy: tuple[float, float, float, float]
    class_index: int
    score: float
    verdict: str


@dataclass(frozen=True)
class GalleryTruth:
    """One ground truth.

    Attributes:
        box_xyxy: Original pixels.
        class_index: In [0, K).
        is_ignored: A crowd: nobody has to find it.
        hit_score: Score of the detection that hits it; None if none does at any score. At a
            threshold t it is missed unless hit_score > t.
    """

    box_xyxy: tuple[float, float, float, float]
    class_index: int
    is_ignored: bool
    hit_score: float | None


@dataclass(frozen=True)
class GalleryImage:
    """One image that is shown.

    Attributes:
        image_id: As in the annotations.
        file_name: As in the annotations.
        height: Pixels.
        width: Pixels.
        groups: Why it is shown: of GROUPS, at least one.
        f1: Of its detections above the thresholds, in [0, 1]; None if it has neither those nor
            ground truth.
        num_hits: Detections above the thresholds that hit.
        num_false: Those that do not.
        num_missed: Ground truths that none of them hits.
        num_confused: Those that are well placed on another class.
        detections: By falling score, those above the floor.
        truths: In file order.
    """

    image_id: int | str
    file_name: str
    height: int
    width: int
    groups: tuple[str, ...]
    f1: float | None
    num_hits: int
    num_false: int
    num_missed: int
    num_confused: int
    detections: tuple[GalleryDetection, ...]
    truths: tuple[GalleryTruth, ...]


@dataclass(frozen=True)
class Gallery:
    """The images of a report.

    Attributes:
        images: Each once: those of the first group first, and in each group the most typical first.
        names: K class names.
        score_thresholds: K values by which images were judged.
        floor: Detections that score at or below this are not in it.
    """

    images: tuple[GalleryImage, ...]
    names: tuple[str, ...]
    score_thresholds: tuple[float, ...]
    floor: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def choose_gallery(
    labels: ErrorLabels,
    *,
    num_images: int,
    hash_image: Callable[[str], int],
    score_thresholds: float | Sequence[float] = 0.3,
    floor: float = 0.05,
) -> Gallery:
    """Choose images to show.

    Each group gets a quarter of the places. Best: highest F1, then most hits. Worst: lowest F1,
    then most errors. Confused: most detections on another class. Random: smallest hashes. Equals
    go by hash. An image of several groups takes one place; those left over stay empty.

    Args:
        labels: What each detection is.
        num_images: At most so many, at least 0.
        hash_image: A number of a file name, evenly distributed and the same on every machine:
            `inference.hash_choice.hash_uri` with a seed.
        score_thresholds: Images are judged by detections above: one for all classes, or K.
        floor: Detections above are in the gallery.

    Raises:
        ValueError: If the number of thresholds is neither 1 nor K.
    """
    dataset = labels.table.dataset
    thresholds = spread_thresholds(score_thresholds, len(dataset.categories))
    tally = _tally_images(labels, thresholds)
    hashes = [hash_image(image.file_name) for image in dataset.images]
    ranks = np.empty(len(hashes), dtype=np.int64)
    ranks[sorted(range(len(hashes)), key=hashes.__getitem__)] = np.arange(len(hashes))
    groups: dict[int, list[str]] = {}
    for number, (group, order) in enumerate(_order_groups(tally, ranks).items()):
        # The first groups get what does not divide by their number.
        share = (num_images + len(GROUPS) - 1 - number) // len(GROUPS)
        for position in order[: max(share, 0)].tolist():
            groups.setdefault(position, []).append(group)
    return Gallery(
        images=tuple(
            _describe_image(labels, tally, position, tuple(why), floor)
            for position, why in groups.items()
        ),
        names=dataset.categories.names,
        score_thresholds=tuple(thresholds.tolist()),
        floor=floor,
    )


@dataclass(frozen=True, eq=False)
class _Tally:
    """What is right and wrong in each image, int64 [N] each, and who hits what.

    `hit_scores` is float64 [M], NaN for ground truth that nothing hits.
    """

    num_hits: Int[np.ndarray, " N"]
    num_false: Int[np.ndarray, " N"]
    num_missed: Int[np.ndarray, " N"]
    num_confused: Int[np.ndarray, " N"]
    hit_scores: Float[np.ndarray, " M"]

    @property
    def f1(self) -> Float[np.ndarray, " N"]:
        """NaN where there is nothing to judge."""
        total = 2 * self.num_hits + self.num_false + self.num_missed
        shares = np.full(len(total), np.nan)
        np.divide(2 * self.num_hits, total, out=shares, where=total > 0)
        return shares


def _tally_images(labels: ErrorLabels, thresholds: Float[np.ndarray, " K"]) -> _Tally:
    table = labels.table
    num_images = len(table.dataset)
    is_above = table.scores > thresholds[table.class_indices]

    def count(is_kept: Bool[np.ndarray, " D"]) -> Int[np.ndarray, " N"]:
        return np.bincount(table.positions[is_kept & is_above], minlength=num_images)

    image_of_truth = np.repeat(np.arange(num_images), np.diff(table.dataset.offsets))
    num_truths = np.bincount(image_of_truth[~table.is_truth_ignored], minlength=num_images)
    is_hit = labels.verdicts == Verdict.HIT
    num_hits = count(is_hit)
    hit_scores = np.full(len(table.dataset.area), np.nan)
    hit_scores[labels.truth_rows[is_hit]] = table.scores[is_hit]
    return _Tally(
        num_hits=num_hits,
        num_false=count(labels.verdicts > Verdict.HIT),
        num_missed=num_truths - num_hits,
        num_confused=count(labels.verdicts == Verdict.CLASSIFICATION),
        hit_scores=hit_scores,
    )


def _order_groups(tally: _Tally, ranks: Int[np.ndarray, " N"]) -> dict[str, Int[np.ndarray, " N"]]:
    """Images that may stand for each group, the most typical first."""
    f1 = tally.f1
    num_errors = tally.num_false + tally.num_missed

    def order(
        is_kept: Bool[np.ndarray, " N"], *keys: Float[np.ndarray, " N"] | Int[np.ndarray, " N"]
    ) -> Int[np.ndarray, " N"]:
        # The last key of a lexsort decides first.
        ordered = np.lexsort((ranks, *reversed(keys)))
        return np.asarray(ordered[is_kept[ordered]])

    return {
        "best": order(tally.num_hits > 0, -f1, -tally.num_hits),
        "worst": order(num_errors > 0, f1, -num_errors),
        "confused": order(tally.num_confused > 0, -tally.num_confused),
        "random": order(np.ones(len(ranks), dtype=bool)),
    }


def _describe_image(
    labels: ErrorLabels, tally: _Tally, position: int, groups: tuple[str, ...], floor: float
) -> GalleryImage:
    dataset = labels.table.dataset
    image, f1 = dataset.images[position], float(tally.f1[position])
    return GalleryImage(
        image_id=image.image_id,
        file_name=image.file_name,
        height=image.height,
        width=image.width,
        groups=groups,
        f1=None if math.isnan(f1) else f1,
        num_hits=int(tally.num_hits[position]),
        num_false=int(tally.num_false[position]),
        num_missed=int(tally.num_missed[position]),
        num_confused=int(tally.num_confused[position]),
        detections=_list_detections(labels, position, floor),
        truths=_list_truths(labels, position, tally.hit_scores),
    )


def _list_detections(
    labels: ErrorLabels, position: int, floor: float
) -> tuple[GalleryDetection, ...]:
    table = labels.table
    start, stop = np.searchsorted(table.positions, [position, position + 1])
    rows = np.arange(start, stop)[table.scores[start:stop] > floor]
    boxes_xyxy = table.boxes_xywh[rows]
    boxes_xyxy[:, 2:] += boxes_xyxy[:, :2]
    return tuple(
        GalleryDetection(_corners(box), label, score, Verdict(verdict).name.lower())
        for box, label, score, verdict in zip(
            boxes_xyxy.tolist(),
            table.class_indices[rows].tolist(),
            table.scores[rows].tolist(),
            labels.verdicts[rows].tolist(),
            strict=True,
        )
    )


def _list_truths(
    labels: ErrorLabels, position: int, hit_scores: Float[np.ndarray, " M"]
) -> tuple[GalleryTruth, ...]:
    dataset = labels.table.dataset
    rows = slice(int(dataset.offsets[position]), int(dataset.offsets[position + 1]))
    return tuple(
        GalleryTruth(_corners(box), label, ignored, None if math.isnan(score) else score)
        for box, label, ignored, score in zip(
            dataset.boxes_xyxy[rows].tolist(),
            dataset.class_indices[rows].tolist(),
            labels.table.is_truth_ignored[rows].tolist(),
            hit_scores[rows].tolist(),
            strict=True,
        )
    )


def _corners(box: Sequence[float]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = box
    return x1, y1, x2, y2
