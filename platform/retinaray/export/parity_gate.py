"""The parity gate: runtimes and precisions of one model against torch in float32, image by image.

Canvases come batch by batch and go again: what is kept are counts, latencies, the few worst images
and, where they are scored later, detections. It reads no files.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from retinaray.artifact import ModelCard
from retinaray.detector.postprocess import Detections, suppress_overlaps
from retinaray.evaluation.candidates import DetectionSetting
from retinaray.evaluation.operating_points import DEFAULT_THRESHOLD
from retinaray.evaluation.parity_matching import ImageDifferences, match_detections
from retinaray.evaluation.parity_rows import (
    DifferenceTally,
    ParityCase,
    ParityRow,
    ParityTolerance,
    judge_row,
)
from retinaray.inference.candidate_collection import make_candidate_settings
from retinaray.inference.predictor import Predictor, PredictorSettings

KeyT = TypeVar("KeyT")
"""What the caller calls an image."""

# A list of candidates is as good as full at this share of its length: boxes without area go.
_FULL = 0.9


@dataclass(frozen=True)
class GateEntry:
    """A runtime to check.

    Attributes:
        case: What it is.
        predictor: Loaded with `make_gate_settings`, for canvases of the reference's size.
        top_k: Candidates that it gives per image; none = unknown.
    """

    case: ParityCase
    predictor: Predictor
    top_k: int | None = None


@dataclass(frozen=True, eq=False)
class WorstImage(Generic[KeyT]):
    """An image in which a case differs much from the reference.

    Attributes:
        key: The caller's name of the image.
        reference: Detections of the reference.
        candidate: Detections of the case.
        differences: Between the two.
    """

    key: KeyT
    reference: Detections
    candidate: Detections
    differences: ImageDifferences

    @property
    def severity(self) -> tuple[int, float]:
        """Changed boxes, then the largest shift of a pair."""
        shifts = self.differences.shifts
        return self.differences.num_changed, float(shifts.max()) if len(shifts) else 0.0


def make_gate_settings(settings: PredictorSettings) -> PredictorSettings:
    """The same runtime, giving everything that the network proposes."""
    return make_candidate_settings(settings, floor=0.0)


def make_gate_setting(card: ModelCard) -> DetectionSetting:
    """How a model's candidates become the detections that are compared."""
    return DetectionSetting(
        score_thresholds=card.score_thresholds,
        nms_iou=card.nms_iou,
        nms_kind=card.nms_kind,
        max_detections=card.max_detections,
    )


class ParityGate(Generic[KeyT]):
    """Compares any number of runtimes with one reference.

    Args:
        reference: Defines what is right; loaded with `make_gate_settings`.
        entries: What is compared with it; names of cases are unique.
        setting: From candidates to detections.
        batch: Images per call; latencies are measured on calls of exactly so many.
        reference_top_k: Candidates that the reference gives per image; none = unknown.
        num_worst: Images to keep per case.
        keeps_detections: Keep the detections of all images, for AP.
    """

    def __init__(
        self,
        reference: Predictor,
        entries: Sequence[GateEntry],
        *,
        setting: DetectionSetting,
        batch: int,
        reference_top_k: int | None = None,
        num_worst: int = 0,
        keeps_detections: bool = False,
    ) -> None:
        self._entries = tuple(entries)
        # Place 0 is the reference everywhere below.
        self._predictors = (reference, *(entry.predictor for entry in entries))
        tops = (reference_top_k, *(entry.top_k for entry in entries))
        self._longest = [top_k or 0 for top_k in tops]
        self._setting = setting
        self._thresholds = torch.tensor(setting.score_thresholds)
        self._batch = batch
        self._num_worst = num_worst
        self._keeps_detections = keeps_detections
        self._num_images = self._num_calls = 0
        self._latencies_ms: list[list[float]] = [[] for _ in self._predictors]
        self._candidates = [DifferenceTally() for _ in entries]
        self._detections = [DifferenceTally() for _ in entries]
        self._worst: list[list[tuple[tuple[int, float], int, WorstImage[KeyT]]]] = [
            [] for _ in entries
        ]
        self._kept: list[list[Float[np.ndarray, "D 6"]]] = [[] for _ in self._predictors]
        self._keys: list[KeyT] = []
        self._last = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)

    def add(self, images: UInt8[Tensor, "N 3 H W"], keys: Sequence[KeyT]) -> None:
        """Run everything on some images.

        Args:
            images: At most the batch, at least one.
            keys: Names of the images.
        """
        if self._num_images == 0:
            # Runtimes allocate and choose kernels in their first call.
            for predictor in self._predictors:
                predictor.predict(images)
        found = self._call(images)
        for number, key in enumerate(keys):
            self._compare([results[number] for results in found], key)
        self._last = images

    def time_more(self, min_rounds: int) -> None:
        """Repeat the last images until each runtime has been timed this often.

        Fewer images than a batch are repeated to fill one; nothing is timed without images.
        """
        if len(self._last) == 0:
            return
        copies = -(-self._batch // len(self._last))
        images = self._last.repeat(copies, 1, 1, 1)[: self._batch]
        while len(self._latencies_ms[0]) < min_rounds:
            self._call(images)

    def _call(self, images: Tensor) -> list[list[Detections]]:
        found: list[list[Detections]] = [[] for _ in self._predictors]
        count = len(self._predictors)
        # Another one begins each time, so that none always follows the same one.
        for step in range(count):
            place = (step + self._num_calls) % count
            start = time.perf_counter()
            found[place] = self._predictors[place].predict(images)
            elapsed_ms = 1e3 * (time.perf_counter() - start)
            if len(images) == self._batch:
                self._latencies_ms[place].append(elapsed_ms / self._batch)
        self._num_calls += 1
        return found

    def _compare(self, candidates: list[Detections], key: KeyT) -> None:
        self._num_images += 1
        detections = [self._suppress(found) for found in candidates]
        self._longest = [
            max(longest, len(found))
            for longest, found in zip(self._longest, candidates, strict=True)
        ]
        if self._keeps_detections:
            self._keys.append(key)
            for kept, found in zip(self._kept, detections, strict=True):
                kept.append(_pack(found))
        caps = [max(1, round(_FULL * longest)) for longest in self._longest]
        limit = self._setting.max_detections
        for place in range(len(self._entries)):
            raw = match_detections(
                candidates[0],
                candidates[place + 1],
                score_thresholds=self._thresholds,
                reference_cap=caps[0],
                candidate_cap=caps[place + 1],
            )
            final = match_detections(
                detections[0],
                detections[place + 1],
                score_thresholds=self._thresholds,
                reference_cap=limit,
                candidate_cap=limit,
            )
            self._candidates[place].add(raw)
            self._detections[place].add(final)
            self._keep_worst(place, WorstImage(key, detections[0], detections[place + 1], final))

    def _suppress(self, found: Detections) -> Detections:
        # Down to the threshold that AP is computed at; the comparison applies the model's own.
        lowered = self._thresholds.clamp(max=DEFAULT_THRESHOLD)
        (kept,) = suppress_overlaps(
            found.boxes_xyxy[None],
            found.scores[None],
            found.labels[None],
            score_thresholds=lowered,
            nms_iou=self._setting.nms_iou,
            max_detections=self._setting.max_detections,
            nms_kind=self._setting.nms_kind,
        )
        return kept

    def _keep_worst(self, place: int, image: WorstImage[KeyT]) -> None:
        heap = self._worst[place]
        # The earlier of two equal images stays.
        heapq.heappush(heap, (image.severity, -self._num_images, image))
        if len(heap) > self._num_worst:
            heapq.heappop(heap)

    def worst(self, name: str) -> list[WorstImage[KeyT]]:
        """The images in which a case differs most, worst first; identical ones are left out."""
        heap = self._worst[self._place(name)]
        return [image for severity, _, image in sorted(heap, reverse=True) if severity > (0, 0.0)]

    def detections(self, name: str | None = None) -> Iterator[tuple[KeyT, Detections]]:
        """Key and detections of each image, in their order; none = the reference's.

        They reach down to the threshold that AP is computed at; none unless they are kept.
        """
        place = 0 if name is None else self._place(name) + 1
        for key, packed in zip(self._keys, self._kept[place], strict=True):
            yield key, _unpack(packed)

    def _place(self, name: str) -> int:
        return [entry.case.name for entry in self._entries].index(name)

    @property
    def num_images(self) -> int:
        """Images that were compared."""
        return self._num_images

    @property
    def reference_latency_ms(self) -> float | None:
        """Median time of the reference per image; none = not measured."""
        return _median(self._latencies_ms[0])

    def rows(
        self,
        tolerance: ParityTolerance,
        *,
        ap: Mapping[str, float | None] | None = None,
        ap_reference: float | None = None,
    ) -> list[ParityRow]:
        """The verdict on each case, in the order of the entries.

        Args:
            tolerance: Limits.
            ap: AP by name of case, where there is ground truth.
            ap_reference: AP of the reference.
        """
        rows = [
            ParityRow(
                case=entry.case,
                num_images=self._num_images,
                candidates=self._candidates[place],
                detections=self._detections[place],
                ap=None if ap is None else ap[entry.case.name],
                ap_reference=ap_reference,
                latency_ms=_median(self._latencies_ms[place + 1]),
            )
            for place, entry in enumerate(self._entries)
        ]
        return [replace(row, reasons=judge_row(row, tolerance)) for row in rows]


def compare_runtimes(
    reference: Predictor,
    entry: GateEntry,
    canvases: Iterable[UInt8[Tensor, "3 H W"]],
    *,
    tolerance: ParityTolerance,
    reference_top_k: int | None = None,
) -> ParityRow:
    """One runtime against the reference, one canvas at a time.

    Args:
        reference: Defines what is right; loaded with `make_gate_settings`.
        entry: What is compared with it.
        canvases: Images; may be none.
        tolerance: Limits.
        reference_top_k: Candidates that the reference gives per image; none = unknown.
    """
    gate: ParityGate[int] = ParityGate(
        reference,
        [entry],
        setting=make_gate_setting(reference.card),
        batch=1,
        reference_top_k=reference_top_k,
    )
    for number, canvas in enumerate(canvases):
        gate.add(canvas[None], [number])
    return gate.rows(tolerance)[0]


def read_top_k(content: bytes) -> int | None:
    """Candidates per image that an exported ONNX file gives; none = its shape does not say."""
    import onnx

    outputs = onnx.load_model_from_string(content).graph.output
    sizes = [value.type.tensor_type.shape.dim for value in outputs if value.name == "scores"]
    return sizes[0][1].dim_value or None if sizes and len(sizes[0]) == 2 else None


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _pack(found: Detections) -> Float[np.ndarray, "D 6"]:
    """One small array instead of three tensors: a run may keep very many."""
    columns = (found.boxes_xyxy, found.scores[:, None], found.labels[:, None].float())
    return torch.cat(columns, dim=1).numpy()


def _unpack(packed: Float[np.ndarray, "D 6"]) -> Detections:
    table = torch.from_numpy(packed)
    return Detections(table[:, :4], table[:, 4], table[:, 5].long())
