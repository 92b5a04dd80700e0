"""NVIDIA's own parser and builder: what they accept, what they refuse, and when they die."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from retinaray.errors import ExportError
from retinaray.export import nvidia_parser as module
from retinaray.export.nvidia_parser import build_with_nvidia, is_nvidia_parser_available

BATCH = (1, 2, 4)


@pytest.mark.usefixtures("nvidia_parser")
@pytest.mark.parametrize(
    ("network", "kind", "convolutions"),
    [
        # uint8 input, any batch: 12 in backbone, 8 in pyramid, two heads of two at five levels.
        ("gn", "fp32", {"Float": 40}),
        ("gn", "fp16", {"Half": 40}),
        ("gn", "int8", {"Int8": 40}),
        ("gn", "int8-fp16", {"Int8": 40}),
        # float32 input, a fixed batch, no towers.
        ("bn", "fp32", {"Float": 30}),
        ("bn", "int8-fp16", {"Int8": 30}),
        # P2, and the sixteen convolutions that weigh channels, which stay float.
        ("mobilenet", "int8-fp16", {"Int8": 68, "Half": 16}),
    ],
)
def test_build_with_nvidia_builds_every_kind(
    get_export: Callable[[str], Any], network: str, kind: str, convolutions: dict[str, int]
) -> None:
    export = get_export(network)
    content = export.write(kind)
    build = build_with_nvidia(content, batch=BATCH, canvas=export.settings.canvas)
    assert build.version.startswith("1.")
    assert build.convolutions == convolutions
    assert build.num_plan_bytes > 0.5 * len(content)
    assert build.build_s > build.parse_s > 0
    # Of the many that float16 scales give, each once.
    assert len(build.warnings) == len(set(build.warnings)) < 5


@pytest.mark.usefixtures("nvidia_parser")
def test_build_with_nvidia_refuses_batches_that_a_file_cannot_have(
    tiny_files: Callable[[str], bytes],
) -> None:
    with pytest.raises(ExportError, match=r"NVIDIA's builder \(TensorRT-RTX 1\..*\) refuses"):
        build_with_nvidia(tiny_files("fp32"), batch=(4, 2, 1), canvas=(64, 96))


@pytest.fixture
def make_file() -> Callable[..., bytes]:
    """A file of the caller's nodes from `images` to `end`."""

    def make(
        nodes: list[onnx.NodeProto], constants: dict[str, npt.NDArray[Any]], shape: list[int]
    ) -> bytes:
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("end", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return bytes(model.SerializeToString())

    return make


@pytest.mark.usefixtures("nvidia_parser")
def test_build_with_nvidia_refuses_a_large_top_k(make_file: Callable[..., bytes]) -> None:
    node = helper.make_node("TopK", ["images", "k"], ["end", "indices"], name="pick")
    content = make_file([node], {"k": np.array([5000])}, [1, 6000])
    text = r"refuses node 'pick' \(ITopKLayer\): pick: K exceeds the maximum value allowed \(3840\)"
    with pytest.raises(ExportError, match=text):
        build_with_nvidia(content, batch=BATCH, canvas=(8, 8))


@pytest.mark.usefixtures("nvidia_parser")
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"zero": np.int8(3)},
            r"refuses node 'quantize' \(QuantizeLinear\): .*Non-zero zero point is not supported",
        ),
        (
            {"bias": np.ones(4, np.int32)},
            r"refuses node 'bias' \(DequantizeLinear\): .*input has type Int32 but must have type",
        ),
        (
            {"weight": np.ones((4, 3, 1, 1), np.float16)},
            r"refuses node 'conv' \(Conv\): .*`input` and `kernel` must be of same type",
        ),
    ],
    ids=["zero-point", "int32-bias", "float16-weight"],
)
def test_build_with_nvidia_refuses_q_dq_that_tensorrt_cannot_take(
    make_file: Callable[..., bytes], change: dict[str, npt.NDArray[Any]], text: str
) -> None:
    constants = {
        "scale": np.float32(0.1),
        "zero": np.int8(0),
        "weight": np.ones((4, 3, 1, 1), np.float32),
        **change,
    }
    parts = ["scale", "zero"]
    nodes = [
        helper.make_node("QuantizeLinear", ["images", *parts], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", *parts], ["d"], name="dequantize"),
    ]
    inputs = ["d", "weight"]
    if "bias" in constants:
        nodes.append(helper.make_node("DequantizeLinear", ["bias", "scale"], ["b"], name="bias"))
        inputs.append("b")
    nodes.append(helper.make_node("Conv", inputs, ["end"], name="conv"))
    arrays = {name: np.asarray(value) for name, value in constants.items()}
    content = make_file(nodes, arrays, [1, 3, 8, 8])
    with pytest.raises(ExportError, match=text) as caught:
        build_with_nvidia(content, batch=BATCH, canvas=(8, 8))
    # Nothing of NVIDIA's source tree, nor that there is no GPU, which none is needed for.
    assert "/_src/" not in str(caught.value)
    assert "driver" not in str(caught.value)


@pytest.mark.usefixtures("nvidia_parser")
def test_build_with_nvidia_refuses_what_is_no_onnx() -> None:
    with pytest.raises(ExportError, match=r"NVIDIA's parser .* refuses"):
        build_with_nvidia(b"\xff" * 64, batch=BATCH, canvas=(8, 8))


@pytest.mark.usefixtures("nvidia_parser")
@pytest.mark.parametrize(
    ("child", "text"),
    [
        ("import os; os.abort()", "NVIDIA's builder died with exit status -6: it left no message"),
        ("raise SystemExit('no memory')", "died with exit status 1: no memory"),
        ("pass", "NVIDIA's builder died with exit status 0"),
    ],
)
def test_build_with_nvidia_outlives_its_child(
    monkeypatch: pytest.MonkeyPatch, child: str, text: str
) -> None:
    monkeypatch.setattr(module, "_CHILD", child)
    with pytest.raises(ExportError, match=text):
        build_with_nvidia(b"", batch=BATCH, canvas=(8, 8))


@pytest.mark.usefixtures("nvidia_parser")
def test_build_with_nvidia_gives_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHILD", "import threading; threading.Event().wait()")
    with pytest.raises(ExportError, match=r"NVIDIA's builder took longer than 0\.2 s"):
        build_with_nvidia(b"", batch=BATCH, canvas=(8, 8), timeout_s=0.2)


def test_build_with_nvidia_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def find(name: str) -> Any:
        return None if name == "tensorrt_rtx_bindings" else found(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert not is_nvidia_parser_available()
    with pytest.raises(ExportError, match="not installed: pip install --no-deps tensorrt-rtx-cu13"):
        build_with_nvidia(b"", batch=BATCH, canvas=(8, 8))
