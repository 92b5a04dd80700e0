"""Detections and ground truth of a run as what a report shows of them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from retinaray.config.report_schema import ReportJob
from retinaray.data.coco import CocoDataset, load_coco, resolve_image_uri
from retinaray.data.image_decoding import decode_image
from retinaray.errors import DatasetError, ImageError, StorageError
from retinaray.evaluation.coco_map import evaluate_detections, restrict_truth
from retinaray.evaluation.confusion import count_confusions, tabulate_overlaps
from retinaray.evaluation.detection_matches import index_ground_truth, match_results
from retinaray.evaluation.error_taxonomy import ErrorLabels, label_errors, summarize_errors
from retinaray.evaluation.gallery_choice import Gallery, choose_gallery
from retinaray.evaluation.operating_points import (
    DEFAULT_THRESHOLD,
    OperatingPoint,
    choose_operating_points,
    measure_thresholds,
    parse_rule,
    thresholds_of,
)
from retinaray.evaluation.pr_curves import PrecisionRecallCurve, precision_recall_curves
from retinaray.evaluation.score_calibration import calibrate_scores
from retinaray.evaluation.size_bins import measure_by_size
from retinaray.inference.hash_choice import hash_uri
from retinaray.reporting.report.contents import DetectionAnalysis, ReportedRun
from retinaray.reporting.report.gallery import GalleryPicture, GalleryRun, PageGallery, View

NEEDS_DETECTIONS = (
    "classes, curves, sizes, confusion, errors, scores and images are left out: they need "
    "detections"
)
"""How a gap of a run begins that has nothing to analyse."""
_SEED = 0
_WEBP_QUALITY = 72
_WEBP_EFFORT = 2


@dataclass(frozen=True, eq=False)
class DetectionSource:
    """Detections of a run, and what they are compared with.

    Attributes:
        results: COCO results.
        truth: A COCO file's content, of the images that were looked at.
        truth_name: Its file.
        images_root: Folder or prefix of the file names; empty when nobody knows it.
        uris: Where the images lie, by id, when the run knows; else empty.
        thresholds: Score thresholds of the model by category id; empty when it has none of its own.
    """

    results: list[dict[str, Any]]
    truth: Mapping[str, Any]
    truth_name: str
    images_root: str = ""
    uris: Mapping[int | str, str] | None = None
    thresholds: Mapping[int | str, float] | None = None

    def locate(self, image_id: int | str, file_name: str) -> str:
        """Where an image lies.

        Raises:
            DatasetError: If nobody knows, or its name leads out of the folder.
        """
        if self.uris and image_id in self.uris:
            return self.uris[image_id]
        return resolve_image_uri(self.images_root, file_name)


@dataclass(frozen=True, eq=False)
class AnalysedDetections:
    """Detections that were looked at.

    Attributes:
        analysis: For the page.
        labels: What each detection is.
        thresholds: By class index of the dataset.
        source: Where they came from.
    """

    analysis: DetectionAnalysis
    labels: ErrorLabels
    thresholds: tuple[float, ...]
    source: DetectionSource


@dataclass(frozen=True, eq=False)
class OpenedRun:
    """A run as far as its own files tell of it.

    Attributes:
        run: For the page, without an analysis.
        detections: To analyse; none = there are none, and a gap of the run says why.
    """

    run: ReportedRun
    detections: DetectionSource | None = None


def analyse_detections(source: DetectionSource, *, rule: str) -> AnalysedDetections:
    """Everything that the page says of detections.

    Args:
        source: The detections.
        rule: For the operating points, where the model has no thresholds of its own.

    Raises:
        DatasetError: If the annotations cannot be used, or do not belong to the detections.
    """
    dataset = _load_truth(source)
    try:
        scores = evaluate_detections(source.truth, source.results)
        curves, points, origin = _find_points(source, dataset, rule)
        thresholds = thresholds_of(points, dataset.categories)
        table = tabulate_overlaps(source.results, dataset)
        labels = label_errors(table)
        analysis = DetectionAnalysis(
            set_name=source.truth_name.rsplit("/", 1)[-1],
            scores=scores,
            sizes=measure_by_size(table, score_thresholds=thresholds),
            curves=curves,
            points=points,
            points_source=origin,
            confusion=count_confusions(table, score_thresholds=thresholds),
            errors=summarize_errors(labels),
            calibration=calibrate_scores(labels, floor=DEFAULT_THRESHOLD),
        )
    except ValueError as error:
        raise DatasetError(f"detections against {source.truth_name}: {error}") from error
    return AnalysedDetections(analysis, labels, thresholds, source)


def _load_truth(source: DetectionSource) -> CocoDataset:
    return load_coco(json.dumps(source.truth).encode(), source=source.truth_name)


def _find_points(
    source: DetectionSource, dataset: CocoDataset, rule: str
) -> tuple[tuple[PrecisionRecallCurve, ...], tuple[OperatingPoint, ...], str]:
    """Curves, their operating points in the same order, and where these come from."""
    matched = match_results(source.results, index_ground_truth(source.truth), ious=np.array([0.5]))
    curves = precision_recall_curves(matched)
    own = source.thresholds or {}
    # What a training writes is no choice, but the lowest score that AP needs.
    if not own or max(own.values()) <= DEFAULT_THRESHOLD:
        points = choose_operating_points(curves, parse_rule(rule))
        return curves, points, f"thresholds chosen on these very images by the rule {rule}"
    thresholds = [own.get(identity, DEFAULT_THRESHOLD) for identity in dataset.categories.ids]
    limits = dict(zip(dataset.categories.ids, thresholds, strict=True))
    kept = [found for found in source.results if found["score"] > limits[found["category_id"]]]
    measured = measure_thresholds(dataset.categories, thresholds, kept, source.truth)
    by_id = {point.category_id: point for point in measured}
    return (
        curves,
        tuple(by_id[curve.category_id] for curve in curves),
        "the thresholds stored in the model",
    )


def make_gallery(
    runs: Sequence[tuple[str, AnalysedDetections]],
    job: ReportJob,
    read: Callable[[str], bytes],
) -> tuple[PageGallery, list[str]]:
    """Choose images, read them, and put the boxes of all runs beside them.

    Args:
        runs: Names and detections.
        job: How many and how large.
        read: Gives the bytes at a URI.

    Returns:
        The gallery, and why images are missing, a sentence each.
    """
    chosen = [_choose(analysed, job.gallery) for _, analysed in runs]
    wanted: dict[str, None] = {}
    for (_, analysed), gallery in zip(runs, chosen, strict=True):
        for image in gallery.images:
            uri = analysed.source.locate(image.image_id, image.file_name)
            wanted[uri] = None
    views = _collect_views(runs, chosen, wanted)
    with ThreadPoolExecutor(job.reading.threads) as pool:
        shrunk = pool.map(lambda uri: _shrink(uri, job, read), wanted)
    pictures, faults = [], []
    for uri, content in zip(wanted, shrunk, strict=True):
        if isinstance(content, str):
            faults.append(content)
            continue
        image = views[uri][0].image
        name = uri.rsplit("/", 1)[-1]
        pictures.append(GalleryPicture(name, image.height, image.width, content, tuple(views[uri])))
    gallery_runs = tuple(
        GalleryRun(name, gallery.names, gallery.score_thresholds)
        for (name, _), gallery in zip(runs, chosen, strict=True)
    )
    return PageGallery(gallery_runs, tuple(pictures)), faults


def _choose(analysed: AnalysedDetections, num_per_group: int) -> Gallery:
    return choose_gallery(
        analysed.labels,
        num_images=4 * num_per_group,
        hash_image=lambda name: hash_uri(name, _SEED),
        score_thresholds=analysed.thresholds,
        floor=min(DEFAULT_THRESHOLD, *analysed.thresholds),
    )


def _collect_views(
    runs: Sequence[tuple[str, AnalysedDetections]],
    chosen: Sequence[Gallery],
    wanted: Mapping[str, None],
) -> dict[str, list[View]]:
    """What each run has in each image, also where only another run chose it."""
    views: dict[str, list[View]] = {uri: [] for uri in wanted}
    for number, ((_, analysed), own) in enumerate(zip(runs, chosen, strict=True)):
        groups = {image.image_id: image.groups for image in own.images}
        # Alone, a run has no images that another chose.
        gallery = own if len(runs) == 1 else _look_at(analysed, wanted)
        for image in gallery.images:
            uri = analysed.source.locate(image.image_id, image.file_name)
            if uri in views:
                views[uri].append(View(number, image, groups.get(image.image_id, ())))
    return views


def _look_at(analysed: AnalysedDetections, wanted: Mapping[str, None]) -> Gallery:
    """The boxes of a run in the wanted images that it has."""
    source = analysed.source
    ids = {
        image["id"]
        for image in source.truth["images"]
        if source.locate(image["id"], image["file_name"]) in wanted
    }
    part = DetectionSource(
        results=[found for found in source.results if found["image_id"] in ids],
        truth=restrict_truth(source.truth, ids),
        truth_name=source.truth_name,
    )
    table = tabulate_overlaps(part.results, _load_truth(part))
    labels = label_errors(table)
    # A quarter of the places is room for all images in each group.
    return _choose(
        AnalysedDetections(analysed.analysis, labels, analysed.thresholds, part), len(ids)
    )


def _shrink(uri: str, job: ReportJob, read: Callable[[str], bytes]) -> bytes | str:
    """An image as WebP with sides of at most `picture_side`, or why it cannot be had."""
    side = job.picture_side
    try:
        decoded = decode_image(
            read(uri),
            fit_height=side,
            fit_width=side,
            max_pixels=job.reading.max_pixels,
            allow_truncated=job.reading.allow_truncated,
        )
    except StorageError as error:
        return str(error)
    except ImageError as error:
        return f"{uri}: {error}"
    image = Image.fromarray(decoded.pixels)
    image.thumbnail((side, side), Image.Resampling.BILINEAR)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=_WEBP_QUALITY, method=_WEBP_EFFORT)
    return stream.getvalue()
