"""`evaluate`: a model, or an existing detections file, against ground truth."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from typing import Any

from retinaray.assembly.reading import (
    make_predictor_settings,
    make_read_settings,
    make_reader,
    read_json,
)
from retinaray.config.schema import EvaluateJob
from retinaray.data.coco import load_coco
from retinaray.errors import DatasetError
from retinaray.evaluation.coco_map import CocoScores, evaluate_detections
from retinaray.inference.manifest import list_sources
from retinaray.inference.pipeline import ImageResult, detect_images
from retinaray.inference.predictor import load_predictor
from retinaray.machine import count_cores
from retinaray.reporting.score_table import render_scores
from retinaray.storage import Storage

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
        exit_code: 0.
    """

    model: str
    backend: str
    scores: CocoScores
    num_errors: int
    images_per_s: float
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
            }
        )

    def to_text(self) -> str:
        """A table for people."""
        speed = f"  {self.images_per_s:.1f} img/s ({self.backend})" if self.backend else ""
        errors = f"  {self.num_errors} UNREADABLE" if self.num_errors else ""
        head = f"{self.scores.num_images} images, {self.scores.num_detections} detections"
        return f"{head}{errors}{speed}\n{render_scores(self.scores)}"


def run_evaluation(job: EvaluateJob) -> EvaluateOutcome:
    """Score a model, or a detections file.

    Raises:
        DatasetError: If annotations or detections cannot be used, or no image could be read.
        CheckpointError, InferenceError: If the model cannot be run.
        StorageError: If a file cannot be read.
    """
    content = make_reader(job.reading)(job.annotations)
    categories = load_coco(content, source=job.annotations).categories
    truth = json.loads(content)
    if job.model.endswith(".json"):
        return _score_file(job, truth)
    predictor, reason = load_predictor(
        make_reader(job.reading)(job.model),
        uri=job.model,
        backend=job.backend,
        settings=make_predictor_settings(job.detection, batch=job.batch, threads=count_cores()),
    )
    logger.info("backend %s: %s", predictor.backend, reason)
    if predictor.card.categories != categories:
        logger.warning(
            "the model was trained for other categories than %s has: %s against %s",
            job.annotations,
            predictor.card.categories.names[:5],
            categories.names[:5],
        )
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
    elapsed_s = time.monotonic() - start
    failed = [result for result in results if result.error]
    _report_failures(failed, len(results))
    detections = [detection for result in results for detection in result.coco_results]
    if job.output is not None:
        Storage(endpoint_url=job.reading.endpoint_url).write_bytes(
            job.output, json.dumps(detections).encode()
        )
    return EvaluateOutcome(
        model=job.model,
        backend=predictor.backend,
        scores=_score(truth, detections, job.annotations),
        num_errors=len(failed),
        images_per_s=round(len(results) / elapsed_s, 2),
    )


def _score_file(job: EvaluateJob, truth: Any) -> EvaluateOutcome:
    detections = read_json(job.model, job.reading)
    if not isinstance(detections, list):
        raise DatasetError(
            f"{job.model}: expected a COCO results list, found {type(detections).__name__}"
        )
    return EvaluateOutcome(
        model=job.model,
        backend="",
        scores=_score(truth, detections, job.annotations),
        num_errors=0,
        images_per_s=0.0,
    )


def _score(truth: Any, detections: list[dict[str, object]], source: str) -> CocoScores:
    try:
        return evaluate_detections(truth, detections)
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"detections against {source}: {error}") from error


def _report_failures(failed: list[ImageResult], num_images: int) -> None:
    for result in failed[:5]:
        logger.warning("%s: %s", result.source.uri, result.error)
    if len(failed) == num_images:
        raise DatasetError(
            f"none of {num_images} images could be read, first: {failed[0].error}; check --images"
        )
