"""What an exported file takes and gives, read from the file itself."""

from __future__ import annotations

from dataclasses import dataclass

from retinaray.artifact import ModelCard
from retinaray.errors import ExportError
from retinaray.inference.onnx_contract import OUTPUT_NAMES, read_fixed_batch, read_onnx_card


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of an exported file.

    Attributes:
        card: What the model is; its canvas is the file's.
        input_type: `uint8` or `float32`.
        num_candidates: Candidates per image that leave the network.
        fixed_batch: The only batch size it takes; none = any.
    """

    card: ModelCard
    input_type: str
    num_candidates: int
    fixed_batch: int | None


def read_signature(content: bytes, *, uri: str) -> Signature:
    """Read inputs and outputs from the file.

    Args:
        content: The ONNX file.
        uri: Its name, for messages.

    Raises:
        CheckpointError: If it is none that was exported.
        ExportError: If the number of its candidates is not fixed.
    """
    import onnx

    card, input_type = read_onnx_card(content, uri=uri)
    graph = onnx.load_model_from_string(content).graph
    shapes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in graph.output
    }
    boxes, scores, labels = (shapes[name] for name in OUTPUT_NAMES)
    count = scores[1] if len(scores) == 2 else 0
    if count < 1 or boxes[1:] != [count, 4] or labels[1:] != [count]:
        raise ExportError(
            f"{uri}: expected outputs [N, D, 4], [N, D] and [N, D] with the same fixed D, found "
            f"{boxes}, {scores} and {labels}; export it with `retinaray export`"
        )
    return Signature(
        card=card,
        input_type=input_type,
        num_candidates=count,
        fixed_batch=read_fixed_batch(content, uri=uri),
    )
