"""One protocol for every runtime: a batch of canvases in, detections in network pixels out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from retinaray.artifact import ModelCard, model_kind
from retinaray.detector.postprocess import Detections, NmsKind, suppress_overlaps
from retinaray.errors import InferenceError

Backend = Literal["openvino", "onnxruntime", "torch", "tensorrt"]
ComputeType = Literal["fp32", "bf16"]
"""What convolutions are computed in where the file leaves that open."""


@dataclass(frozen=True)
class PredictorSettings:
    """How a model is run.

    Attributes:
        batch: Images per network call; smaller last batches are padded by the runtimes that need
            it.
        threads: Processor threads for the runtime.
        canvas: Network height and width of a weights file; none = the card's. Exported files have
            their own.
        score_threshold: One threshold for all classes; none = the card's, per class.
        nms_iou: Overlap of suppression; none = the card's.
        max_detections: Detections per image at most; none = the card's.
        nms_kind: Which boxes compete in suppression; none = the card's.
        precision: What convolutions are computed in: `auto` = bf16 in OpenVINO on processors that
            have it, float32 elsewhere. ONNX Runtime and TensorRT compute in the types of the file.
    """

    batch: int = 8
    threads: int = 1
    canvas: tuple[int, int] | None = None
    score_threshold: float | None = None
    nms_iou: float | None = None
    max_detections: int | None = None
    nms_kind: NmsKind | None = None
    precision: Literal["auto"] | ComputeType = "auto"


class Predictor(Protocol):
    """A loaded model.

    Attributes:
        backend: Which runtime it is.
        card: What the model is.
        canvas: Height and width of the images that it takes, in pixels.
    """

    backend: str
    card: ModelCard
    canvas: tuple[int, int]

    def predict(self, images: UInt8[Tensor, "N 3 H W"]) -> list[Detections]:
        """Detections of each image in network pixels, on the CPU; N at most the batch."""
        ...


class Suppressor:
    """The common tail of all runtimes: thresholds and NMS by card or caller."""

    def __init__(self, card: ModelCard, settings: PredictorSettings) -> None:
        thresholds = card.score_thresholds
        if settings.score_threshold is not None:
            thresholds = (settings.score_threshold,) * len(card.categories)
        self._thresholds = torch.tensor(thresholds, dtype=torch.float32)
        self._nms_iou = card.nms_iou if settings.nms_iou is None else settings.nms_iou
        asked = settings.max_detections
        self._max_detections = card.max_detections if asked is None else asked
        self._nms_kind = card.nms_kind if settings.nms_kind is None else settings.nms_kind

    def __call__(self, boxes_xyxy: Tensor, scores: Tensor, labels: Tensor) -> list[Detections]:
        """Detections on the CPU from candidates on any device; see `suppress_overlaps`."""
        self._thresholds = self._thresholds.to(scores.device)
        found = suppress_overlaps(
            boxes_xyxy,
            scores,
            labels,
            score_thresholds=self._thresholds,
            nms_iou=self._nms_iou,
            max_detections=self._max_detections,
            nms_kind=self._nms_kind,
        )
        return [
            Detections(item.boxes_xyxy.cpu(), item.scores.cpu(), item.labels.cpu())
            for item in found
        ]


def choose_backend(kind: str, requested: str, *, has_gpu: bool) -> tuple[Backend, str]:
    """Which runtime runs a file.

    Args:
        kind: `weights`, `onnx` or `plan`; see `artifact.model_kind`.
        requested: A backend, or `auto`.
        has_gpu: Whether CUDA is available here.

    Returns:
        The backend and the reason in words.

    Raises:
        InferenceError: If the requested backend cannot run that kind of file, or needs a GPU that
            is not here.
    """
    possible: dict[str, tuple[Backend, ...]] = {
        "weights": ("torch",),
        "onnx": ("openvino", "onnxruntime", "tensorrt"),
        "plan": ("tensorrt",),
    }
    options = possible[kind]
    if requested != "auto" and requested not in options:
        hints = {
            "weights": "export it first with `retinaray export model.pth model.onnx`",
            "onnx": f"give --backend {options[0]}",
            "plan": "give the .onnx file instead",
        }
        raise InferenceError(
            f"backend {requested!r} cannot run {kind} files (possible: {', '.join(options)}): "
            f"{hints[kind]}"
        )
    if "tensorrt" in (requested, *options[:1]) and not has_gpu:
        raise InferenceError(
            "backend 'tensorrt' needs an NVIDIA GPU with CUDA, and none is available here: "
            "run an .onnx file with --backend openvino instead"
        )
    if requested != "auto":
        return options[options.index(requested)], "asked for"
    if kind == "onnx" and has_gpu:
        return "tensorrt", "an NVIDIA GPU is available"
    reasons = {
        "weights": "a .pth file is run by torch",
        "onnx": "no NVIDIA GPU here, so OpenVINO on the CPU",
        "plan": "a TensorRT engine is run by TensorRT",
    }
    return options[0], reasons[kind]


def load_predictor(
    content: bytes,
    *,
    uri: str,
    backend: str,
    settings: PredictorSettings,
    sidecar: bytes | None = None,
) -> tuple[Predictor, str]:
    """Load a model file into a runtime.

    Args:
        content: The file.
        uri: Its name: the ending tells its kind.
        backend: A backend, or `auto`.
        settings: How to run it.
        sidecar: The description beside a TensorRT engine; of no use to other files.

    Returns:
        The predictor, and why this backend was chosen, and what it computes in where that was a
        choice.

    Raises:
        CheckpointError: If the file is damaged, foreign or lacks its metadata.
        InferenceError: If the backend cannot run here, is not installed, or the settings do not fit
            the file.
    """
    kind = model_kind(uri)
    chosen, reason = choose_backend(kind, backend, has_gpu=torch.cuda.is_available())
    if kind == "plan":
        return _load_plan(content, sidecar, uri, settings), reason
    predictor, note = _LOADERS[chosen](content, uri, settings)
    return predictor, f"{reason}; {note}" if note else reason


def refuse_bf16(settings: PredictorSettings, backend: Backend) -> None:
    """Refuse bf16 for a runtime that computes in the types of the file.

    Raises:
        InferenceError: If it is asked for.
    """
    if settings.precision == "bf16":
        raise InferenceError(
            f"backend {backend!r} computes in the types of the file, not in bf16: leave "
            "--precision out, or give --backend openvino"
        )


def describe_missing(backend: Backend, package: str, error: ImportError) -> InferenceError:
    """The error of a runtime that is not installed, or does not load."""
    return InferenceError(
        f"backend {backend!r} needs the package {package}, which is not installed or does not load "
        f"here ({error}): pip install {package}, or give another --backend"
    )


def pad_batches(
    images: UInt8[Tensor, "N 3 H W"], batch: int, input_type: str
) -> Iterator[tuple[np.ndarray, int]]:
    """Cut images into arrays of exactly one batch; the last one is filled up with black.

    Args:
        images: Any number of canvases, on the CPU.
        batch: Images per array.
        input_type: numpy type of the arrays, `uint8` or `float32`.

    Yields:
        Arrays [batch, 3, H, W], and how many of their images are real.
    """
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        array = np.zeros((batch, *images.shape[1:]), dtype=input_type)
        array[: len(part)] = part.numpy()
        yield array, len(part)


def check_canvas(asked: tuple[int, int] | None, actual: tuple[int, int], uri: str) -> None:
    """Refuse another canvas than the one in an exported file.

    Raises:
        InferenceError: If they differ.
    """
    if asked is not None and asked != actual:
        raise InferenceError(
            f"{uri} was exported for {actual[0]}x{actual[1]} (height x width), asked for "
            f"{asked[0]}x{asked[1]}: "
            f"leave the size out, or export again with --size {asked[0]} {asked[1]}"
        )


def _load_torch(content: bytes, uri: str, settings: PredictorSettings) -> tuple[Predictor, str]:
    from retinaray.inference.torch_backend import load_torch_predictor

    note = "convolutions in bf16, asked for" if settings.precision == "bf16" else ""
    return load_torch_predictor(content, uri=uri, settings=settings), note


def _load_openvino(content: bytes, uri: str, settings: PredictorSettings) -> tuple[Predictor, str]:
    from retinaray.inference.openvino_backend import OpenVinoPredictor

    predictor = OpenVinoPredictor(content, uri=uri, settings=settings)
    return predictor, predictor.precision_reason


def _load_onnxruntime(
    content: bytes, uri: str, settings: PredictorSettings
) -> tuple[Predictor, str]:
    from retinaray.inference.onnxruntime_backend import OnnxRuntimePredictor

    return OnnxRuntimePredictor(content, uri=uri, settings=settings), ""


def _load_tensorrt(content: bytes, uri: str, settings: PredictorSettings) -> tuple[Predictor, str]:
    from retinaray.inference.tensorrt_backend import load_tensorrt_predictor

    refuse_bf16(settings, "tensorrt")
    return load_tensorrt_predictor(content, uri=uri, settings=settings), ""


def _load_plan(
    content: bytes, sidecar: bytes | None, uri: str, settings: PredictorSettings
) -> Predictor:
    from retinaray.inference.tensorrt_backend import load_tensorrt_plan

    refuse_bf16(settings, "tensorrt")
    return load_tensorrt_plan(content, sidecar, uri=uri, settings=settings)


_LOADERS: dict[Backend, Callable[[bytes, str, PredictorSettings], tuple[Predictor, str]]] = {
    "torch": _load_torch,
    "openvino": _load_openvino,
    "onnxruntime": _load_onnxruntime,
    "tensorrt": _load_tensorrt,
}
