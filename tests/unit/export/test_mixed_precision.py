"""Which nodes become float16, that no cast is idle, and what the file then finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from retinaray.detector.anchors import make_anchors
from retinaray.errors import ExportError
from retinaray.export.graph_index import index_graph, infer_types
from retinaray.export.mixed_precision import list_float32_nodes, to_fp16
from retinaray.export.onnx_graph import check_contract

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
OPSETS = {"fp16": 17, "int8-fp16": 19}


@pytest.fixture(scope="session", params=["fp16", "int8-fp16"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def half(export: Any, kind: str) -> onnx.ModelProto:
    return onnx.load_model_from_string(export.write(kind))


def test_typed_file_keeps_contract_card_and_ends(
    export: Any, kind: str, half: onnx.ModelProto
) -> None:
    check_contract(half, opset=OPSETS[kind])
    assert half.ir_version == {17: 8, 19: 9}[OPSETS[kind]]
    original = onnx.load_model_from_string(export.content)
    assert list(half.metadata_props) == list(original.metadata_props)
    assert list(half.graph.input) == list(original.graph.input)
    assert list(half.graph.output) == list(original.graph.output)


def test_convolutions_are_float16_and_decoding_is_float32(half: onnx.ModelProto) -> None:
    index, types = index_graph(half.graph), infer_types(half)
    for conv in index.list_nodes("Conv"):
        assert {types[name] for name in index.nodes[conv].input} == {HALF}
    behind = index.find_targets(index.list_nodes("TopK"))
    assert len(behind) > 20
    for node in behind:
        assert HALF not in {types[name] for name in index.nodes[node].output}
    for operator in ("Exp", "Clip", "Sigmoid", "TopK", "Sub", "Div", "GatherND", "ReduceMax"):
        assert HALF not in {types[index.nodes[n].input[0]] for n in index.list_nodes(operator)}
    for node in index.list_nodes("InstanceNormalization", "ReduceMean"):
        assert {types[name] for name in index.nodes[node].input} <= {FLOAT, TensorProto.INT64}


def test_anchors_keep_every_digit(export: Any, half: onnx.ModelProto) -> None:
    expected = make_anchors(export.model.anchor_spec, *export.settings.canvas).numpy()
    constants = [numpy_helper.to_array(tensor) for tensor in half.graph.initializer]
    found = [array for array in constants if array.shape == expected.shape]
    assert any(np.array_equal(array, expected) for array in found)


def test_no_cast_is_idle(half: onnx.ModelProto) -> None:
    index, types = index_graph(half.graph), infer_types(half)
    made = set()
    for cast in index.list_nodes("Cast"):
        node = index.nodes[cast]
        source, target = node.input[0], types[node.output[0]]
        assert types[source] != target
        assert "Cast" not in [index.nodes[n].op_type for n in index.list_sources(cast)]
        assert index.list_targets(cast) or node.output[0] == "labels"
        assert (source, target) not in made, "one cast serves all that take it"
        made.add((source, target))


def test_casts_stand_at_the_ends_and_around_statistics_only(
    kind: str, half: onnx.ModelProto
) -> None:
    index, types = index_graph(half.graph), infer_types(half)
    casts = [index.nodes[cast] for cast in index.list_nodes("Cast")]
    to_half = [node for node in casts if types[node.output[0]] == HALF]
    from_half = [node for node in casts if types[node.input[0]] == HALF]
    num_statistics = len(index.list_nodes("InstanceNormalization", "ReduceMean"))
    # Into the network, where Q/DQ change the type by themselves, and out of both heads.
    assert len(to_half) == num_statistics + (kind == "fp16")
    assert len(from_half) == num_statistics + 2


def test_scales_have_the_type_of_what_they_scale(export: Any) -> None:
    half = onnx.load_model_from_string(export.write("int8-fp16"))
    index, types = index_graph(half.graph), infer_types(half)
    before, after = (
        index_graph(onnx.load_model_from_string(export.write("int8")).graph).constants,
        index.constants,
    )
    for node in index.list_nodes("QuantizeLinear"):
        assert types[index.nodes[node].input[0]] == types[index.nodes[node].input[1]]
    scales = {index.nodes[n].input[1] for n in index.list_nodes("DequantizeLinear")}
    assert scales
    for name in scales:
        assert after[name].data_type == HALF
        original = numpy_helper.to_array(before[name.removesuffix(".half")])
        assert np.array_equal(numpy_helper.to_array(after[name]).astype(np.float32), original)
    levels = [t for t in half.graph.initializer if t.data_type == TensorProto.INT8]
    assert levels
    assert all(tensor == before[tensor.name] for tensor in levels)


def test_float16_finds_what_float32_finds(
    export: Any, kind: str, half: onnx.ModelProto, run_file: Any, measure_best: Any
) -> None:
    base = export.write(kind.replace("-fp16", "").replace("fp16", "fp32"))
    reference = run_file(base, export.images)
    pixels, scores = measure_best(reference, run_file(half.SerializeToString(), export.images))
    if kind == "fp16":
        assert pixels.max() < 0.25
        assert scores.max() < 0.01
    else:
        # An activation that float16 moves over an edge becomes the next of 127 levels.
        assert np.median(pixels) < 3
        assert np.median(scores) < 0.1


def test_runtimes_agree_on_typed_files(
    export: Any,
    kind: str,
    half: onnx.ModelProto,
    run_file: Any,
    run_openvino: Any,
    measure_best: Any,
) -> None:
    content = half.SerializeToString()
    reference = run_file(content, export.images)
    pixels, scores = measure_best(reference, run_openvino(content, export.images))
    assert np.median(pixels) < (0.1 if kind == "fp16" else 3)
    assert np.median(scores) < (0.005 if kind == "fp16" else 0.1)


def test_float16_halves_the_file(tiny_files: Callable[[str], bytes]) -> None:
    assert len(tiny_files("fp16")) < 0.52 * len(tiny_files("fp32"))


@pytest.fixture(scope="session")
def run_first_norm() -> Callable[..., npt.NDArray[Any]]:
    """What stands behind the first GroupNorm's affine part, by numpy: in the file's own types.

    ONNX Runtime and OpenVINO compute float16 files in float32 on a CPU, and so show no overflow.
    """

    def run(proto: onnx.ModelProto, images: npt.NDArray[Any]) -> npt.NDArray[Any]:
        index = index_graph(proto.graph)
        first = index.list_nodes("InstanceNormalization")[0]
        end = next(
            node
            for node in sorted(index.find_targets([first]))
            if index.nodes[node].op_type == "Relu"
        )
        used = sorted(index.find_sources([end]))
        output = helper.make_tensor_value_info(index.nodes[end].output[0], HALF, None)
        names = {name for node in used for name in index.nodes[node].input}
        graph = helper.make_graph(
            [index.nodes[node] for node in used],
            "part",
            list(proto.graph.input),
            [output],
            [tensor for tensor in proto.graph.initializer if tensor.name in names],
        )
        model = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=8)
        (found,) = ReferenceEvaluator(model).run(None, {"images": images})
        return np.asarray(found)

    return run


def test_group_norm_does_not_overflow_in_float16(
    tiny_onnx: bytes, run_first_norm: Callable[..., npt.NDArray[Any]]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, 3, 64, 96)).astype(np.uint8)
    original = onnx.load_model_from_string(tiny_onnx)
    expected = run_first_norm(original, images)
    # GroupNorm undoes any factor: activations of some ten thousands must change nothing. Their
    # squares are thousands of times what float16 holds.
    (weight,) = [t for t in original.graph.initializer if t.name.endswith("body.conv1.weight")]
    values = numpy_helper.to_array(weight) * 4000
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    half = onnx.load_model_from_string(to_fp16(original.SerializeToString()))
    found = run_first_norm(half, images)
    assert found.dtype == np.float16
    assert expected.max() > 2
    np.testing.assert_allclose(found, expected, atol=0.02)
    # The same with its statistics in float16, to see that this would show.
    with np.errstate(all="ignore"):
        lost = run_first_norm(_move_statistics_to_half(half), images)
    assert not np.allclose(lost, expected, atol=0.5)


def _move_statistics_to_half(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose first norm takes float16 and gives float16."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    index = index_graph(copy.graph)
    first = index.list_nodes("InstanceNormalization")[0]
    (reshape,) = [index.nodes[node] for node in index.list_sources(first)]
    cast = index.nodes[index.makers[reshape.input[0]]]
    assert cast.op_type == "Cast"
    reshape.input[0] = cast.input[0]
    for name in index.nodes[first].input[1:]:
        values = numpy_helper.to_array(index.constants[name]).astype(np.float16)
        index.constants[name].CopyFrom(numpy_helper.from_array(values, name))
    return copy


def test_a_constant_of_both_sides_is_rounded_on_one(
    build_contract_file: Callable[..., bytes],
) -> None:
    shared = np.array(0.1, np.float32)
    nodes = [
        helper.make_node("Conv", ["pixels", "w"], ["first"], name="first"),
        helper.make_node("Mul", ["first", "shared"], ["inner"], name="inner"),
        helper.make_node("Conv", ["inner", "w"], ["second"], name="second"),
        helper.make_node("Mul", ["second", "shared"], ["outer"], name="outer"),
    ]
    weight = np.ones((3, 3, 1, 1), np.float32)
    content = build_contract_file(nodes, {"shared": shared, "w": weight}, ends=("outer",) * 3)
    graph = onnx.load_model_from_string(to_fp16(content)).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    inputs = {node.name: node.input[1] for node in graph.node if node.op_type == "Mul"}
    assert constants[inputs["outer"]].dtype == np.float32
    assert constants[inputs["outer"]] == shared
    assert constants[inputs["inner"]] == np.float16(0.1)


def test_to_fp16_takes_a_file_with_notes_of_its_types(tiny_files: Callable[[str], bytes]) -> None:
    proto = onnx.load_model_from_string(tiny_files("fp32"))
    noted = onnx.shape_inference.infer_shapes(proto)
    assert len(noted.graph.value_info) > 100
    assert to_fp16(noted.SerializeToString()) == tiny_files("fp16")


@pytest.mark.parametrize("largest", [65504.0, 7e4])
def test_to_fp16_refuses_weights_that_float16_has_not(
    build_contract_file: Callable[..., bytes], largest: float
) -> None:
    weight = np.full((3, 3, 1, 1), -largest, np.float32)
    nodes = [
        helper.make_node("Conv", ["pixels", "w"], ["first"], name="first"),
        helper.make_node("Mul", ["first", "one"], ["end"], name="end"),
    ]
    constants = {"w": weight, "one": np.ones((), np.float32)}
    content = build_contract_file(nodes, constants, ends=("end",) * 3)
    if largest <= 65504:
        assert to_fp16(content)
    else:
        with pytest.raises(ExportError, match=r"'w' holds 7e\+04, and float16 ends at 65504"):
            to_fp16(content)


def test_to_fp16_keeps_tiny_constants_from_becoming_nothing(
    build_contract_file: Callable[..., bytes],
) -> None:
    # A scale of 0 would divide by it.
    weight = np.zeros((3, 3, 1, 1), np.float32)
    weight[0, 0], weight[1, 1] = 1e-9, -1e-9
    node = helper.make_node("Conv", ["pixels", "w"], ["end"], name="conv")
    content = build_contract_file([node], {"w": weight}, ends=("end",) * 3)
    graph = onnx.load_model_from_string(to_fp16(content)).graph
    (found,) = [numpy_helper.to_array(t) for t in graph.initializer if len(t.dims) == 4]
    step = np.finfo(np.float16).smallest_subnormal
    assert [found[0, 0, 0, 0], found[1, 1, 0, 0], found[0, 1, 0, 0]] == [step, -step, 0]


@pytest.mark.parametrize("kind_before", ["fp16", "int8-fp16"])
def test_to_fp16_refuses_a_file_that_has_float16(
    tiny_files: Callable[[str], bytes], kind_before: str
) -> None:
    with pytest.raises(ExportError, match="float16 is made from float32, and this file has"):
        to_fp16(tiny_files(kind_before))


def test_to_fp16_refuses_a_graph_that_ends_in_the_network(
    build_contract_file: Callable[..., bytes],
) -> None:
    node = helper.make_node("Conv", ["pixels", "w"], ["middle"], name="conv")
    content = build_contract_file(
        [node], {"w": np.ones((3, 3, 1, 1), np.float32)}, ends=("middle",) * 3
    )
    proto = onnx.load_model_from_string(content)
    (last,) = [n for n in proto.graph.node if n.name == "last.boxes"]
    last.CopyFrom(helper.make_node("Conv", ["middle", "w"], ["boxes"], name="last.boxes"))
    with pytest.raises(ExportError, match="the outputs boxes would be float16"):
        to_fp16(proto.SerializeToString())


@pytest.mark.parametrize("kind_of_file", ["fp32", "fp16", "int8", "int8-fp16"])
def test_list_float32_nodes_names_normalisation_statistics_and_decoding(
    export: Any, kind_of_file: str
) -> None:
    content = export.write(kind_of_file)
    names = set(list_float32_nodes(content))
    assert names == set(list_float32_nodes(export.content))
    nodes = {node.name: node for node in onnx.load_model_from_string(content).graph.node}
    assert len(names) == len(list_float32_nodes(content)), "each name is one node's"
    operators = [nodes[name].op_type for name in names]
    assert {"Sub", "Exp", "Clip", "Sigmoid", "TopK", "ReduceMax", "Mul", "Add"} <= set(operators)
    statistics = ("InstanceNormalization", "ReduceMean")
    for operator in (*statistics, "Exp", "Sigmoid"):
        count = sum(node.op_type == operator for node in nodes.values())
        assert operators.count(operator) == count
    assert not {"Conv", "Relu", "Cast", "Concat", "HardSwish"} & set(operators)
    # What trtexec reads as a separator.
    assert not any(set(name) & set(",: ") for name in names)
