"""What every runtime checks before it runs an ONNX file: metadata, input and outputs."""

from __future__ import annotations

from retinaray.artifact import ModelCard
from retinaray.errors import CheckpointError

INPUT_NAME = "images"
OUTPUT_NAMES = ("boxes", "scores", "labels")


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
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise CheckpointError(
            f"{uri}: not a readable ONNX file ({len(content)} bytes): {error}"
        ) from error
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
