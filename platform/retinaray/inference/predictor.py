"""One protocol for every runtime: a batch of canvases in, detections in network pixels out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import UInt8
from torch import Tensor

from retinaray.artifact import ModelCard, model_kind
from retinaray.detector.postprocess import Detections, NmsKind, suppress_overlaps
from retinaray.errors import InferenceError

Backend = Literal["openvino", "onnxruntime", "torch", "tensorrt"]


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
    """

    batch: int = 8
    threads: int = 1
    canvas: tuple[int, int] | None = None
    score_threshold: float | None = None
    nms_iou: float | None = None
    max_detections: int | None = None
    nms_kind: NmsKind | None = None


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
        kind: `weights` or `onnx`; see `artifact.model_kind`.
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
    }
    options = possible[kind]
    if requested != "auto" and requested not in options:
        hint = (
            "export it first with `retinaray export model.pth model.onnx`"
            if kind == "weights"
            else f"give --backend {options[0]}"
        )
        raise InferenceError(
            f"backend {requested!r} cannot run {kind} files (possible: {', '.join(options)}): "
            f"{hint}"
        )
    if requested == "tensorrt" and not has_gpu:
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
    }
    return options[0], reasons[kind]


def load_predictor(
    content: bytes, *, uri: str, backend: str, settings: PredictorSettings
) -> tuple[Predictor, str]:
    """Load a model file into a runtime.

    Args:
        content: The file.
        uri: Its name: the ending tells its kind.
        backend: A backend, or `auto`.
        settings: How to run it.

    Returns:
        The predictor, and why this backend was chosen.

    Raises:
        CheckpointError: If the file is damaged, foreign or lacks its metadata.
        InferenceError: If the backend cannot run here, or the settings do not fit the file.
    """
    kind = model_kind(uri)
    chosen, reason = choose_backend(kind, backend, has_gpu=torch.cuda.is_available())
    return _LOADERS[chosen](content, uri, settings), reason


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


def _load_torch(content: bytes, uri: str, settings: PredictorSettings) -> Predictor:
    from retinaray.inference.torch_backend import load_torch_predictor

    return load_torch_predictor(content, uri=uri, settings=settings)


def _load_openvino(content: bytes, uri: str, settings: PredictorSettings) -> Predictor:
    from retinaray.inference.openvino_backend import OpenVinoPredictor

    return OpenVinoPredictor(content, uri=uri, settings=settings)


def _load_onnxruntime(content: bytes, uri: str, settings: PredictorSettings) -> Predictor:
    from retinaray.inference.onnxruntime_backend import OnnxRuntimePredictor

    return OnnxRuntimePredictor(content, uri=uri, settings=settings)


def _load_tensorrt(content: bytes, uri: str, settings: PredictorSettings) -> Predictor:
    from retinaray.inference.tensorrt_backend import load_tensorrt_predictor

    return load_tensorrt_predictor(content, uri=uri, settings=settings)


_LOADERS: dict[Backend, Callable[[bytes, str, PredictorSettings], Predictor]] = {
    "torch": _load_torch,
    "openvino": _load_openvino,
    "onnxruntime": _load_onnxruntime,
    "tensorrt": _load_tensorrt,
}
