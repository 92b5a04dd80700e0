"""Float16 written into a file's types, as strong typing asks for: convolutions in float16.

Normalisation of pixels, statistics over maps, and everything from the raw outputs to the boxes stay
float32, found by where they stand in the graph and not by the values that pass. Works on Q/DQ
files too. ONNX Runtime's own converter is not used: it rounds what float16 and float32 nodes share,
and casts to float16 and back between neighbours that both stay float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from retinaray.errors import ExportError
from retinaray.export.graph_index import GraphIndex, index_graph, infer_types, load_graph
from retinaray.export.onnx_graph import AXES_MOVED, IR_VERSIONS, OPSET, check_contract
from retinaray.inference.onnx_contract import read_precision

if TYPE_CHECKING:
    import onnx

# Before this one Q/DQ have float32 scales only.
HALF_QDQ_OPSET = 19
# Their sums over a map leave the range of float16 long before their result does.
_STATISTICS = ("InstanceNormalization", "ReduceMean")
# They change no value, and are half the work on half the bytes.
_MOVES = frozenset(["Concat", "Reshape", "Split", "Transpose"])
_COMPUTATIONS = frozenset(
    ["Add", "Clip", "Div", "Exp", "Mul", "ReduceMax", "Sigmoid", "Sub", "TopK", *_STATISTICS]
)
# What counts cells is no value.
_SHAPES = ("Shape",)


def to_fp16(content: bytes) -> bytes:
    """Write an exported file with float16 convolutions.

    Args:
        content: An exported file, float32 or with Q/DQ nodes and float32 scales.

    Returns:
        The same graph and card with the same inputs and outputs. Opset 17; 19 with Q/DQ nodes,
        whose scales become float16.

    Raises:
        ExportError: If it has float16 already, a weight is too large for float16, or the result
            does not keep the contract.
    """
    import onnx

    proto = load_graph(content)
    if any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in proto.graph.initializer):
        raise ExportError("float16 is made from float32, and this file has float16 already")
    opset = OPSET
    if read_precision(content) == "int8":
        opset = HALF_QDQ_OPSET
        _raise_opset(proto, opset)
    # What other tools have noted of inner tensors would contradict the new types.
    del proto.graph.value_info[:]
    index = index_graph(proto.graph)
    _Writer(proto, index, find_half_nodes(index)).write()
    check_contract(proto, opset=opset)
    return bytes(proto.SerializeToString())


def _raise_opset(proto: onnx.ModelProto, opset: int) -> None:
    """Write a permitted graph of opset 17 as 18 or 19: only the place of two operators' axes moved.

    onnx's own converter would drop the card, and put the axes into nodes of their own.
    """
    from onnx import helper, numpy_helper

    for number, node in enumerate(proto.graph.node):
        for attribute in [a for a in node.attribute if a.name == "axes"]:
            if node.op_type in AXES_MOVED:
                axes = np.array(helper.get_attribute_value(attribute), dtype=np.int64)
                name = f"{node.output[0]}.axes.{number}"
                proto.graph.initializer.append(numpy_helper.from_array(axes, name))
                node.input.append(name)
                node.attribute.remove(attribute)
    for entry in proto.opset_import:
        if entry.domain == "":
            entry.version = opset
    proto.ir_version = IR_VERSIONS[opset]


def find_half_nodes(index: GraphIndex) -> set[int]:
    """Indices of the nodes that become float16.

    Args:
        index: An exported graph with float32 values.

    Returns:
        What lies between the first and the last convolutions, them included, and what merely moves
        their outputs; without statistics and without quantisation, whose type is its neighbours'.
    """
    convolutions = index.list_nodes("Conv")
    body = index.find_targets(convolutions) & index.find_sources(convolutions)
    moved = index.find_targets(convolutions, passes=lambda node: node.op_type in _MOVES)
    kept = set(index.list_nodes(*_STATISTICS, "QuantizeLinear", "DequantizeLinear"))
    kept |= _find_float_moves(index)
    return (body | moved) - kept


def list_float32_nodes(content: bytes) -> tuple[str, ...]:
    """Names of the nodes that must compute in float32, for a builder that chooses types itself.

    Args:
        content: An exported file with float32 values, Q/DQ nodes or none.

    Returns:
        Normalisation of pixels, statistics, and all from the raw outputs to the boxes that computes
        with real numbers; what only moves values or indices is left out.
    """
    import onnx

    proto = load_graph(content)
    index, types = index_graph(proto.graph), infer_types(proto)
    half = find_half_nodes(index)
    return tuple(
        node.name
        for number, node in enumerate(index.nodes)
        if number not in half
        and node.op_type in _COMPUTATIONS
        and types[node.output[0]] == onnx.TensorProto.FLOAT
    )


def _find_float_moves(index: GraphIndex) -> set[int]:
    """Moves into and out of statistics, which would only cast in between."""
    statistics = index.list_nodes(*_STATISTICS)
    around = set(statistics)
    for node in statistics:
        around.update(n for n in index.list_sources(node) if index.nodes[n].op_type in _MOVES)
        around.update(n for n in index.list_targets(node) if index.nodes[n].op_type in _MOVES)
    return around


class _Writer:
    """Rewrites a graph so that chosen nodes compute in float16, with the fewest casts.

    A tensor has the type of the node that makes it. Where a taker needs the other, one cast serves
    all takers.
    """

    def __init__(self, proto: onnx.ModelProto, index: GraphIndex, half: set[int]) -> None:
        from onnx import TensorProto

        self._float, self._half = TensorProto.FLOAT, TensorProto.FLOAT16
        self._graph, self._index, self._half_nodes = proto.graph, index, half
        # Of every tensor that holds real numbers: its type; first as it was, then as it becomes.
        types = infer_types(proto)
        self._types = {name: kind for name, kind in types.items() if kind == self._float}
        self._written: list[onnx.NodeProto] = []
        self._casts: dict[tuple[str, int], str] = {}
        self._constants: dict[str, onnx.TensorProto] = {}

    def write(self) -> None:
        """Change the graph in place."""
        outputs = {value.name for value in self._graph.output}
        for number, node in enumerate(self._index.nodes):
            if node.op_type == "QuantizeLinear":
                # Its scale has the type of what it quantises.
                self._convert_inputs(node, self._types[node.input[0]])
            else:
                self._convert_inputs(node, self._choose_type(number))
            self._written.append(node)
            for name in node.output:
                if name in self._types:
                    self._types[name] = self._choose_type(number)
        self._check_outputs(outputs)
        others = [t for t in self._graph.initializer if t.name not in self._types]
        del self._graph.node[:], self._graph.initializer[:]
        self._graph.node.extend(self._written)
        self._graph.initializer.extend([*others, *self._constants.values()])

    def _choose_type(self, number: int) -> int:
        """What a node computes in; a dequantisation gives its takers what they want."""
        if self._index.nodes[number].op_type == "DequantizeLinear":
            is_half = any(taker in self._half_nodes for taker in self._index.list_targets(number))
        else:
            is_half = number in self._half_nodes
        return self._half if is_half else self._float

    def _convert_inputs(self, node: onnx.NodeProto, wanted: int) -> None:
        if node.op_type in _SHAPES:
            return
        for slot, name in enumerate(node.input):
            if name in self._index.constants and name in self._types:
                node.input[slot] = self._convert_constant(name, wanted)
            elif name in self._types and self._types[name] != wanted:
                node.input[slot] = self._cast(name, wanted)

    def _cast(self, name: str, wanted: int) -> str:
        from onnx import helper

        if (name, wanted) not in self._casts:
            output = f"{name}.{'half' if wanted == self._half else 'float'}"
            self._written.append(helper.make_node("Cast", [name], [output], output, to=wanted))
            self._casts[name, wanted] = output
        return self._casts[name, wanted]

    def _convert_constant(self, name: str, wanted: int) -> str:
        """A constant in the wanted type, once for each type that is wanted."""
        from onnx import numpy_helper

        tensor = self._index.constants[name]
        if wanted == self._float:
            self._constants[name] = tensor
            return name
        output = f"{name}.half"
        if output not in self._constants:
            values = numpy_helper.to_array(tensor)
            if np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
                raise ExportError(
                    f"{name!r} holds {np.abs(values).max():.4g}, and float16 ends at 65504: "
                    "keep this model in float32"
                )
            halves = values.astype(np.float16)
            # A scale that became 0 would divide by it.
            is_lost = (halves == 0) & (values != 0)
            halves[is_lost] = np.copysign(np.finfo(np.float16).smallest_subnormal, values[is_lost])
            self._constants[output] = numpy_helper.from_array(halves, output)
        return output

    def _check_outputs(self, outputs: Iterable[str]) -> None:
        halves = [name for name in outputs if self._types.get(name) == self._half]
        if halves:
            raise ExportError(
                f"the outputs {', '.join(sorted(halves))} would be float16: expected a graph that "
                "decodes its boxes after its last convolution"
            )
