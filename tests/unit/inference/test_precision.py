"""What each runtime computes in, in how many threads, at which batch, and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import onnx
import onnxruntime
import openvino
import pytest
import torch
from onnx import TensorProto, helper

from retinaray.detector.postprocess import Detections
from retinaray.errors import InferenceError
from retinaray.export.sample_canvases import make_test_canvases
from retinaray.inference.onnx_contract import read_precision
from retinaray.inference.openvino_backend import OpenVinoPredictor, choose_precision
from retinaray.inference.predictor import PredictorSettings, load_predictor
from retinaray.inference.torch_backend import load_torch_predictor

pytestmark = pytest.mark.usefixtures("one_thread")

HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture(scope="module")
def canvases() -> torch.Tensor:
    return torch.stack(make_test_canvases((64, 96), count=5, seed=5))


@pytest.fixture(scope="module")
def int8_onnx(tiny_onnx: bytes) -> bytes:
    """The tiny file with the input of its second convolution quantized."""
    model = onnx.load_model_from_string(tiny_onnx)
    position, node = [
        (place, node) for place, node in enumerate(model.graph.node) if node.op_type == "Conv"
    ][1]
    model.graph.initializer.append(helper.make_tensor("step", TensorProto.FLOAT, [], [0.05]))
    model.graph.initializer.append(helper.make_tensor("zero", TensorProto.INT8, [], [0]))
    quantized = helper.make_node("QuantizeLinear", [node.input[0], "step", "zero"], ["whole"])
    restored = helper.make_node("DequantizeLinear", ["whole", "step", "zero"], ["restored"])
    node.input[0] = "restored"
    model.graph.node.insert(position, quantized)
    model.graph.node.insert(position + 1, restored)
    content = bytes(model.SerializeToString())
    assert read_precision(content) == "int8"
    return content


@pytest.fixture(scope="module")
def fix_batch(tiny_onnx: bytes) -> Callable[[int], bytes]:
    """The tiny file for one size of batch only."""

    def fix(batch: int) -> bytes:
        model = onnx.load_model_from_string(tiny_onnx)
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].ClearField("dim_param")
            value.type.tensor_type.shape.dim[0].dim_value = batch
        return bytes(model.SerializeToString())

    return fix


@pytest.mark.parametrize(
    ("requested", "file_precision", "capabilities", "precision", "reason"),
    [
        ("auto", "fp32", ["FP32", "BF16"], "bf16", "in bf16, which this processor computes"),
        ("auto", "fp16", ["FP32", "BF16"], "bf16", "in bf16, which this processor computes"),
        ("auto", "fp32", ["FP32", "INT8"], "fp32", "in fp32, as this processor has no bf16"),
        ("auto", "int8", ["BF16"], "fp32", "the file's convolutions are INT8, the rest in fp32"),
        ("bf16", "int8", ["BF16"], "bf16", "bf16 asked for"),
        ("fp32", "fp32", ["BF16"], "fp32", "fp32 asked for"),
    ],
)
def test_choose_precision_goes_by_file_and_processor_and_says_why(
    requested: Any, file_precision: Any, capabilities: list[str], precision: str, reason: str
) -> None:
    assert choose_precision(requested, file_precision, capabilities) == (precision, reason)


@pytest.mark.parametrize(
    ("capabilities", "shown"), [(["FP32", "INT8"], "FP32, INT8"), ([], "nothing")]
)
def test_choose_precision_refuses_bf16_on_a_processor_without_it(
    capabilities: list[str], shown: str
) -> None:
    with pytest.raises(InferenceError, match=f"OpenVINO lists {shown} for this one"):
        choose_precision("bf16", "fp32", capabilities)


def read_hint(predictor: OpenVinoPredictor) -> openvino.Type:
    hint: openvino.Type = predictor._compiled.get_property("INFERENCE_PRECISION_HINT")
    return hint


@pytest.mark.skipif(not HAS_BF16, reason="needs a processor that computes bf16")
@pytest.mark.parametrize(
    ("precision", "hint", "reason"),
    [
        ("auto", openvino.Type.bf16, "in bf16, which this processor computes"),
        ("bf16", openvino.Type.bf16, "bf16 asked for"),
        ("fp32", openvino.Type.f32, "fp32 asked for"),
    ],
)
def test_openvino_computes_in_what_was_chosen_and_says_so(
    tiny_onnx: bytes, precision: Any, hint: openvino.Type, reason: str
) -> None:
    settings = PredictorSettings(batch=1, precision=precision)
    predictor, said = load_predictor(tiny_onnx, uri="m.onnx", backend="openvino", settings=settings)
    assert isinstance(predictor, OpenVinoPredictor)
    assert read_hint(predictor) == hint
    assert said == f"asked for; {reason}"


def test_openvino_leaves_an_int8_file_in_fp32_between_its_integer_layers(int8_onnx: bytes) -> None:
    settings = PredictorSettings(batch=1)
    predictor = OpenVinoPredictor(int8_onnx, uri="m.onnx", settings=settings)
    assert read_hint(predictor) == openvino.Type.f32
    assert predictor.precision == "fp32"
    assert predictor.precision_reason == "the file's convolutions are INT8, the rest in fp32"


def test_openvino_takes_the_callers_threads(tiny_onnx: bytes) -> None:
    # It would take all cores by itself, and never takes more than there are.
    settings = PredictorSettings(batch=1, threads=1)
    predictor = OpenVinoPredictor(tiny_onnx, uri="m.onnx", settings=settings)
    assert predictor._compiled.get_property("INFERENCE_NUM_THREADS") == 1


def run(predictor: Any, canvases: torch.Tensor) -> list[Detections]:
    found: list[Detections] = predictor.predict(canvases)
    return found


def test_torch_computes_convolutions_in_bf16_when_asked(
    tiny_weights: bytes, canvases: torch.Tensor
) -> None:
    found = {}
    for precision in ("auto", "fp32", "bf16"):
        settings = PredictorSettings(precision=precision, nms_kind="none", max_detections=1000)
        predictor, reason = load_predictor(
            tiny_weights, uri="m.pth", backend="auto", settings=settings
        )
        assert reason.endswith("; convolutions in bf16, asked for") == (precision == "bf16")
        found[precision] = run(predictor, canvases)
    for plain, exact, rounded in zip(*found.values(), strict=True):
        assert torch.equal(plain.boxes_xyxy, exact.boxes_xyxy)
        count = min(20, len(exact), len(rounded))
        assert count == 20
        difference = (rounded.scores[:count] - exact.scores[:count]).abs().max()
        # bf16 has 8 bits of mantissa: the scores move, but by hundredths.
        assert 1e-5 < difference < 0.05


@pytest.mark.parametrize(("precision", "allowed"), [("auto", True), ("fp32", False)])
def test_torch_keeps_tf32_out_of_fp32_only_and_puts_the_switch_back(
    tiny_weights: bytes, canvases: torch.Tensor, precision: Any, allowed: bool
) -> None:
    settings = PredictorSettings(precision=precision)
    predictor = load_torch_predictor(tiny_weights, uri="m.pth", settings=settings)
    seen = []
    predictor._model.register_forward_pre_hook(
        lambda *_: seen.append(torch.backends.cudnn.allow_tf32)
    )
    before = torch.backends.cudnn.allow_tf32
    assert before  # torch's default
    predictor.predict(canvases[:1])
    assert seen == [allowed]
    assert torch.backends.cudnn.allow_tf32 == before
    assert torch.backends.cudnn.enabled


class FakeSession:
    """An ONNX Runtime session that reports its options and a provider."""

    options: Any = None
    provider = "CPUExecutionProvider"

    def __init__(self, _content: bytes, options: Any, providers: list[str]) -> None:
        assert providers == ["CPUExecutionProvider"]
        type(self).options = options

    def get_providers(self) -> list[str]:
        return [self.provider]


@pytest.mark.parametrize("threads", [1, 3])
def test_onnxruntime_takes_the_callers_threads_and_leaves_qdq_nodes_as_they_are(
    tiny_onnx: bytes, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeSession)
    settings = PredictorSettings(threads=threads)
    load_predictor(tiny_onnx, uri="m.onnx", backend="onnxruntime", settings=settings)
    assert FakeSession.options.intra_op_num_threads == threads
    for entry in ("session.force_spinning_stop", "session.disable_quant_qdq"):
        assert FakeSession.options.get_session_config_entry(entry) == "1"


def test_onnxruntime_refuses_to_run_elsewhere_than_on_the_processor(
    tiny_onnx: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeSession)
    monkeypatch.setattr(FakeSession, "provider", "AzureExecutionProvider")
    with pytest.raises(InferenceError, match=r"ONNX Runtime took AzureExecutionProvider"):
        load_predictor(tiny_onnx, uri="m.onnx", backend="onnxruntime", settings=PredictorSettings())


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_load_predictor_names_a_runtime_that_is_not_installed(
    tiny_onnx: bytes, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setitem(sys.modules, backend, None)
    with pytest.raises(InferenceError, match=f"{backend}, which is not installed .*pip install"):
        load_predictor(tiny_onnx, uri="m.onnx", backend=backend, settings=PredictorSettings())


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("fixed", [1, 2, 8])
def test_a_file_of_one_batch_size_runs_any_number_of_images(
    tiny_onnx: bytes,
    fix_batch: Callable[[int], bytes],
    canvases: torch.Tensor,
    backend: str,
    fixed: int,
) -> None:
    settings = PredictorSettings(batch=5, precision="fp32")
    expected, found = (
        load_predictor(content, uri="m.onnx", backend=backend, settings=settings)[0].predict(
            canvases
        )
        for content in (tiny_onnx, fix_batch(fixed))
    )
    assert len(found) == 5
    for one, other in zip(found, expected, strict=True):
        assert len(one) > 5
        assert torch.equal(one.labels, other.labels)
        torch.testing.assert_close(one.boxes_xyxy, other.boxes_xyxy, rtol=0, atol=1e-2)
        torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-4)
