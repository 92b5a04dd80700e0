"""Which operators and types an exported file may use: what every TensorRT of ours takes.

TensorRT 8 has no INT64 and reads it as INT32. Its 8.5 takes no UINT8, so that an uint8 input, which
only a Cast touches, needs 8.6; `targets` knows who takes one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from retinaray.export.graph_index import infer_types

if TYPE_CHECKING:
    import onnx

# TensorRT's TopK takes fewer than 3840.
MAX_TOP_K = 3839

_NETWORK = frozenset(["FLOAT", "FLOAT16"])
# What decodes boxes never leaves float32: a coordinate above 1024 has steps of a pixel in float16.
_DECODE = frozenset(["FLOAT"])
_INDEX = frozenset(["INT64"])

PERMITTED_OPERATORS: dict[str, frozenset[str]] = {
    "Add": _NETWORK,
    "Cast": _NETWORK | _INDEX | {"UINT8"},
    "Clip": _DECODE,
    "Concat": _NETWORK | _INDEX,
    "Conv": _NETWORK,
    "DequantizeLinear": frozenset(["INT8"]),
    "Div": _DECODE | _INDEX,
    "Exp": _DECODE,
    "Expand": _INDEX,
    "GatherElements": _DECODE | _INDEX,
    "GatherND": _DECODE,
    "HardSigmoid": _NETWORK,
    "HardSwish": _NETWORK,
    "InstanceNormalization": _DECODE,
    "MaxPool": _NETWORK,
    "Mul": _NETWORK | _INDEX,
    "QuantizeLinear": _NETWORK,
    "ReduceMax": _DECODE,
    "ReduceMean": _DECODE,
    "Relu": _NETWORK,
    "Reshape": _NETWORK,
    "Resize": _NETWORK,
    "Shape": _NETWORK,
    "Sigmoid": _DECODE,
    "Slice": _DECODE,
    "Split": _NETWORK,
    "Squeeze": _DECODE,
    "Sub": _DECODE | _INDEX,
    "TopK": _DECODE,
    "Transpose": _NETWORK,
    "Unsqueeze": _DECODE | _INDEX,
}
"""Operator to the element types of its first input, named as in `onnx.TensorProto.DataType`."""


def find_foreign_nodes(proto: onnx.ModelProto) -> list[str]:
    """What of a graph is not permitted, one sentence a node; empty when everything is.

    Raises:
        ExportError: If types or shapes contradict each other.
    """
    foreign = [
        f"node {node.name!r} has the operator {_name_operator(node)}, which is none of the "
        f"{len(PERMITTED_OPERATORS)} that are permitted"
        for node in proto.graph.node
        if node.domain or node.op_type not in PERMITTED_OPERATORS
    ]
    # Without its schema an operator's types cannot be inferred, nor those behind it.
    return foreign or [*_find_foreign_types(proto), *_find_large_top_k(proto)]


def _name_operator(node: onnx.NodeProto) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _find_foreign_types(proto: onnx.ModelProto) -> list[str]:
    import onnx

    types = infer_types(proto)
    faults = []
    for node in proto.graph.node:
        element = onnx.TensorProto.DataType.Name(types[node.input[0]])
        permitted = PERMITTED_OPERATORS[node.op_type]
        if element not in permitted:
            faults.append(
                f"node {node.name!r} ({node.op_type}) works on {element}, permitted are "
                f"{', '.join(sorted(permitted))}"
            )
    return faults


def _find_large_top_k(proto: onnx.ModelProto) -> list[str]:
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    faults = []
    for node in proto.graph.node:
        if node.op_type == "TopK":
            count = constants.get(node.input[1])
            value = None if count is None else int(numpy_helper.to_array(count).item())
            if value is None or not 1 <= value <= MAX_TOP_K:
                faults.append(
                    f"node {node.name!r} (TopK) takes {value or 'a computed number of'} values, "
                    f"permitted are 1 to {MAX_TOP_K} as a constant"
                )
    return faults
