"""`thresholds`: score thresholds and suppression for a trained model, from one pass over images.

The network runs once over the validation images (and once over the test images, if there are any).
Everything else is a replay of its candidates: NMS by AP, then a threshold per class by a rule.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from retinaray.artifact import ModelCard, dump_weights, model_kind, read_weights
from retinaray.assembly.reading import make_predictor_settings, make_read_settings, make_reader
from retinaray.assembly.threshold_choice import (
    ThresholdChoice,
    choose_thresholds,
    describe_point,
)
from retinaray.config.schema import ThresholdsJob
from retinaray.data.coco import load_coco
from retinaray.errors import ConfigError, DatasetError
from retinaray.evaluation.ap_curves import average_precision
from retinaray.evaluation.candidates import CandidateSet, apply_setting
from retinaray.evaluation.detection_matches import index_ground_truth, match_candidates
from retinaray.evaluation.operating_points import (
    OperatingPoint,
    parse_rule,
    score_operating_points,
)
from retinaray.evaluation.threshold_sweep import SweepRow, SweepTable
from retinaray.inference.candidate_collection import collect_candidates, make_candidate_settings
from retinaray.inference.manifest import list_sources
from retinaray.inference.onnx_card import replace_onnx_card
from retinaray.inference.predictor import Predictor, load_predictor
from retinaray.machine import count_cores
from retinaray.reporting.point_table import render_points
from retinaray.reporting.threshold_plots import draw_operating_points, draw_threshold_sweep
from retinaray.storage import Storage, join_uri

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SetScores:
    """What the chosen settings give on one set of images.

    Attributes:
        AP: With every detection down to the candidates' floor, as COCO's AP is meant.
        AP50: Likewise at IoU 0.50.
        num_images: Images of the set.
        num_errors: Images that could not be read; they count as images without detections.
        points: The chosen thresholds and what they give.
    """

    AP: float | None
    AP50: float | None
    num_images: int
    num_errors: int
    points: tuple[OperatingPoint, ...]


@dataclass(frozen=True)
class ThresholdsOutcome:
    """Chosen settings of a model.

    Attributes:
        model: What they were chosen for.
        num_settings: How many the sweep tried.
        inference_s: Seconds of the pass over the validation images, reading included.
        sweep_s: Seconds of the sweep and of the choice of points.
        best: The suppression of the highest validation AP; its threshold is the highest that costs
            no AP.
        rule: What the thresholds were chosen for.
        validation: On the images that they were chosen on.
        test: On others; none without test annotations.
        output: The rewritten model; none when it was not asked for.
        exit_code: 0.
    """

    model: str
    num_settings: int
    inference_s: float
    sweep_s: float
    best: SweepRow
    rule: str
    validation: SetScores
    test: SetScores | None
    output: str | None
    exit_code: int = 0

    def to_json(self) -> str:
        """One line for machines."""
        return json.dumps(
            {
                "model": self.model,
                "num_settings": self.num_settings,
                "inference_s": self.inference_s,
                "sweep_s": self.sweep_s,
                "best": asdict(self.best),
                "rule": self.rule,
                "AP": self.validation.AP,
                "num_errors": self.validation.num_errors,
                "classes": _points_by_name(self.validation.points),
                "test": None
                if self.test is None
                else {
                    "AP": self.test.AP,
                    "AP50": self.test.AP50,
                    "num_errors": self.test.num_errors,
                    "classes": _points_by_name(self.test.points),
                },
                "output": self.output,
            }
        )

    def to_text(self) -> str:
        """Tables for people."""
        best = self.best
        lines = [
            f"{self.num_settings} settings in {self.sweep_s:.1f} s, after one pass of the network "
            f"in {self.inference_s:.1f} s",
            f"best: {best.nms_kind} NMS at IoU {best.nms_iou:g}, at most {best.max_detections} "
            f"detections per image",
            _render_set("validation", self.validation, self.rule),
        ]
        if self.test is not None:
            lines.append(_render_set("test", self.test, self.rule))
        if self.output is not None:
            lines.append(f"written with these settings inside: {self.output}")
        return "\n".join(lines)


def _points_by_name(points: tuple[OperatingPoint, ...]) -> dict[str, dict[str, Any]]:
    return {point.name: describe_point(point) for point in points}


def _render_set(name: str, scores: SetScores, rule: str) -> str:
    values = "  ".join(
        f"{label} {'-' if value is None else f'{value:.3f}'}"
        for label, value in (("AP", scores.AP), ("AP50", scores.AP50))
    )
    errors = f"  {scores.num_errors} UNREADABLE" if scores.num_errors else ""
    head = f"{name}: {scores.num_images} images{errors}  {values}; thresholds by {rule}, IoU 0.5"
    return f"{head}\n{render_points(scores.points)}"


@dataclass(frozen=True, eq=False)
class _Collected:
    """Ground truth and candidates of one set of images."""

    annotations: str
    truth: Mapping[str, Any]
    candidates: CandidateSet
    num_errors: int
    elapsed_s: float


def run_thresholds(job: ThresholdsJob) -> ThresholdsOutcome:
    """Choose suppression by AP and a threshold per class by a rule, and write them into the model.

    Of `job.detection` only the canvas is used; everything else there is what is searched.

    Raises:
        ConfigError: If the output is another kind of file than the model.
        DatasetError: If annotations cannot be used, or no image could be read.
        CheckpointError, InferenceError: If the model cannot be run.
        StorageError: If a file cannot be read or written.
    """
    _check_names(job)
    storage = Storage(endpoint_url=job.reading.endpoint_url)
    content = storage.read_bytes(job.model)
    settings = make_predictor_settings(job.detection, batch=job.batch, threads=count_cores())
    predictor, reason = load_predictor(
        content, uri=job.model, backend=job.backend, settings=make_candidate_settings(settings)
    )
    logger.info("backend %s: %s", predictor.backend, reason)
    validation = _collect(job, predictor, job.images, job.annotations)
    start = time.monotonic()
    choice = _choose(job, predictor.card, validation)
    sweep_s = time.monotonic() - start
    scored = _score_set(job, predictor.card, validation, choice)
    test = None
    if job.test_annotations is not None:
        images = job.images if job.test_images is None else job.test_images
        collected = _collect(job, predictor, images, job.test_annotations)
        test = _score_set(job, predictor.card, collected, choice)
    _write(job, storage, content, predictor.card, choice)
    return ThresholdsOutcome(
        model=job.model,
        num_settings=len(choice.table.rows),
        inference_s=round(validation.elapsed_s, 2),
        sweep_s=round(sweep_s, 2),
        best=choice.table.best_row,
        rule=job.rule,
        validation=scored,
        test=test,
        output=job.output,
    )


def _check_names(job: ThresholdsJob) -> None:
    kind = model_kind(job.model)
    if kind == "plan":
        raise ConfigError(
            f"model={job.model}: thresholds are written into .pth and .onnx files: "
            "choose them there, then build the engine from that file"
        )
    if job.output is not None and model_kind(job.output) != kind:
        raise ConfigError(
            f"output={job.output} is another kind of file than model={job.model}: give it the same "
            "ending; `retinaray export` makes an .onnx file from a .pth file"
        )
    if job.test_images is not None and job.test_annotations is None:
        raise ConfigError(
            f"test_images={job.test_images} is of no use without their ground truth: "
            "give --test-annotations, or leave it out"
        )
    searched = ("score_threshold", "nms_iou", "max_detections")
    given = [name for name in searched if getattr(job.detection, name) is not None]
    if given:
        raise ConfigError(
            f"detection.{', detection.'.join(given)}: this is what `thresholds` searches: leave it "
            "out (--nms narrows the search to one kind)"
        )


def _collect(job: ThresholdsJob, predictor: Predictor, images: str, annotations: str) -> _Collected:
    read = make_reader(job.reading)
    content = read(annotations)
    known = load_coco(content, source=annotations).categories
    if set(predictor.card.categories.ids) - set(known.ids):
        raise DatasetError(
            f"{annotations}: the model has the categories {list(predictor.card.categories.ids)}, "
            f"the annotations have {list(known.ids)}: give annotations with the model's categories"
        )
    truth = json.loads(content)
    start = time.monotonic()
    candidates, failed = collect_candidates(
        predictor,
        list_sources(images, truth, Storage(endpoint_url=job.reading.endpoint_url)),
        read=read,
        batch=job.batch,
        settings=make_read_settings(job.reading),
    )
    elapsed_s = time.monotonic() - start
    for result in failed[:5]:
        logger.warning("%s: %s", result.source.uri, result.error)
    if not len(candidates):
        raise DatasetError(
            f"none of {len(failed)} images could be read, first: {failed[0].error}; check --images"
        )
    logger.info(
        "%s: %d candidates of %d images in %.1f s",
        annotations,
        len(candidates.scores),
        len(candidates),
        elapsed_s,
    )
    return _Collected(annotations, truth, candidates, len(failed), elapsed_s)


def _choose(job: ThresholdsJob, card: ModelCard, collected: _Collected) -> ThresholdChoice:
    if not index_ground_truth(collected.truth).num_boxes.any():
        raise DatasetError(
            f"{collected.annotations}: has no boxes to choose thresholds by: give annotations of "
            "images that show the model's classes"
        )
    choice = choose_thresholds(
        collected.candidates,
        collected.truth,
        card.categories,
        rule=job.rule,
        nms_kind=job.detection.nms_kind,
    )
    best = choice.table.best_row
    logger.info("%d settings tried, best AP %.3f", len(choice.table.rows), best.AP)
    return choice


def _score_set(
    job: ThresholdsJob, card: ModelCard, collected: _Collected, choice: ThresholdChoice
) -> SetScores:
    """AP without thresholds, and the points as applying them gives them."""
    candidates = collected.candidates
    lowest = (candidates.floor,) * len(card.categories)
    everything = replace(choice.setting, score_thresholds=lowest)
    truth = index_ground_truth(collected.truth)
    scores = average_precision(match_candidates(candidates, everything, card.categories, truth))
    results = apply_setting(candidates, choice.setting, card.categories)
    points = score_operating_points(
        choice.points, results, collected.truth, rule=parse_rule(job.rule)
    )
    return SetScores(scores.AP, scores.AP50, len(truth.image_index), collected.num_errors, points)


def _write(
    job: ThresholdsJob, storage: Storage, content: bytes, card: ModelCard, choice: ThresholdChoice
) -> None:
    if job.output is not None:
        tuned = choice.apply_to(card)
        storage.write_bytes(job.output, _replace_card(content, tuned, job.model))
    if job.table is not None:
        storage.write_bytes(job.table, _to_csv(choice.table))
    if job.plots is not None:
        title = f"{job.model}, {job.annotations}, rule {job.rule}"
        pictures = {
            "threshold_sweep.png": draw_threshold_sweep(choice.table),
            "operating_points.png": draw_operating_points(
                choice.curves, choice.points, title=title
            ),
        }
        for name, picture in pictures.items():
            storage.write_bytes(join_uri(job.plots, name), picture)


def _replace_card(content: bytes, card: ModelCard, uri: str) -> bytes:
    if model_kind(uri) == "onnx":
        return replace_onnx_card(content, card, uri=uri)
    _, model = read_weights(content, source=uri)
    return dump_weights(card, model.state_dict())


def _to_csv(table: SweepTable) -> bytes:
    rows = table.to_dicts()
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()
