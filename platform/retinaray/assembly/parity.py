"""`parity`: exported files on every runtime that is here, against their weights in torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from typing import Any

from retinaray.artifact import ModelCard, model_kind, read_weights
from retinaray.assembly.hardware import describe_hardware
from retinaray.assembly.parity_cases import ExportedFile, PlannedCase, plan_cases, read_files
from retinaray.assembly.parity_images import ImageKey, draw_worst, read_batches
from retinaray.assembly.provenance import describe_making
from retinaray.assembly.reading import make_read_settings, make_reader, read_json
from retinaray.config.parity_schema import ParityJob, ToleranceConfig
from retinaray.data.coco_results import coco_results
from retinaray.errors import CheckpointError, DatasetError, InferenceError
from retinaray.evaluation.coco_map import evaluate_detections, restrict_truth
from retinaray.evaluation.parity_rows import (
    ParityGroup,
    ParityResult,
    ParityTolerance,
    UnrunCase,
)
from retinaray.export.parity_gate import (
    GateEntry,
    ParityGate,
    make_gate_setting,
    make_gate_settings,
)
from retinaray.inference.manifest import list_sources
from retinaray.inference.predictor import PredictorSettings, load_predictor
from retinaray.inference.torch_backend import TOP_K, load_torch_predictor
from retinaray.machine import count_cores
from retinaray.reporting.parity_page import ParityPicture, render_page
from retinaray.reporting.parity_table import render_parity
from retinaray.storage import Storage

logger = logging.getLogger(__name__)

_NUM_WORST = 3
_MIN_ROUNDS = 10
_LOG_EVERY = 50
_VISIBLE_SHIFT = 0.5


@dataclass(frozen=True)
class ParityOutcome:
    """What the gate found.

    Attributes:
        result: Rows, verdicts, and what was not run.
        output: Where the numbers were written; empty when nowhere.
        report: Where the page was written; empty when nowhere.
        job: The settings.
        versions: Packages that it was computed with.
    """

    result: ParityResult
    output: str = ""
    report: str = ""
    job: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 when every case is within its tolerances, else 1."""
        return 0 if self.result.has_passed else 1

    def to_json(self) -> str:
        """One line for machines."""
        return json.dumps({**self.to_dict(), "output": self.output, "report": self.report})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `--output` holds them."""
        return {**self.result.to_dict(), "job": self.job, "versions": self.versions}

    def to_text(self) -> str:
        """A table for people."""
        written = [f"written: {name}" for name in (self.output, self.report) if name]
        return "\n".join([render_parity(self.result), *written])


def run_parity(job: ParityJob) -> ParityOutcome:
    """Compare exported files with their weights.

    Raises:
        CheckpointError: If the weights or a file cannot be read, or do not belong together.
        DatasetError: If images or annotations cannot be used.
        InferenceError: If no runtime that is here can run any of the files.
        StorageError: If a file cannot be read or written.
    """
    if model_kind(job.model) != "weights":
        raise CheckpointError(
            f"{job.model}: expected the .pth weights that the other files come from; "
            "retinaray parity model.pth FILE..."
        )
    read = make_reader(job.reading)
    weights = read(job.model)
    card = read_weights(weights, source=job.model)[0]
    files = read_files(job.files, read, card, model=job.model)
    planned, unrun = plan_cases(files, job.backend)
    if not planned:
        reasons = "; ".join(f"{case.name}: {case.reason}" for case in unrun)
        raise InferenceError(f"none of {', '.join(job.files)} can run here: {reasons}")
    run = _Run(job, weights, card, read)
    groups = [
        run.compare(key, list(cases))
        for key, cases in groupby(sorted(planned, key=_group_key), key=_group_key)
    ]
    result = ParityResult(
        model=job.model,
        groups=tuple(group for group in groups if group.rows),
        unrun=tuple(unrun + run.refused),
        notes=tuple(_list_notes(files, card)),
        tolerance=run.tolerance,
        num_images=run.num_images,
        num_errors=run.num_errors,
        batch=job.batch,
        threads=run.threads,
        machine=describe_hardware(),
    )
    return _write(job, result, run.pictures)


def _group_key(planned: PlannedCase) -> tuple[tuple[int, int], int]:
    return planned.file.card.canvas, planned.file.top_k or TOP_K


def make_tolerance(config: ToleranceConfig) -> ParityTolerance:
    """Tolerances as the gate wants them."""
    return ParityTolerance(
        box_px=config.box_px,
        score=config.score,
        ap={
            "fp32": config.ap_fp32,
            "bf16": config.ap_bf16,
            "fp16": config.ap_fp16,
            "int8": config.ap_int8,
        },
        changed={
            "bf16": config.changed_bf16,
            "fp16": config.changed_fp16,
            "int8": config.changed_int8,
        },
    )


class _Run:
    """One pass over the images per canvas; counts and pictures of all passes."""

    def __init__(
        self, job: ParityJob, weights: bytes, card: ModelCard, read: Callable[[str], bytes]
    ) -> None:
        self._job, self._weights, self._card, self._read = job, weights, card, read
        self._truth = _read_truth(job, card)
        self._read_settings = make_read_settings(job.reading)
        self.threads = job.threads or count_cores()
        self.tolerance = make_tolerance(job.tolerance)
        self.refused: list[UnrunCase] = []
        self.pictures: list[ParityPicture] = []
        self.num_images = self.num_errors = 0

    def compare(
        self, key: tuple[tuple[int, int], int], planned: Sequence[PlannedCase]
    ) -> ParityGroup:
        """Run the cases of one canvas and number of candidates."""
        canvas, top_k = key
        settings = make_gate_settings(
            PredictorSettings(batch=self._job.batch, threads=self.threads, canvas=canvas)
        )
        entries = self._load(planned, settings)
        if not entries:
            return ParityGroup(canvas, None, None, ())
        reference = load_torch_predictor(
            self._weights,
            uri=self._job.model,
            settings=replace(settings, precision="fp32"),
            top_k=top_k,
        )
        gate: ParityGate[ImageKey] = ParityGate(
            reference,
            entries,
            setting=make_gate_setting(self._card),
            batch=self._job.batch,
            reference_top_k=top_k,
            num_worst=_NUM_WORST if self._job.report is not None else 0,
            keeps_detections=self._truth is not None,
        )
        self._feed(gate, canvas)
        gate.time_more(_MIN_ROUNDS)
        ap, ap_reference = self._score(gate, entries)
        for entry in entries:
            # No picture shows a smaller difference.
            worst = [
                image
                for image in gate.worst(entry.case.name)
                if image.severity >= (0, _VISIBLE_SHIFT)
            ]
            self.pictures += [
                draw_worst(
                    entry.case.name, image, self._card, canvas, self._read, self._read_settings
                )
                for image in worst
            ]
        return ParityGroup(
            canvas=canvas,
            latency_ms=gate.reference_latency_ms,
            ap=ap_reference,
            rows=tuple(gate.rows(self.tolerance, ap=ap, ap_reference=ap_reference)),
        )

    def _load(self, planned: Sequence[PlannedCase], settings: PredictorSettings) -> list[GateEntry]:
        entries = []
        for item in planned:
            logger.info("loading %s", item.case.name)
            try:
                predictor, _ = load_predictor(
                    item.file.content,
                    uri=item.file.uri,
                    backend=item.backend,
                    settings=replace(settings, precision=item.compute),
                    sidecar=item.file.sidecar,
                )
            except InferenceError as error:
                # One runtime that refuses a file is a finding; the others still have to be seen.
                self.refused.append(UnrunCase(item.case.name, str(error), is_fault=True))
                continue
            entries.append(GateEntry(item.case, predictor, item.file.top_k))
        return entries

    def _feed(self, gate: ParityGate[ImageKey], canvas: tuple[int, int]) -> None:
        storage = Storage(endpoint_url=self._job.reading.endpoint_url)
        sources = islice(list_sources(self._job.images, self._truth, storage), self._job.limit)
        failed: list[str] = []
        batches = read_batches(
            sources,
            canvas,
            self._read,
            batch=self._job.batch,
            settings=self._read_settings,
            failed=failed,
        )
        for images, keys in batches:
            before = gate.num_images
            gate.add(images, keys)
            if gate.num_images // _LOG_EVERY > before // _LOG_EVERY:
                logger.info("%d images compared", gate.num_images)
        for text in failed[:5]:
            logger.warning("%s", text)
        if gate.num_images == 0:
            raise DatasetError(
                f"none of {len(failed)} images could be read, first: {failed[0]}; check --images"
            )
        self.num_images, self.num_errors = gate.num_images, len(failed)

    def _score(
        self, gate: ParityGate[ImageKey], entries: Sequence[GateEntry]
    ) -> tuple[dict[str, float | None] | None, float | None]:
        """AP of each case and of the reference, over the images that were compared."""
        if self._truth is None:
            return None, None
        seen = {source.image_id for (source, _), _ in gate.detections()}
        truth = restrict_truth(self._truth, seen)

        def measure(name: str | None) -> float | None:
            found = [
                {"image_id": source.image_id, **result}
                for (source, placement), detections in gate.detections(name)
                for result in coco_results(detections, placement, self._card.categories)
            ]
            try:
                return evaluate_detections(truth, found).summary["AP"]
            except (ValueError, KeyError, TypeError) as error:
                raise DatasetError(
                    f"detections against {self._job.annotations}: {error}"
                ) from error

        return {entry.case.name: measure(entry.case.name) for entry in entries}, measure(None)


def _read_truth(job: ParityJob, card: ModelCard) -> Mapping[str, Any] | None:
    if job.annotations is None:
        return None
    truth = read_json(job.annotations, job.reading)
    if not isinstance(truth, dict) or not {"images", "annotations", "categories"} <= truth.keys():
        raise DatasetError(
            f"{job.annotations}: expected a COCO file with images, annotations and categories"
        )
    known = {category["id"] for category in truth["categories"]}
    missing = [str(identity) for identity in card.categories.ids if identity not in known]
    if missing:
        raise DatasetError(
            f"{job.annotations}: lacks the model's categories {', '.join(missing)}: give the "
            "annotations that belong to the model's classes, or leave --annotations out"
        )
    return truth


def _list_notes(files: Sequence[ExportedFile], card: ModelCard) -> Iterator[str]:
    for file in files:
        for key in ("score_thresholds", "nms_iou", "nms_kind", "max_detections"):
            own, right = getattr(file.card, key), getattr(card, key)
            if own != right:
                yield (
                    f"{file.name} holds {key}={own}, the weights {right}: the weights' value was "
                    "used for both"
                )


def _write(
    job: ParityJob, result: ParityResult, pictures: Sequence[ParityPicture]
) -> ParityOutcome:
    storage = Storage(endpoint_url=job.reading.endpoint_url)
    outcome = ParityOutcome(
        result, output=job.output or "", report=job.report or "", **describe_making(job)
    )
    if job.output is not None:
        text = json.dumps(outcome.to_dict(), indent=2)
        storage.write_bytes(job.output, f"{text}\n".encode())
    if job.report is not None:
        storage.write_bytes(job.report, render_page(result, pictures).encode())
    return outcome
