"""Exported files keep their contract and compute what torch computes, on several networks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from retinaray.artifact import ModelCard
from retinaray.detector.postprocess import select_candidates
from retinaray.detector.retinanet import RetinaNet
from retinaray.errors import ExportError
from retinaray.export.onnx_graph import (
    MAX_TOP_K,
    OPSET,
    ExportedDetector,
    ExportSettings,
    check_contract,
    export_onnx,
    set_batch,
)

# The module's exports come from conftest.
Export = Any
TRT_VERSIONS = ("8.5", "8.6", "10.3", "10.16", "11.x")


@pytest.fixture(scope="module")
def proto(export: Export) -> Any:
    return onnx.load_model_from_string(export.content)


def run_torch(export: Export, images: Tensor) -> list[np.ndarray]:
    with torch.inference_mode():
        logits, deltas = export.model(images)
        candidates = select_candidates(
            logits,
            deltas,
            export.model.anchors_for(images),
            height=export.settings.canvas[0],
            width=export.settings.canvas[1],
            top_k=export.settings.top_k,
        )
    return [tensor.numpy() for tensor in candidates]


def assert_same_candidates(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """The same up to rounding: equal scores may stand in another order, or end at the limit."""
    margin = 1e-4
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=margin)
    for boxes, scores, labels, right_boxes, right_scores, right_labels in zip(
        *found, *expected, strict=True
    ):
        is_near = np.abs(right_scores[:, None] - scores) < margin
        is_same = is_near & (right_labels[:, None] == labels)
        distance = np.abs(right_boxes[:, None] - boxes).max(axis=-1)
        has_partner = (is_same & (distance < 0.02)).any(axis=1)
        is_at_the_limit = right_scores < right_scores.min() + 2 * margin
        assert (has_partner | is_at_the_limit).all()
        assert has_partner.mean() > 0.98


@pytest.mark.parametrize("batch", [1, 3])
def test_export_computes_what_torch_computes(export: Export, batch: int) -> None:
    batch = export.settings.fixed_batch or batch
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, 3, *export.settings.canvas)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(export.content, options)
    feed = images.numpy().astype(export.settings.input_type)
    found = session.run(["boxes", "scores", "labels"], {"images": feed})
    expected = run_torch(export, images)
    assert [array.dtype for array in found] == [np.float32, np.float32, np.int32]
    num_pairs = len(export.model.anchors_for(images)) * export.model.num_classes
    count = min(export.settings.top_k, num_pairs)
    assert [array.shape for array in found] == [(batch, count, 4), (batch, count), (batch, count)]
    # By falling logit; the runtime's sigmoid may turn neighbours round in the last digit.
    assert np.diff(found[1], axis=1).max() < 1e-6
    assert found[1].max() > 0.5
    assert len(np.unique(found[2])) == min(export.model.num_classes, len(np.unique(expected[2])))
    assert_same_candidates(found, expected)


def test_export_keeps_all_pairs_when_there_are_fewer_than_top_k(export: Export) -> None:
    height, width = export.settings.canvas
    num_pairs = len(export.model.anchors_for(torch.empty(1, 3, height, width)))
    num_pairs *= export.model.num_classes
    graph = onnx.load_model_from_string(export.content).graph
    count = graph.output[1].type.tensor_type.shape.dim[1].dim_value
    assert count == min(num_pairs, export.settings.top_k)


def test_export_has_the_promised_inputs_and_outputs(export: Export, proto: Any) -> None:
    batch = export.settings.fixed_batch or "N"

    def describe(value: Any) -> tuple[Any, ...]:
        tensor = value.type.tensor_type
        return value.name, tensor.elem_type, *[d.dim_param or d.dim_value for d in tensor.shape.dim]

    is_uint8 = export.settings.input_type == "uint8"
    element = TensorProto.UINT8 if is_uint8 else TensorProto.FLOAT
    assert [describe(value) for value in proto.graph.input] == [
        ("images", element, batch, 3, *export.settings.canvas)
    ]
    boxes, scores, labels = map(describe, proto.graph.output)
    assert boxes[:3] == ("boxes", TensorProto.FLOAT, batch)
    assert boxes[4] == 4
    assert scores == ("scores", TensorProto.FLOAT, batch, boxes[3])
    assert labels == ("labels", TensorProto.INT32, batch, boxes[3])


def test_export_uses_standard_operators_of_opset_17_only(proto: Any) -> None:
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 17)]
    assert proto.ir_version == 8
    assert not proto.functions
    assert {node.domain for node in proto.graph.node} == {""}
    for node in proto.graph.node:
        # The newest form of the operator that opset 17 has must know every attribute.
        schema = onnx.defs.get_schema(node.op_type, OPSET)
        assert {attribute.name for attribute in node.attribute} <= set(schema.attributes)
    assert not {"NonMaxSuppression", "Loop", "If", "NonZero"} & {
        node.op_type for node in proto.graph.node
    }


@pytest.mark.parametrize("version", TRT_VERSIONS)
def test_tensorrt_knows_every_operator(
    proto: Any, trt_operators: dict[str, Any], version: str
) -> None:
    known = trt_operators[version]
    assert known["opset_max"] >= OPSET
    operators = {node.op_type for node in proto.graph.node}
    assert {name for name in operators if not known["ops"].get(name, {}).get("supported")} == set()


def test_tensorrt_accepts_the_number_of_candidates(proto: Any) -> None:
    limits = [
        onnx.numpy_helper.to_array(tensor).item()
        for node in proto.graph.node
        if node.op_type == "TopK"
        for tensor in proto.graph.initializer
        if tensor.name == node.input[1]
    ]
    assert len(limits) == 2
    assert all(1 <= limit < 3840 for limit in limits)


def test_only_a_cast_touches_uint8_pixels(tiny_onnx: bytes) -> None:
    # TensorRT refuses anything else on UINT8 inputs.
    graph = onnx.load_model_from_string(tiny_onnx).graph
    assert [node.op_type for node in graph.node if "images" in node.input] == ["Cast"]


def test_export_carries_its_card(export: Export, proto: Any) -> None:
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    card = ModelCard.from_metadata(metadata, source="m.onnx")
    assert card.canvas == export.settings.canvas
    assert card.to_metadata() == export.card.to_metadata() | {
        "retinaray.canvas": json.dumps(list(export.settings.canvas))
    }


def test_export_tells_nothing_of_the_machine_that_wrote_it(export: Export) -> None:
    for text in (str(Path(__file__).parents[3]), "site-packages", "stack_trace"):
        assert text.encode() not in export.content


def test_export_has_no_unused_tensors(proto: Any) -> None:
    used = {name for node in proto.graph.node for name in node.input}
    assert {tensor.name for tensor in proto.graph.initializer} <= used


@pytest.mark.parametrize("top_k", [-1, 0, MAX_TOP_K + 1])
def test_export_refuses_a_number_of_candidates_that_tensorrt_cannot_take(
    tiny_card: ModelCard, tiny_model: RetinaNet, top_k: int
) -> None:
    with pytest.raises(ExportError, match=f"top_k={top_k}: expected 1 to 3839"):
        export_onnx(tiny_model, tiny_card, ExportSettings(canvas=(64, 96), top_k=top_k))


@pytest.mark.parametrize("batch", [0, -1])
def test_export_refuses_a_batch_of_nothing(
    tiny_card: ModelCard, tiny_model: RetinaNet, batch: int
) -> None:
    settings = ExportSettings(canvas=(64, 96), fixed_batch=batch)
    with pytest.raises(ExportError, match=f"fixed_batch={batch}: expected at least 1"):
        export_onnx(tiny_model, tiny_card, settings)


def test_a_fixed_batch_changes_sizes_only(export: Export) -> None:
    proto = onnx.load_model_from_string(export.content)
    set_batch(proto, 4)
    check_contract(proto)
    values = [*proto.graph.input, *proto.graph.output]
    assert [value.type.tensor_type.shape.dim[0].dim_value for value in values] == [4] * 4
    set_batch(proto, export.settings.fixed_batch)
    assert proto.SerializeToString() == export.content


def test_decoding_divides_indices_as_integers(export: Export, proto: Any) -> None:
    # In floats a division that is off by its last bit makes a class that does not exist.
    graph = onnx.shape_inference.infer_shapes(proto).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    divisions = [node for node in graph.node if node.op_type == "Div"]
    # Pixels by their deviation, and pairs by classes; with one class there is nothing to divide.
    expected = [TensorProto.FLOAT, TensorProto.INT64][: min(2, export.model.num_classes)]
    assert [types[node.output[0]] for node in divisions] == expected
    assert not {"Floor", "Abs", "Sign"} & {node.op_type for node in graph.node}


def test_every_convolution_has_its_batch_norm_inside(export: Export, proto: Any) -> None:
    operators = [node.op_type for node in proto.graph.node]
    assert "BatchNormalization" not in operators
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    per_channel = [
        node.name
        for node in proto.graph.node
        if node.op_type in ("Mul", "Add")
        and any(name in constants and len(constants[name].dims) >= 3 for name in node.input)
    ]
    # GroupNorm depends on the image, and keeps its own.
    is_group_norm = export.card.architecture.norm == "gn"
    assert bool(per_channel) == is_group_norm
    assert ("InstanceNormalization" in operators) == is_group_norm


def test_exported_detector_unfreezes_norms_without_changing_a_value(
    make_tiny_card: Callable[..., ModelCard],
) -> None:
    model = make_tiny_card(norm="frozen_bn", head_depth=0).build_model().eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for buffer in module.buffers():
                buffer.uniform_(0.5, 1.5, generator=generator)
    detector = ExportedDetector(model, ExportSettings(canvas=(64, 96))).eval()
    norms = [type(module) for module in detector.modules() if hasattr(module, "running_mean")]
    assert norms == [nn.BatchNorm2d] * len(norms)
    assert len(norms) == 12
    images = torch.randint(0, 256, (1, 3, 64, 96), generator=generator).to(torch.uint8)
    with torch.inference_mode():
        for found, expected in zip(detector.model(images), model(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())


@pytest.fixture
def build_proto() -> Callable[..., Any]:
    """A small file that keeps the contract, with changes."""

    def build(
        *,
        opset: int = OPSET,
        names: tuple[str, ...] = ("boxes", "scores", "labels"),
        input_name: str = "images",
        width: Any = 8,
        domain: str = "",
        operator: str = "Cast",
    ) -> Any:
        shape = ("N", 3, 8, width)
        attributes = {"to": 1} if operator == "Cast" else {}
        element = TensorProto.FLOAT if operator == "Floor" else TensorProto.UINT8
        nodes = [
            helper.make_node(
                operator, [input_name], [name], f"node of {name}", domain=domain, **attributes
            )
            for name in names
        ]
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(input_name, element, shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names],
        )
        opsets = [helper.make_opsetid("", opset)]
        if domain:
            opsets.append(helper.make_opsetid(domain, 1))
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)

    return build


def test_check_contract_accepts_what_keeps_it(build_proto: Callable[..., Any]) -> None:
    check_contract(build_proto())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"opset": 18}, "opset 18 instead of 17"),
        ({"opset": 13}, "opset 13 instead of 17"),
        ({"names": ("boxes", "scores")}, r"outputs \('boxes', 'scores'\) instead of"),
        ({"names": ("scores", "boxes", "labels")}, "outputs .* instead of"),
        ({"input_name": "input"}, r"inputs \('input',\) instead of \('images',\)"),
        ({"width": "W"}, "images has a free axis besides the batch"),
        (
            {"domain": "com.nvidia"},
            "node 'node of scores' has the operator com.nvidia::Cast, which is none of the",
        ),
        ({"operator": "Floor"}, "node 'node of boxes' has the operator Floor, which is none"),
        ({"operator": "NoSuchOperator"}, "the ONNX checker refuses .*NoSuchOperator"),
    ],
)
def test_check_contract_refuses_what_does_not(
    build_proto: Callable[..., Any], change: dict[str, Any], text: str
) -> None:
    with pytest.raises(ExportError, match=f"(?s){text}"):
        check_contract(build_proto(**change))


def test_check_contract_wants_the_opset_that_it_is_told(build_proto: Callable[..., Any]) -> None:
    check_contract(build_proto(opset=19), opset=19)
    with pytest.raises(ExportError, match="opset 17 instead of 19"):
        check_contract(build_proto(), opset=19)


def test_check_contract_names_every_fault(build_proto: Callable[..., Any]) -> None:
    with pytest.raises(ExportError, match=r"opset 18 .*; outputs .*; images has a free axis"):
        check_contract(build_proto(opset=18, names=("boxes",), width="W"))
