"""INT8 by Q/DQ nodes: symmetric, weights per channel, activations per tensor, opset 17.

Convolutions of backbone, pyramid and heads take INT8; normalisation and decoding stay float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8
from torch import Tensor

from retinaray.errors import ExportError
from retinaray.export.calibration import CalibrationSettings, calibrate
from retinaray.export.graph_index import GraphIndex, index_graph, load_graph
from retinaray.export.onnx_graph import check_contract
from retinaray.inference.onnx_contract import read_precision

if TYPE_CHECKING:
    import onnx

# Symmetric: -128 is not used.
_LARGEST_LEVEL = 127


@dataclass(frozen=True)
class QuantizationPlan:
    """What of a graph becomes INT8.

    Attributes:
        activations: Node index and input slot of what takes a quantised activation.
        weighted: Indices of the convolutions with quantised weights.
        copies: Tensor to the tensor whose values it repeats, and whose scale it has.
    """

    activations: tuple[tuple[int, int], ...]
    weighted: tuple[int, ...]
    copies: Mapping[str, str]

    def list_tensors(self, index: GraphIndex) -> list[str]:
        """Names of the tensors that are quantised, each once."""
        return list(dict.fromkeys(index.nodes[node].input[slot] for node, slot in self.activations))


def quantize(
    content: bytes,
    batches: Iterable[UInt8[Tensor, "N 3 H W"]],
    settings: CalibrationSettings | None = None,
) -> bytes:
    """Write an exported file with INT8 convolutions.

    Scales are numbers that float16 has, so that `mixed_precision.to_fp16` changes none of them.

    Args:
        content: An exported float32 file.
        batches: Images of the file's canvas, preprocessed as for inference; one pass over them.
        settings: Calibration.

    Returns:
        The same graph with Q/DQ nodes, card included.

    Raises:
        ExportError: If the file is not a float32 one, there are no images, or they do not fit.
    """
    settings = settings or CalibrationSettings()
    precision = read_precision(content)
    if precision != "fp32":
        raise ExportError(f"INT8 is made from a float32 file, and this one is {precision} already")
    proto = load_graph(content)
    index = index_graph(proto.graph)
    plan = plan_quantization(index, quantize_outputs=settings.quantize_outputs)
    tensors = plan.list_tensors(index)
    measured = [name for name in tensors if name not in plan.copies]
    limits = calibrate(content, measured, batches, settings)
    scales = {name: _make_scale(limits[plan.copies.get(name, name)]) for name in tensors}
    _insert_nodes(proto.graph, index, plan, scales)
    check_contract(proto)
    return bytes(proto.SerializeToString())


def plan_quantization(index: GraphIndex, *, quantize_outputs: bool) -> QuantizationPlan:
    """Choose what becomes INT8.

    Args:
        index: An exported float32 graph.
        quantize_outputs: Quantise the last layer of each head too.
    """
    convolutions = index.list_nodes("Conv")
    left_out = _find_gates(index)
    if not quantize_outputs:
        left_out |= {conv for conv in convolutions if not _leads_to_convolution(index, conv)}
    weighted = [conv for conv in convolutions if conv not in left_out]
    activations = [(conv, 0) for conv in weighted]
    quantized = {index.nodes[conv].input[0] for conv in weighted}
    copies = {}
    for node in index.list_nodes("Add"):
        if not _leads_to_convolution(index, node):
            continue
        slot = _choose_residual(index, node, quantized)
        if slot is None:
            continue
        activations.append((node, slot))
        residual = index.nodes[node].input[slot]
        maker = index.makers[residual]
        # An enlarged map has the values of the map below it, which a convolution takes too.
        if index.nodes[maker].op_type == "Resize" and index.nodes[maker].input[0] in quantized:
            activations.append((maker, 0))
            copies[residual] = index.nodes[maker].input[0]
    return QuantizationPlan(tuple(activations), tuple(weighted), copies)


def _find_gates(index: GraphIndex) -> set[int]:
    """What weighs a block's channels: one value a channel, so that INT8 costs much for nothing."""
    return index.find_targets(
        index.list_nodes("ReduceMean"),
        passes=lambda node: node.op_type in ("Conv", "Relu", "HardSigmoid"),
    )


def _leads_to_convolution(index: GraphIndex, node: int) -> bool:
    return any(
        index.nodes[target].op_type == "Conv" and target != node
        for target in index.find_targets([node])
    )


def _choose_residual(index: GraphIndex, node: int, quantized: set[str]) -> int | None:
    """The input of an addition that is quantised; none where it adds a constant.

    Of a convolution's output and something else it is something else: TensorRT then fuses
    convolution, addition and what follows, while Q/DQ between the two would part them.

    Source: TensorRT documentation, "Working with Quantized Types": quantize the residual input in
    skip connections.
    """
    names = index.nodes[node].input
    if any(name in index.constants for name in names):
        return None
    is_fusible = [
        index.nodes[index.makers[name]].op_type == "Conv" and len(index.takers[name]) == 1
        for name in names
    ]
    if any(is_fusible):
        return 1 if is_fusible[0] else 0
    return 0 if names[0] in quantized else 1


def _make_scale(limit: float) -> npt.NDArray[np.float32]:
    """Scale of an activation; a tensor that was always 0 gets the scale of 1."""
    return _round_up(np.float32((limit or 1.0) / _LARGEST_LEVEL))


def _round_up(scales: Any) -> npt.NDArray[np.float32]:
    """The next larger numbers that float16 has."""
    scales = np.asarray(scales, dtype=np.float32)
    halves = scales.astype(np.float16)
    halves = np.where(halves < scales, np.nextafter(halves, np.float16(np.inf)), halves)
    if not np.isfinite(halves).all():
        raise ExportError(f"a scale of {scales.max():.3g} is too large for float16")
    return np.asarray(halves, dtype=np.float32)


def _insert_nodes(
    graph: onnx.GraphProto,
    index: GraphIndex,
    plan: QuantizationPlan,
    scales: Mapping[str, npt.NDArray[np.float32]],
) -> None:
    from onnx import helper, numpy_helper

    weights = {index.nodes[conv].input[1] for conv in plan.weighted}
    for name in sorted(weights):
        _quantize_weight(graph, index, name)
    graph.initializer.append(numpy_helper.from_array(np.zeros((), np.int8), "activation.zero"))
    for name, scale in scales.items():
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
    for node, slot in plan.activations:
        index.nodes[node].input[slot] += ".dequantized"
    nodes = []
    for number, node in enumerate(index.nodes):
        if number in plan.weighted:
            weight = node.input[1]
            node.input[1] = f"{node.name}.weight.dequantized"
            parts = [f"{weight}.int8", f"{weight}.scale", f"{weight}.zero"]
            nodes.append(
                helper.make_node(
                    "DequantizeLinear", parts, [node.input[1]], f"{node.name}.weight", axis=0
                )
            )
        nodes.append(node)
        for name in node.output:
            if name in scales:
                parts = [f"{name}.scale", "activation.zero"]
                quantized, dequantized = f"{name}.quantized", f"{name}.dequantized"
                nodes += [
                    helper.make_node("QuantizeLinear", [name, *parts], [quantized], quantized),
                    helper.make_node(
                        "DequantizeLinear", [quantized, *parts], [dequantized], dequantized
                    ),
                ]
    kept = [tensor for tensor in graph.initializer if tensor.name not in weights]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)


def _quantize_weight(graph: onnx.GraphProto, index: GraphIndex, name: str) -> None:
    """Add a weight as INT8, with one scale for each channel that it makes."""
    from onnx import numpy_helper

    values = numpy_helper.to_array(index.constants[name])
    limits = np.abs(values).reshape(len(values), -1).max(axis=1)
    scales = _round_up(np.where(limits > 0, limits, 1.0) / _LARGEST_LEVEL)
    levels = np.rint(values / scales.reshape(-1, *[1] * (values.ndim - 1)))
    for part, array in (
        ("int8", np.clip(levels, -_LARGEST_LEVEL, _LARGEST_LEVEL).astype(np.int8)),
        ("scale", scales),
        ("zero", np.zeros(len(values), np.int8)),
    ):
        graph.initializer.append(numpy_helper.from_array(array, f"{name}.{part}"))
