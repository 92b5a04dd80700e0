"""What every runtime checks before it runs an ONNX file: metadata, input and outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from retinaray.artifact import ModelCard
from retinaray.errors import CheckpointError

if TYPE_CHECKING:
    import onnx

INPUT_NAME = "images"
OUTPUT_NAMES = ("boxes", "scores", "labels")

Precision = Literal["fp32", "fp16", "int8"]


def read_onnx_card(content: bytes, *, uri: str) -> tuple[ModelCard, str]:
    """The card of an exported file and its input type.

    Args:
        content: The ONNX file.
        uri: Its name, for messages.

    Returns:
        The card, and `uint8` or `float32`.

    Raises:
        CheckpointError: If it is not ONNX, has no retinaray metadata, or other inputs or outputs
            than they say.
    """
    import onnx

    model = _load(content, uri)
    inputs = {value.name: value for value in model.graph.input}
    outputs = tuple(value.name for value in model.graph.output)
    if set(inputs) != {INPUT_NAME} or outputs != OUTPUT_NAMES:
        raise CheckpointError(
            f"{uri}: expected input {INPUT_NAME!r} and outputs {OUTPUT_NAMES}, found "
            f"{tuple(inputs)} and "
            f"{outputs}; export it with `retinaray export`"
        )
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    card = ModelCard.from_metadata(metadata, source=uri)
    tensor = inputs[INPUT_NAME].type.tensor_type
    types = {onnx.TensorProto.UINT8: "uint8", onnx.TensorProto.FLOAT: "float32"}
    shape = tuple(axis.dim_value for axis in tensor.shape.dim[1:])
    if shape != (3, *card.canvas) or tensor.elem_type not in types:
        raise CheckpointError(
            f"{uri}: expected an input of {('N', 3, *card.canvas)}, uint8 or float32, as its "
            f"metadata say, found {('N', *shape)}, "
            f"{onnx.TensorProto.DataType.Name(tensor.elem_type)}; export it with `retinaray export`"
        )
    return card, types[tensor.elem_type]


def read_precision(content: bytes, *, uri: str = "the ONNX file") -> Precision:
    """What a file computes its convolutions in, by its graph: its name says nothing about it.

    Args:
        content: The ONNX file.
        uri: Its name, for messages.

    Returns:
        `int8` with Q/DQ nodes, whatever the other layers have; else `fp16` with float16 weights.

    Raises:
        CheckpointError: If it is not ONNX.
    """
    import onnx

    graph = _load(content, uri).graph
    if any(node.op_type == "QuantizeLinear" for node in graph.node):
        return "int8"
    is_half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer)
    return "fp16" if is_half else "fp32"


def read_fixed_batch(content: bytes, *, uri: str = "the ONNX file") -> int | None:
    """The only batch size that a file takes; none = any.

    Args:
        content: The ONNX file.
        uri: Its name, for messages.

    Raises:
        CheckpointError: If it is not ONNX, or has no such input.
    """
    inputs = _load(content, uri).graph.input
    if len(inputs) != 1 or not inputs[0].type.tensor_type.shape.dim:
        raise CheckpointError(f"{uri}: expected one input {INPUT_NAME!r} of four axes")
    return inputs[0].type.tensor_type.shape.dim[0].dim_value or None


def _load(content: bytes, uri: str) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load_model_from_string(content)
    except DecodeError as error:
        raise CheckpointError(
            f"{uri}: not a readable ONNX file ({len(content)} bytes): {error}"
        ) from error
