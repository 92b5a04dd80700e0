"""Which runtime runs a file, what it refuses, and the common tail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

import retinaray.inference.tensorrt_backend as tensorrt_backend
from retinaray.artifact import ModelCard
from retinaray.detector.postprocess import NmsKind
from retinaray.errors import CheckpointError, InferenceError
from retinaray.inference.predictor import (
    PredictorSettings,
    Suppressor,
    check_canvas,
    choose_backend,
    load_predictor,
    pad_batches,
)


@pytest.mark.parametrize(
    ("kind", "requested", "has_gpu", "backend", "reason"),
    [
        ("weights", "auto", False, "torch", "a .pth file is run by torch"),
        ("weights", "auto", True, "torch", "a .pth file is run by torch"),
        ("weights", "torch", True, "torch", "asked for"),
        ("onnx", "auto", False, "openvino", "no NVIDIA GPU here, so OpenVINO on the CPU"),
        ("onnx", "auto", True, "tensorrt", "an NVIDIA GPU is available"),
        ("onnx", "openvino", True, "openvino", "asked for"),
        ("onnx", "onnxruntime", False, "onnxruntime", "asked for"),
        ("onnx", "tensorrt", True, "tensorrt", "asked for"),
        ("plan", "auto", True, "tensorrt", "a TensorRT engine is run by TensorRT"),
        ("plan", "tensorrt", True, "tensorrt", "asked for"),
    ],
)
def test_choose_backend_goes_by_file_and_hardware_and_says_why(
    kind: str, requested: str, has_gpu: bool, backend: str, reason: str
) -> None:
    assert choose_backend(kind, requested, has_gpu=has_gpu) == (backend, reason)


@pytest.mark.parametrize(
    ("kind", "requested", "has_gpu", "text"),
    [
        ("onnx", "tensorrt", False, "'tensorrt' needs an NVIDIA GPU .*--backend openvino"),
        (
            "weights",
            "openvino",
            False,
            r"'openvino' cannot run weights files \(possible: torch\): export it first with "
            "`retinaray export",
        ),
        ("weights", "tensorrt", True, "'tensorrt' cannot run weights files .*export it first"),
        ("onnx", "torch", False, "'torch' cannot run onnx files .*give --backend openvino"),
        ("onnx", "tflite", True, "'tflite' cannot run .*openvino, onnxruntime, tensorrt"),
        ("plan", "auto", False, "needs an NVIDIA GPU .*run an .onnx file with --backend openvino"),
        ("plan", "tensorrt", False, "'tensorrt' needs an NVIDIA GPU"),
        ("plan", "openvino", True, "'openvino' cannot run plan files .*give the .onnx file"),
    ],
)
def test_choose_backend_refuses_and_says_what_to_do(
    kind: str, requested: str, has_gpu: bool, text: str
) -> None:
    with pytest.raises(InferenceError, match=text):
        choose_backend(kind, requested, has_gpu=has_gpu)


def test_check_canvas_refuses_another_size_than_the_files() -> None:
    check_canvas(None, (64, 96), "m.onnx")
    check_canvas((64, 96), (64, 96), "m.onnx")
    with pytest.raises(
        InferenceError, match=r"m.onnx was exported for 64x96 .* asked for 96x64: .*--size 96 64"
    ):
        check_canvas((96, 64), (64, 96), "m.onnx")


def test_load_predictor_refuses_a_file_of_another_kind() -> None:
    with pytest.raises(CheckpointError, match=r"model.trt: expected a model file"):
        load_predictor(b"", uri="model.trt", backend="auto", settings=PredictorSettings())


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_load_predictor_refuses_another_canvas_than_the_exported(
    tiny_onnx: bytes, backend: str
) -> None:
    settings = PredictorSettings(canvas=(96, 64))
    with pytest.raises(InferenceError, match=r"m\.onnx was exported for 64x96"):
        load_predictor(tiny_onnx, uri="m.onnx", backend=backend, settings=settings)


@pytest.fixture
def candidates() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One image: two overlapping boxes of class 0 (IoU 2/3), one elsewhere, one of class 1."""
    boxes = [[0.0, 0, 10, 10], [2, 0, 12, 10], [40, 40, 50, 50], [0, 0, 10, 10]]
    return (
        torch.tensor([boxes]),
        torch.tensor([[0.9, 0.8, 0.4, 0.35]]),
        torch.tensor([[0, 0, 0, 1]], dtype=torch.int32),
    )


@pytest.mark.parametrize(
    ("settings", "scores"),
    [
        # The card's thresholds are 0.3 for class 0 and 0.5 for class 1, its NMS IoU is 0.5.
        (PredictorSettings(), [0.9, 0.4]),
        (PredictorSettings(score_threshold=0.0), [0.9, 0.4, 0.35]),
        (PredictorSettings(score_threshold=0.5), [0.9]),
        (PredictorSettings(nms_iou=0.7), [0.9, 0.8, 0.4]),
        (PredictorSettings(nms_iou=0.7, max_detections=2), [0.9, 0.8]),
    ],
)
def test_suppressor_takes_the_cards_values_unless_the_caller_has_others(
    make_tiny_card: Callable[..., ModelCard],
    candidates: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    settings: PredictorSettings,
    scores: list[float],
) -> None:
    card = replace(make_tiny_card(num_classes=2), score_thresholds=(0.3, 0.5))
    (found,) = Suppressor(card, settings)(*candidates)
    assert found.scores.tolist() == pytest.approx(scores)


@pytest.mark.parametrize(
    ("card_kind", "asked", "scores"),
    [
        ("class", None, [0.9, 0.4]),
        ("none", None, [0.9, 0.8]),
        ("class", "none", [0.9, 0.8]),
        ("none", "class", [0.9, 0.4]),
    ],
)
def test_suppressor_takes_the_cards_nms_kind_and_cap_unless_the_caller_has_others(
    make_tiny_card: Callable[..., ModelCard],
    candidates: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    card_kind: NmsKind,
    asked: NmsKind | None,
    scores: list[float],
) -> None:
    card = replace(
        make_tiny_card(num_classes=2),
        score_thresholds=(0.3, 0.5),
        nms_kind=card_kind,
        max_detections=2,
    )
    (found,) = Suppressor(card, PredictorSettings(nms_kind=asked))(*candidates)
    assert found.scores.tolist() == pytest.approx(scores)
    (found,) = Suppressor(card, PredictorSettings(nms_kind=asked, max_detections=1))(*candidates)
    assert found.scores.tolist() == pytest.approx(scores[:1])


@pytest.mark.parametrize("uri", ["m.plan", "folder/m.ENGINE"])
def test_load_predictor_hands_an_engine_and_its_description_to_tensorrt(
    monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    calls = []

    def load(content: bytes, sidecar: bytes | None, **rest: object) -> str:
        calls.append((content, sidecar, rest))
        return "predictor"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tensorrt_backend, "load_tensorrt_plan", load)
    settings = PredictorSettings(batch=3)
    loaded = load_predictor(b"plan", uri=uri, backend="auto", settings=settings, sidecar=b"{}")
    assert loaded == ("predictor", "a TensorRT engine is run by TensorRT")
    assert calls == [(b"plan", b"{}", {"uri": uri, "settings": settings})]


@pytest.mark.parametrize(
    ("uri", "backend"), [("m.onnx", "onnxruntime"), ("m.onnx", "tensorrt"), ("m.plan", "auto")]
)
def test_load_predictor_refuses_bf16_where_the_file_decides(
    monkeypatch: pytest.MonkeyPatch, uri: str, backend: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InferenceError, match=r"computes in the types of the file, not in bf16"):
        load_predictor(b"", uri=uri, backend=backend, settings=PredictorSettings(precision="bf16"))


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [1]), (3, [3]), (4, [3, 1]), (6, [3, 3])], ids=lambda value: str(value)
)
def test_pad_batches_fills_the_last_batch_with_black(count: int, sizes: list[int]) -> None:
    images = torch.full((count, 3, 4, 5), 7, dtype=torch.uint8)
    batches = list(pad_batches(images, 3, "float32"))
    assert [real for _, real in batches] == sizes
    for array, real in batches:
        assert array.shape == (3, 3, 4, 5)
        assert array.dtype == np.float32
        assert (array[:real] == 7).all()
        assert (array[real:] == 0).all()
