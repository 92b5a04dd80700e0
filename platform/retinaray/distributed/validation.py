"""Validation by all workers of a training together: each detects in its share, rank 0 scores."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray.train
import torch
import torch.distributed
from torch import Tensor

from retinaray.artifact import ModelCard
from retinaray.assembly.reading import make_read_settings, make_reader, read_json
from retinaray.assembly.training import TrainingInputs
from retinaray.config.schema import TrainJob
from retinaray.data.coco import CocoDataset, resolve_image_uri
from retinaray.evaluation.candidates import (
    CandidateSet,
    DetectionSetting,
    apply_setting,
    merge,
)
from retinaray.evaluation.coco_map import evaluate_detections
from retinaray.inference.candidate_collection import collect_candidates, make_candidate_settings
from retinaray.inference.pipeline import ImageSource
from retinaray.inference.predictor import PredictorSettings
from retinaray.inference.torch_backend import TorchPredictor

_BATCH = 4
_TIMED_PASSES = 5


@dataclass(frozen=True)
class Validation:
    """What a validation found.

    Attributes:
        metrics: COCO's twelve numbers, `AP/<class>` of each class, `unreadable` images; None where
            there is no ground truth. The same on all workers.
        candidates: What all settings of suppression can be applied to; on rank 0 only.
    """

    metrics: dict[str, Any]
    candidates: CandidateSet | None


class Validator:
    """Scores weights on the validation set.

    Args:
        job: With absolute paths.
        val: The validation set.
        card: Of the model.
        autocast_dtype: Type of the convolutions; none = float32.
        has_latency: Whether the time of one image is measured, too: `latency_ms`.
    """

    def __init__(
        self,
        job: TrainJob,
        val: CocoDataset,
        card: ModelCard,
        *,
        autocast_dtype: torch.dtype | None,
        has_latency: bool,
    ) -> None:
        self._job = job
        self._val = val
        self._card = card
        self._autocast_dtype = autocast_dtype
        self._has_latency = has_latency
        self._latency_ms: float | None = None
        self._truth: dict[str, Any] | None = None

    def validate(self, weights: Mapping[str, Tensor], device: torch.device) -> Validation:
        """Detect and score; all workers come here together."""
        context = ray.train.get_context()
        rank, world_size = context.get_world_rank(), context.get_world_size()
        model = self._card.build_model()
        model.load_state_dict(weights)
        predictor = TorchPredictor(
            model.to(device=device, memory_format=torch.channels_last),  # type: ignore[call-overload]
            card=self._card,
            settings=make_candidate_settings(PredictorSettings(batch=_BATCH)),
            autocast_dtype=self._autocast_dtype,
        )
        share, num_errors = self._collect(predictor, range(rank, len(self._val), world_size))
        shares: list[Any] = [(share.dump(), num_errors)]
        if world_size > 1:
            gathered: list[Any] | None = [None] * world_size if rank == 0 else None
            torch.distributed.gather_object(shares[0], gathered)
            shares = gathered or []
        metrics: dict[str, Any] = {}
        candidates = None
        if rank == 0:
            candidates = merge(
                [CandidateSet.load(content, source="a worker") for content, _ in shares],
                [record.image_id for record in self._val.images],
            )
            metrics = self._score(candidates) | {"unreadable": sum(count for _, count in shares)}
            if self._has_latency:
                metrics["latency_ms"] = self._measure_latency(predictor)
        if world_size > 1:
            box = [metrics]
            torch.distributed.broadcast_object_list(box, src=0)
            metrics = box[0]
        return Validation(metrics=metrics, candidates=candidates)

    def _collect(self, predictor: TorchPredictor, positions: range) -> tuple[CandidateSet, int]:
        root = self._job.data.val_images or self._job.data.images
        sources = [
            ImageSource(record.image_id, resolve_image_uri(root, record.file_name))
            for record in (self._val.images[position] for position in positions)
        ]
        candidates, errors = collect_candidates(
            predictor,
            sources,
            read=make_reader(self._job.reading),
            batch=_BATCH,
            settings=make_read_settings(self._job.reading),
        )
        return candidates, len(errors)

    def _score(self, candidates: CandidateSet) -> dict[str, Any]:
        if self._truth is None:
            self._truth = read_json(str(self._job.data.val_annotations), self._job.reading)
        card = self._card
        setting = DetectionSetting(
            score_thresholds=card.score_thresholds,
            nms_iou=card.nms_iou,
            nms_kind=card.nms_kind,
            max_detections=card.max_detections,
        )
        scores = evaluate_detections(
            self._truth, apply_setting(candidates, setting, card.categories)
        )
        return {**scores.summary, **{f"AP/{entry.name}": entry.AP for entry in scores.classes}}

    def _measure_latency(self, predictor: TorchPredictor) -> float:
        """Median time of one black image, suppression of nothing included; measured once a run."""
        if self._latency_ms is None:
            image = torch.zeros(1, 3, *predictor.canvas, dtype=torch.uint8)
            predictor.predict(image)
            times = []
            for _ in range(_TIMED_PASSES):
                start = time.perf_counter()
                predictor.predict(image)
                times.append(1000 * (time.perf_counter() - start))
            self._latency_ms = statistics.median(times)
        return self._latency_ms


def make_validator(
    job: TrainJob,
    inputs: TrainingInputs,
    card: ModelCard,
    *,
    autocast_dtype: torch.dtype | None,
    is_trial: bool,
) -> Validator | None:
    """A validator; none without a validation set."""
    if inputs.val is None:
        return None
    return Validator(
        job,
        inputs.val,
        card,
        autocast_dtype=autocast_dtype,
        has_latency=is_trial or job.run.latency_price > 0,
    )


def rate(metrics: Mapping[str, Any], *, objective: str, latency_price: float) -> float:
    """What the kept weights are best at: the objective less the price of the latency.

    Args:
        metrics: Of a validation.
        objective: Name of a metric.
        latency_price: Per millisecond.

    Returns:
        The score; -1 where the objective has no ground truth.
    """
    value = metrics.get(objective)
    if value is None:
        return -1.0
    return float(value) - latency_price * float(metrics.get("latency_ms", 0.0))
