"""What every ONNX runtime checks before it runs a file: metadata, input and outputs of the contract."""

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
        CheckpointError: If it is not ONNX, has no retinaray metadata, or other inputs or outputs.
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
            f"{uri}: expected input {INPUT_NAME!r} and outputs {OUTPUT_NAMES}, found {tuple(inputs)} and "
            f"{outputs}; export it with `retinaray export`"
        )
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    element = inputs[INPUT_NAME].type.tensor_type.elem_type
    is_uint8 = element == onnx.TensorProto.UINT8
    return ModelCard.from_metadata(metadata, source=uri), "uint8" if is_uint8 else "float32"
