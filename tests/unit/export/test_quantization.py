"""Where Q/DQ nodes stand, what their numbers are, and what the INT8 file then finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from retinaray.errors import ExportError
from retinaray.export.calibration import CalibrationSettings
from retinaray.export.graph_index import GraphIndex, index_graph
from retinaray.export.onnx_graph import check_contract
from retinaray.export.quantization import plan_quantization, quantize
from retinaray.inference.onnx_contract import read_precision

MINMAX = CalibrationSettings(method="minmax")
# Convolutions that weigh channels, two for each of MobileNetV3-Large's eight such blocks.
NUM_GATES = {"ResNet10FPN": 0, "MobileNetV3LargeFPN": 16}


@pytest.fixture(scope="session")
def quantized(export: Any) -> onnx.ModelProto:
    return onnx.load_model_from_string(export.write("int8"))


@pytest.fixture(scope="session")
def index(quantized: onnx.ModelProto) -> GraphIndex:
    return index_graph(quantized.graph)


def maker(index: GraphIndex, name: str) -> str:
    """Operator that makes a tensor; "" for a constant."""
    return index.nodes[index.makers[name]].op_type if name in index.makers else ""


def read(index: GraphIndex, name: str) -> npt.NDArray[Any]:
    return numpy_helper.to_array(index.constants[name])


def test_quantized_file_keeps_contract_and_card(export: Any, quantized: onnx.ModelProto) -> None:
    check_contract(quantized)
    assert read_precision(quantized.SerializeToString()) == "int8"
    original = onnx.load_model_from_string(export.content)
    assert list(quantized.metadata_props) == list(original.metadata_props)
    assert list(quantized.graph.input) == list(original.graph.input)
    assert list(quantized.graph.output) == list(original.graph.output)
    assert [(entry.domain, entry.version) for entry in quantized.opset_import] == [("", 17)]


def test_convolutions_take_int8_and_biases_stay_float(export: Any, index: GraphIndex) -> None:
    inputs = [index.nodes[conv].input for conv in index.list_nodes("Conv")]
    makers = [tuple(maker(index, name) for name in names[:2]) for names in inputs]
    gates = NUM_GATES[export.card.architecture.backbone]
    both, neither = ("DequantizeLinear", "DequantizeLinear"), [m for m in makers if m[1] == ""]
    assert Counter(makers)[both] == len(makers) - gates
    assert len(neither) == gates
    biases = [index.constants[names[2]].data_type for names in inputs if len(names) > 2]
    assert biases
    assert set(biases) == {TensorProto.FLOAT}


def test_normalisation_and_decoding_are_not_quantized(index: GraphIndex) -> None:
    convolutions = index.list_nodes("Conv")
    before, behind = index.find_sources(convolutions), index.find_targets(convolutions)
    for node in index.list_nodes("QuantizeLinear"):
        assert node in before
        # The first one quantises the normalised pixels.
        assert node in behind or maker(index, index.nodes[node].input[0]) == "Div"
    for operator in ("Sub", "Div", "Exp", "Sigmoid", "TopK", "Clip", "InstanceNormalization"):
        for node in index.list_nodes(operator):
            names = index.nodes[node].input
            assert "DequantizeLinear" not in [maker(index, name) for name in names]


def test_each_residual_addition_has_one_quantized_input(export: Any, index: GraphIndex) -> None:
    convolutions = index.list_nodes("Conv")
    inner = index.find_sources(convolutions) & index.find_targets(convolutions)
    makers = [
        sorted(maker(index, name) for name in index.nodes[node].input)
        for node in index.list_nodes("Add")
        if node in inner and not any(name in index.constants for name in index.nodes[node].input)
    ]
    # Blocks that add, and one addition for each level but the top one.
    num_levels = 3 if export.model.anchor_spec.strides[0] == 8 else 4
    num_blocks = {"ResNet10FPN": 4, "MobileNetV3LargeFPN": 10}[export.card.architecture.backbone]
    assert len(makers) == num_blocks + num_levels - 1
    for names in makers:
        assert names.count("DequantizeLinear") == 1
        # TensorRT fuses the other: a convolution's output, or a GroupNorm's.
        assert names[0] in ("Conv", "Add") or names[1] in ("Conv", "Add")


def test_enlarged_map_has_the_scale_of_the_map_below(index: GraphIndex) -> None:
    enlarged = index.list_nodes("Resize")
    assert enlarged
    for node in enlarged:
        below = index.nodes[index.makers[index.nodes[node].input[0]]]
        (above,) = index.list_targets(node)
        assert (below.op_type, index.nodes[above].op_type) == ("DequantizeLinear", "QuantizeLinear")
        assert read(index, below.input[1]) == read(index, index.nodes[above].input[1])


def test_a_tensor_is_quantized_once_for_all_that_take_it(index: GraphIndex) -> None:
    sources = [index.nodes[node].input[0] for node in index.list_nodes("QuantizeLinear")]
    assert len(sources) == len(set(sources))
    for node in index.list_nodes("QuantizeLinear"):
        (dequantized,) = index.list_targets(node)
        assert index.nodes[dequantized].input[1:] == index.nodes[node].input[1:]


def test_weights_are_rounded_to_127_levels_per_channel(export: Any, index: GraphIndex) -> None:
    originals = index_graph(onnx.load_model_from_string(export.content).graph).constants
    names = {
        index.nodes[node].input[0]
        for node in index.list_nodes("DequantizeLinear")
        if index.nodes[node].input[0] in index.constants
    }
    assert names
    for name in names:
        weight = numpy_helper.to_array(originals[name.removesuffix(".int8")])
        levels, scale = read(index, name), read(index, name.replace(".int8", ".scale"))
        assert levels.dtype == np.int8
        assert not read(index, name.replace(".int8", ".zero")).any()
        largest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
        # The scale is the next float16 above: 2^-10 at most, or a whole step where it is tiny.
        assert (scale >= largest / 127).all()
        assert (scale <= largest / 127 * (1 + 2**-10) + 2**-24).all()
        assert (np.abs(levels) <= 127).all()
        error = np.abs(levels * scale[:, None, None, None] - weight)
        assert (error <= 0.5001 * scale[:, None, None, None]).all()


def test_every_scale_is_a_float16(index: GraphIndex) -> None:
    scales = [
        read(index, index.nodes[node].input[1]) for node in index.list_nodes("DequantizeLinear")
    ]
    assert scales
    for scale in scales:
        assert scale.dtype == np.float32
        assert (scale > 0).all()
        assert np.array_equal(scale.astype(np.float16).astype(np.float32), scale)


def test_heads_share_weights_and_have_a_scale_for_each_level(
    export: Any, index: GraphIndex
) -> None:
    num_levels = len(export.model.anchor_spec.strides)
    users: dict[str, list[str]] = {}
    for conv in index.list_nodes("Conv"):
        data, weight = index.nodes[conv].input[:2]
        source = index.nodes[index.makers[weight]] if weight in index.makers else None
        if source is not None and "_head." in source.input[0]:
            users.setdefault(source.input[0], []).append(index.nodes[index.makers[data]].input[1])
    # Towers and last layers of both heads.
    assert len(users) == 2 * (1 + export.card.architecture.head_depth)
    for scales in users.values():
        assert len(scales) == num_levels
        assert len(set(scales)) == num_levels
    # A node for each user of a weight, as TensorRT's fusion looks for them.
    weights = [index.nodes[conv].input[1] for conv in index.list_nodes("Conv")]
    assert len(weights) == len(set(weights))


def test_last_layers_stay_float_when_they_are_left_out(export: Any) -> None:
    index = index_graph(onnx.load_model_from_string(export.content).graph)
    convolutions = set(index.list_nodes("Conv"))
    last = {
        conv for conv in convolutions if not (index.find_targets([conv]) - {conv}) & convolutions
    }
    with_outputs = set(plan_quantization(index, quantize_outputs=True).weighted)
    without = set(plan_quantization(index, quantize_outputs=False).weighted)
    assert with_outputs - without == last
    assert len(last) == 2 * len(export.model.anchor_spec.strides)


def test_scales_are_those_of_onnxruntimes_quantizer(export: Any, tmp_path: Path) -> None:
    """An independent quantizer, told the same: only convolutions, symmetric, per channel."""
    content = export.content
    index = index_graph(onnx.load_model_from_string(content).graph)
    plan = plan_quantization(index, quantize_outputs=True)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            images = export.images.numpy().astype(export.settings.input_type)
            self.feeds = iter([{"images": images}])

        def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
            return next(self.feeds, None)

    (tmp_path / "model.onnx").write_bytes(content)
    quantize_static(
        tmp_path / "model.onnx",
        tmp_path / "int8.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        nodes_to_quantize=[index.nodes[conv].name for conv in plan.weighted],
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": ["Conv"],
            "QDQDisableWeightAdjustForInt32Bias": True,
        },
    )
    theirs = index_graph(onnx.load(tmp_path / "int8.onnx").graph)
    ours = index_graph(onnx.load_model_from_string(export.write("int8")).graph)
    assert len(plan.weighted) >= 30
    for conv in plan.weighted:
        name = index.nodes[conv].name
        scales = []
        for graph in (ours, theirs):
            (node,) = [node for node in graph.nodes if node.name == name]
            dequantized = [graph.nodes[graph.makers[tensor]] for tensor in node.input[:2]]
            scales.append([read(graph, each.input[1]) for each in dequantized])
        for mine, other in zip(*scales, strict=True):
            # Theirs spreads +-limit over 255 levels, from -127.5 to 127.5; ours over 254.
            np.testing.assert_allclose(mine, other * 127.5 / 127, rtol=6e-3, atol=2**-24)


def test_int8_finds_what_float32_finds(
    export: Any, quantized: onnx.ModelProto, run_file: Any, measure_best: Any
) -> None:
    reference = run_file(export.content, export.images)
    found = run_file(quantized.SerializeToString(), export.images)
    pixels, scores = measure_best(reference, found)
    # Random weights; what a trained network loses is a figure of the README.
    assert np.median(pixels) < 3
    assert np.median(scores) < 0.1


def test_runtimes_agree_on_int8(
    export: Any, quantized: onnx.ModelProto, run_file: Any, run_openvino: Any, measure_best: Any
) -> None:
    content = quantized.SerializeToString()
    reference = run_file(content, export.images)
    pixels, scores = measure_best(reference, run_openvino(content, export.images))
    # What one runtime rounds up and the other down becomes the next of 127 levels.
    assert np.median(pixels) < 3
    assert np.median(scores) < 0.1


def test_int8_is_a_quarter_of_float32(tiny_onnx: bytes) -> None:
    images = torch.zeros(1, 3, 64, 96, dtype=torch.uint8)
    assert len(quantize(tiny_onnx, [images], MINMAX)) < 0.27 * len(tiny_onnx)


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_quantize_gives_the_same_bytes_for_the_same_images(tiny_onnx: bytes, method: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8, generator=generator)
    settings = CalibrationSettings(method=method)
    first = quantize(tiny_onnx, [images], settings)
    assert first == quantize(tiny_onnx, iter(images.split(1)), settings)
    assert first != quantize(tiny_onnx, [images], MINMAX)


def test_quantize_survives_black_images(tiny_onnx: bytes, run_file: Any) -> None:
    images = torch.zeros(1, 3, 64, 96, dtype=torch.uint8)
    boxes, scores, _ = run_file(quantize(tiny_onnx, [images]), images)
    assert np.isfinite(boxes).all()
    assert np.isfinite(scores).all()


def test_dead_channels_and_tensors_get_a_scale(
    build_contract_file: Callable[..., bytes], run_file: Any
) -> None:
    weight = np.zeros((3, 3, 1, 1), np.float32)
    weight[0, 0] = 2.54
    nodes = [
        helper.make_node("Conv", ["pixels", "w"], ["first"], name="first.conv"),
        helper.make_node("Mul", ["first", "nothing"], ["dead"], name="dead"),
        helper.make_node("Conv", ["dead", "w"], ["second"], name="second.conv"),
    ]
    content = build_contract_file(nodes, {"w": weight}, ends=("first", "second", "second"))
    images = torch.full((1, 3, 8, 8), 254, dtype=torch.uint8)
    result = quantize(content, [images], MINMAX)
    index = index_graph(onnx.load_model_from_string(result).graph)
    # 2.54 / 127 = 0.02, and 254 / 127 = 2; where all is 0 any scale would do.
    np.testing.assert_allclose(read(index, "w.scale"), [0.02, 1 / 127, 1 / 127], rtol=1e-3)
    assert read(index, "pixels.scale") == 2.0
    assert read(index, "dead.scale") == pytest.approx(1 / 127, rel=1e-3)
    assert read(index, "w.int8")[0, 0, 0, 0] in (126, 127)
    boxes, _, _ = run_file(result, images)
    assert boxes[0, 0, 0, 0] == pytest.approx(254 * 2.54, rel=5e-3)
    assert boxes[0, 1:].tolist() == np.zeros((2, 8, 8)).tolist()


@pytest.mark.parametrize("kind", ["fp16", "int8", "int8-fp16"])
def test_quantize_refuses_a_file_that_is_not_float32(tiny_files: Any, kind: str) -> None:
    name = kind.partition("-")[0]
    with pytest.raises(ExportError, match=f"from a float32 file, and this one is {name} already"):
        quantize(tiny_files(kind), [], MINMAX)


def test_quantize_refuses_to_go_without_images(tiny_onnx: bytes) -> None:
    with pytest.raises(ExportError, match="INT8 needs images"):
        quantize(tiny_onnx, [])
