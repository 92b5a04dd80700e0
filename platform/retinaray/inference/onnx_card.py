"""Another card in an exported file: the graph stays as it is, byte for byte of its weights."""

from __future__ import annotations

from retinaray.artifact import METADATA_PREFIX, ModelCard
from retinaray.inference.onnx_contract import read_onnx_card


def replace_onnx_card(content: bytes, card: ModelCard, *, uri: str) -> bytes:
    """Rewrite the metadata of an exported file.

    Args:
        content: The ONNX file.
        card: What to write; its canvas is the file's.
        uri: The file's name, for messages.

    Returns:
        The new file; metadata that are not retinaray's are kept.

    Raises:
        CheckpointError: If the file is none that was exported, or the new card does not fit it.
    """
    import onnx

    read_onnx_card(content, uri=uri)
    model = onnx.load_model_from_string(content)
    kept = [entry for entry in model.metadata_props if not entry.key.startswith(METADATA_PREFIX)]
    metadata = {entry.key: entry.value for entry in kept} | card.to_metadata()
    del model.metadata_props[:]
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    rewritten = bytes(model.SerializeToString())
    read_onnx_card(rewritten, uri=uri)
    return rewritten
