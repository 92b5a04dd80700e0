"""INT8 in another Python environment: what reaches it, what comes back, and how it can fail."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from retinaray.errors import ExportError
from retinaray.export.graph_index import index_graph
from retinaray.export.mixed_precision import list_float32_nodes, to_fp16
from retinaray.export.modelopt_route import check_modelopt_target, quantize_with_modelopt
from retinaray.export.onnx_graph import check_contract
from retinaray.export.targets import TARGETS, read_file_kind

IMAGES = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8).to(torch.uint8)


@pytest.fixture
def make_python(tmp_path: Path) -> Callable[[str], str]:
    """An interpreter of the caller's lines: `arguments` holds what it is called with."""

    def make(lines: str) -> str:
        path = tmp_path / "python"
        head = f"#!{sys.executable}\nimport json, pathlib, sys\narguments = sys.argv[1:]\n"
        path.write_text(head + lines)
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def plain_file(build_contract_file: Callable[..., bytes]) -> bytes:
    """Two convolutions that share a weight, float32."""
    nodes = [
        helper.make_node("Conv", ["pixels", "w"], ["a"], name="conv 1"),
        helper.make_node("Conv", ["a", "w"], ["b"], name="conv 2"),
    ]
    weight = np.linspace(-1, 1, 9, dtype=np.float32).reshape(3, 3, 1, 1)
    return build_contract_file(nodes, {"w": weight}, ends=("b", "b", "b"))


@pytest.fixture
def their_file(build_contract_file: Callable[..., bytes]) -> bytes:
    """The same as Model Optimizer writes it: weights as a float copy for each user, opset 19."""
    weight = np.linspace(-1, 1, 9, dtype=np.float32).reshape(3, 3, 1, 1)
    constants = {
        "w1": weight,
        "w2": weight,
        "s": np.array([0.01, 0.02, 0.005], np.float32),
        "z": np.zeros(3, np.int8),
        "one": np.float32(2.0),
        "zero": np.int8(0),
    }
    nodes, source = [], "pixels"
    for number in "12":
        nodes += [
            helper.make_node("QuantizeLinear", [source, "one", "zero"], [f"q{number}"]),
            helper.make_node("DequantizeLinear", [f"q{number}", "one", "zero"], [f"d{number}"]),
            helper.make_node("QuantizeLinear", [f"w{number}", "s", "z"], [f"wq{number}"], axis=0),
            helper.make_node(
                "DequantizeLinear", [f"wq{number}", "s", "z"], [f"wd{number}"], axis=0
            ),
            helper.make_node("Conv", [f"d{number}", f"wd{number}"], [f"c{number}"]),
        ]
        source = f"c{number}"
    factor = numpy_helper.from_array(np.float32(1.0))
    nodes += [
        helper.make_node("Constant", [], ["factor"], value=factor),
        helper.make_node("Mul", [source, "factor"], ["end"]),
    ]
    arrays = {name: np.asarray(value) for name, value in constants.items()}
    content = build_contract_file(nodes, arrays, ends=("end", "end", "end"), opset=19)
    proto = onnx.load_model_from_string(content)
    del proto.metadata_props[:]
    proto.ir_version = 10
    return bytes(proto.SerializeToString())


COPY = """
request = json.loads(pathlib.Path(arguments[2]).read_text())
kept = pathlib.Path(__file__).parent
(kept / "arguments.json").write_text(json.dumps(arguments))
(kept / "request.json").write_text(json.dumps(request))
(kept / "images.bin").write_bytes(pathlib.Path(request["images"]).read_bytes())
(kept / "model.onnx").write_bytes(pathlib.Path(request["model"]).read_bytes())
compile(pathlib.Path(arguments[1]).read_text(), "script", "exec")
pathlib.Path(request["output"]).write_bytes((kept / "theirs.onnx").read_bytes())
"""


def test_quantize_with_modelopt_hands_over_model_images_and_what_to_leave(
    make_python: Callable[[str], str], plain_file: bytes, their_file: bytes, tmp_path: Path
) -> None:
    import json

    (tmp_path / "theirs.onnx").write_bytes(their_file)
    batches = iter([IMAGES[:1], IMAGES[1:]])
    quantize_with_modelopt(plain_file, batches, python=make_python(COPY), method="max")
    arguments = json.loads((tmp_path / "arguments.json").read_text())
    request = json.loads((tmp_path / "request.json").read_text())
    # Isolated from the paths of this environment.
    assert arguments[0] == "-I"
    assert (request["dtype"], request["shape"]) == ("uint8", [2, 3, 8, 8])
    assert request["method"] == "max"
    assert (tmp_path / "images.bin").read_bytes() == IMAGES.numpy().tobytes()
    # Each pattern is one node's whole name.
    names = ["first", "last.boxes", "last.scores", "last.labels"]
    assert request["excluded"] == [f"^{name.replace('.', chr(92) + '.')}$" for name in names]
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert not Path(request["model"]).exists(), "the temporary files are gone"


def test_quantize_with_modelopt_folds_weights_and_restores_card_and_batch(
    make_python: Callable[[str], str],
    plain_file: bytes,
    their_file: bytes,
    tmp_path: Path,
    run_file: Any,
) -> None:
    (tmp_path / "theirs.onnx").write_bytes(their_file)
    result = quantize_with_modelopt(plain_file, [IMAGES], python=make_python(COPY))
    proto = onnx.load_model_from_string(result)
    check_contract(proto, opset=19)
    original = onnx.load_model_from_string(plain_file)
    assert list(proto.metadata_props) == list(original.metadata_props)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    index = index_graph(proto.graph)
    assert not index.list_nodes("Constant")
    assert len(index.list_nodes("QuantizeLinear")) == 2  # of the two activations
    weights = [numpy_helper.to_array(t) for t in proto.graph.initializer if len(t.dims) == 4]
    # One for both. Rows of 0.01, 0.02 and 0.005: 0.75 and 1 of the last are cut off at 127.
    (weight,) = weights
    assert weight.dtype == np.int8
    assert weight[:, :, 0, 0].tolist() == [[-100, -75, -50], [-12, 0, 12], [100, 127, 127]]
    for found, expected in zip(
        run_file(result, IMAGES[:1]), run_file(their_file, IMAGES[:1]), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    assert read_file_kind(to_fp16(result)) == "int8-fp16"


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (
            "print('No module named modelopt', file=sys.stderr); sys.exit(3)",
            r"has no working Model Optimizer \(No module named modelopt\); make an environment: "
            r"python3.11 -m venv .*nvidia-modelopt\[onnx\]==0\.47",
        ),
        (
            "raise ValueError('unsupported operator')",
            "Model Optimizer failed with exit status 1: (?s:.*)ValueError: unsupported operator",
        ),
        ("sys.exit(7)", "failed with exit status 7: it left no message"),
        ("import os; os.abort()", "failed with exit status -6"),
        ("pass", "Model Optimizer wrote no file and gave no reason"),
    ],
)
def test_quantize_with_modelopt_says_how_it_failed(
    make_python: Callable[[str], str], plain_file: bytes, lines: str, text: str
) -> None:
    with pytest.raises(ExportError, match=text):
        quantize_with_modelopt(plain_file, [IMAGES], python=make_python(lines))


def test_quantize_with_modelopt_really_notices_that_the_package_is_missing(
    plain_file: bytes,
) -> None:
    # The real script, in an environment that has everything but it.
    with pytest.raises(
        ExportError, match=r"no working Model Optimizer \(No module named 'modelopt"
    ):
        quantize_with_modelopt(plain_file, [IMAGES], python=sys.executable)


def test_quantize_with_modelopt_gives_up_in_the_end(
    make_python: Callable[[str], str], plain_file: bytes
) -> None:
    python = make_python("import threading; threading.Event().wait()")
    with pytest.raises(ExportError, match=r"took longer than 0\.2 s; give fewer images"):
        quantize_with_modelopt(plain_file, [IMAGES], python=python, timeout_s=0.2)


@pytest.mark.parametrize("place", ["nowhere/python", ".", "no-script"])
def test_quantize_with_modelopt_wants_an_interpreter(
    plain_file: bytes, tmp_path: Path, place: str
) -> None:
    (tmp_path / "no-script").write_text("#!/nowhere/at/all\n")
    (tmp_path / "no-script").chmod(0o755)
    python = str(tmp_path / place)
    with pytest.raises(ExportError, match=r"(no Python interpreter is there|cannot be run).*venv"):
        quantize_with_modelopt(plain_file, [IMAGES], python=python)


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        ([], "INT8 needs images"),
        ([IMAGES.float()], r"needs uint8 images of \('N', 3, 8, 8\), got torch.float32"),
        ([IMAGES[..., :7]], r"got torch.uint8 \(2, 3, 8, 7\)"),
    ],
)
def test_quantize_with_modelopt_refuses_images_that_do_not_fit(
    make_python: Callable[[str], str], plain_file: bytes, batches: list[Any], text: str
) -> None:
    with pytest.raises(ExportError, match=text):
        quantize_with_modelopt(plain_file, batches, python=make_python("pass"))


def test_quantize_with_modelopt_refuses_a_zero_point(
    make_python: Callable[[str], str], plain_file: bytes, their_file: bytes, tmp_path: Path
) -> None:
    proto = onnx.load_model_from_string(their_file)
    (zero,) = [tensor for tensor in proto.graph.initializer if tensor.name == "z"]
    zero.CopyFrom(numpy_helper.from_array(np.array([0, 1, 0], np.int8), "z"))
    (tmp_path / "theirs.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match="a zero point other than 0, which no TensorRT takes"):
        quantize_with_modelopt(plain_file, [IMAGES], python=make_python(COPY))


def test_quantize_with_modelopt_refuses_a_quantized_file(their_file: bytes) -> None:
    with pytest.raises(ExportError, match="from a float32 file, and this one is int8 already"):
        quantize_with_modelopt(their_file, [IMAGES], python=sys.executable)


@pytest.mark.parametrize("name", list(TARGETS))
def test_check_modelopt_target_refuses_tensorrt_8(name: str) -> None:
    if name == "jetpack5":
        text = "reads opset 17 at most, and INT8 by Model Optimizer has opset 19"
        with pytest.raises(ExportError, match=text):
            check_modelopt_target(TARGETS[name])
    else:
        check_modelopt_target(TARGETS[name])


def test_model_optimizer_itself_quantizes_a_detector(
    get_export: Callable[[str], Any], run_file: Any, measure_best: Any
) -> None:
    python = os.environ.get("RETINARAY_MODELOPT_PYTHON")
    if not python:
        pytest.skip("needs an environment with nvidia-modelopt: RETINARAY_MODELOPT_PYTHON names it")
    export = get_export("gn")
    result = quantize_with_modelopt(export.content, [export.images], python=python)
    assert read_file_kind(result) == "int8"
    index = index_graph(onnx.load_model_from_string(result).graph)
    sources = [
        index.nodes[index.makers[index.nodes[conv].input[0]]].op_type
        for conv in index.list_nodes("Conv")
    ]
    assert sources == ["DequantizeLinear"] * 40
    decoding = set(list_float32_nodes(export.content))
    assert decoding <= {node.name for node in index.nodes}
    for content in (result, to_fp16(result)):
        found = run_file(content, export.images)
        pixels, scores = measure_best(run_file(export.content, export.images), found)
        assert np.median(pixels) < 3
        assert np.median(scores) < 0.1
