"""`evaluate`: a model, or an existing detections file, against ground truth."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from retinaray.assembly.kitti import read_kitti_detections
from retinaray.assembly.provenance import describe_making
from retinaray.assembly.reading import (
    make_predictor_settings,
    make_read_settings,
    make_reader,
    read_json,
    read_model_card,
    read_model_file,
)
from retinaray.assembly.threshold_choice import describe_point
from retinaray.config.schema import EvaluateJob
from retinaray.data.coco import load_coco
from retinaray.data.coco_results import check_coco_results
from retinaray.errors import DatasetError
from retinaray.evaluation.candidates import DetectionSetting, apply_setting
from retinaray.evaluation.coco_map import CocoScores, evaluate_detections
from retinaray.evaluation.operating_points import (
    DEFAULT_THRESHOLD,
    OperatingPoint,
    measure_thresholds,
)
from retinaray.inference.candidate_collection import collect_candidates, make_candidate_settings
from retinaray.inference.manifest import list_sources
from retinaray.inference.pipeline import ImageResult, detect_images
from retinaray.inference.predictor import Predictor, load_predictor
from retinaray.machine import count_cores
from retinaray.path_hints import hint_at_missing
from retinaray.reporting.point_table import render_points
from retinaray.reporting.score_table import render_scores
from retinaray.storage import Storage, is_s3, local_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateOutcome:
    """Scores of a model.

    Attributes:
        model: What was scored.
        backend: Runtime, empty for a detections file.
        scores: COCO's numbers.
        num_errors: Images that could not be read; they count as images without detections.
        images_per_s: From the first image to the last, reading included; 0 for a detections file.
        points: What the thresholds stored in the model give; empty when they are no more than the
            default, or the caller has a threshold of their own.
        job: The settings.
        versions: Packages that it was computed with.
        exit_code: 0.
    """

    model: str
    backend: str
    scores: CocoScores
    num_errors: int
    images_per_s: float
    points: tuple[OperatingPoint, ...] = ()
    job: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    exit_code: int = 0

    def to_json(self) -> str:
        """One line for machines."""
        return json.dumps(
            {
                "model": self.model,
                "backend": self.backend,
                "images_per_s": self.images_per_s,
                "num_errors": self.num_errors,
                **self.scores.to_dict(),
                "operating_points": {point.name: describe_point(point) for point in self.points},
                "job": self.job,
                "versions": self.versions,
            }
        )

    def to_text(self) -> str:
        """A table for people."""
        speed = f"  {self.images_per_s:.1f} img/s ({self.backend})" if self.backend else ""
        errors = f"  {self.num_errors} UNREADABLE" if self.num_errors else ""
        head = f"{self.scores.num_images} images, {self.scores.num_detections} detections"
        lines = [f"{head}{errors}{speed}", render_scores(self.scores)]
        if self.points:
            lines += ["operating points: the thresholds stored in the model, IoU 0.5"]
            lines += [render_points(self.points)]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Found:
    """What a model found in the images.

    Attributes:
        detections: COCO results that AP is computed from.
        accepted: Those at the model's own thresholds; none = they are the same.
        failed: Images that could not be read.
        num_images: All images.
        elapsed_s: From the first to the last.
    """

    detections: list[dict[str, object]]
    accepted: list[dict[str, object]] | None
    failed: list[ImageResult]
    num_images: int
    elapsed_s: float


def run_evaluation(job: EvaluateJob) -> EvaluateOutcome:
    """Score a model, or a detections file.

    AP needs the low-scored detections: they are what its curve ends with. A model whose card holds
    operating points of, say, 0.4 would lose AP if it were scored at them, and seem worse than the
    same weights before the points were chosen. So without a threshold from the caller AP is
    computed down to 0.05, or to the card's threshold where that is lower, and precision and recall
    at the card's own thresholds are reported beside it. `--output` holds what AP was computed
    from.

    Raises:
        DatasetError: If annotations or detections cannot be used, or no image could be read.
        CheckpointError, InferenceError: If the model cannot be run.
        StorageError: If a file cannot be read.
    """
    content = make_reader(job.reading)(job.annotations)
    categories = load_coco(content, source=job.annotations).categories
    truth = json.loads(content)
    if job.kitti.dump is not None:
        dumped = read_kitti_detections(job.kitti, job.reading, truth, categories)
        _write_detections(job, dumped)
        return _score_list(job, truth, dumped, job.kitti.dump)
    if _name(job).endswith(".json"):
        return _score_file(job, truth)
    predictor, is_apart = _load_predictor(job)
    if predictor.card.categories != categories:
        logger.warning(
            "the model was trained for other categories than %s has: %s against %s",
            job.annotations,
            predictor.card.categories.names[:5],
            categories.names[:5],
        )
    found = (_detect_twice if is_apart else _detect)(job, predictor, truth)
    _report_failures(found.failed, found.num_images)
    _write_detections(job, found.detections)
    scores = _score(truth, found.detections, job.annotations)
    points: tuple[OperatingPoint, ...] = ()
    if found.accepted is not None:
        points = measure_thresholds(
            predictor.card.categories, predictor.card.score_thresholds, found.accepted, truth
        )
    return EvaluateOutcome(
        model=_name(job),
        backend=predictor.backend,
        scores=scores,
        num_errors=len(found.failed),
        images_per_s=round(found.num_images / found.elapsed_s, 2),
        points=points,
        **describe_making(job),
    )


def _load_predictor(job: EvaluateJob) -> tuple[Predictor, bool]:
    """The model, and whether AP and its card want different thresholds.

    Then it is loaded for raw candidates, down to the lowest threshold that AP wants.
    """
    content, sidecar = read_model_file(_name(job), make_reader(job.reading))
    settings = make_predictor_settings(job.detection, batch=job.batch, threads=count_cores())
    thresholds = read_model_card(content, sidecar, _name(job)).score_thresholds
    is_apart = job.detection.score_threshold is None and max(thresholds) > DEFAULT_THRESHOLD
    if is_apart:
        settings = make_candidate_settings(settings, floor=min(DEFAULT_THRESHOLD, *thresholds))
    predictor, reason = load_predictor(
        content, uri=_name(job), backend=job.backend, settings=settings, sidecar=sidecar
    )
    logger.info("backend %s: %s", predictor.backend, reason)
    return predictor, is_apart


def _detect(job: EvaluateJob, predictor: Predictor, truth: Any) -> _Found:
    start = time.monotonic()
    results = list(
        detect_images(
            predictor,
            list_sources(job.images, truth, Storage(endpoint_url=job.reading.endpoint_url)),
            read=make_reader(job.reading),
            batch=job.batch,
            settings=make_read_settings(job.reading),
        )
    )
    return _Found(
        detections=[detection for result in results for detection in result.coco_results],
        accepted=None,
        failed=[result for result in results if result.error],
        num_images=len(results),
        elapsed_s=time.monotonic() - start,
    )


def _detect_twice(job: EvaluateJob, predictor: Predictor, truth: Any) -> _Found:
    """One pass of the network, read at AP's thresholds and at the card's."""
    card, asked = predictor.card, job.detection
    start = time.monotonic()
    candidates, failed = collect_candidates(
        predictor,
        list_sources(job.images, truth, Storage(endpoint_url=job.reading.endpoint_url)),
        read=make_reader(job.reading),
        batch=job.batch,
        settings=make_read_settings(job.reading),
        floor=min(DEFAULT_THRESHOLD, *card.score_thresholds),
    )
    stored = DetectionSetting(
        score_thresholds=card.score_thresholds,
        nms_iou=card.nms_iou if asked.nms_iou is None else asked.nms_iou,
        nms_kind=card.nms_kind if asked.nms_kind is None else asked.nms_kind,
        max_detections=card.max_detections
        if asked.max_detections is None
        else asked.max_detections,
    )
    lowered = tuple(min(DEFAULT_THRESHOLD, value) for value in card.score_thresholds)
    detections, accepted = (
        apply_setting(candidates, setting, card.categories)
        for setting in (replace(stored, score_thresholds=lowered), stored)
    )
    return _Found(
        detections=detections,
        accepted=accepted,
        failed=failed,
        num_images=len(candidates) + len(failed),
        elapsed_s=time.monotonic() - start,
    )


def _score_file(job: EvaluateJob, truth: Any) -> EvaluateOutcome:
    content = read_json(_name(job), job.reading)
    detections = check_coco_results(content, source=_name(job))
    return _score_list(job, truth, detections, _name(job))


def _score_list(
    job: EvaluateJob, truth: Any, detections: list[dict[str, object]], source: str
) -> EvaluateOutcome:
    return EvaluateOutcome(
        model=source,
        backend="",
        scores=_score(truth, detections, job.annotations),
        num_errors=0,
        images_per_s=0.0,
        **describe_making(job),
    )


def _name(job: EvaluateJob) -> str:
    """The model or detections file; the settings see to it that there is one, or a dump."""
    return job.model or ""


def _write_detections(job: EvaluateJob, detections: list[dict[str, object]]) -> None:
    if job.output is not None:
        Storage(endpoint_url=job.reading.endpoint_url).write_bytes(
            job.output, json.dumps(detections).encode()
        )


def _score(truth: Any, detections: list[dict[str, object]], source: str) -> CocoScores:
    try:
        return evaluate_detections(truth, detections)
    except ValueError as error:
        raise DatasetError(f"detections against {source}: {error}") from error


def _report_failures(failed: list[ImageResult], num_images: int) -> None:
    for result in failed[:5]:
        logger.warning("%s", result.error)
    if len(failed) == num_images:
        uri = failed[0].source.uri
        hint = "" if is_s3(uri) else hint_at_missing(local_path(uri))
        raise DatasetError(
            f"none of {num_images} images could be read, first: {failed[0].error}; check --images"
            + (f"; {hint}" if hint else "")
        )
