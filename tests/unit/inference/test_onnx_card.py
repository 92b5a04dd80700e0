"""Another card in an exported file."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest

from retinaray.artifact import ModelCard
from retinaray.errors import CheckpointError
from retinaray.inference.onnx_card import replace_onnx_card
from retinaray.inference.onnx_contract import read_onnx_card


def test_replace_onnx_card_changes_the_card_and_nothing_else(tiny_onnx: bytes) -> None:
    marked = onnx.load_model_from_string(tiny_onnx)
    marked.metadata_props.add(key="somebody", value="else's")
    card, input_type = read_onnx_card(tiny_onnx, uri="m.onnx")
    tuned = replace(card, score_thresholds=(0.1, 0.2, 0.3), nms_kind="agnostic", max_detections=7)
    content = replace_onnx_card(marked.SerializeToString(), tuned, uri="m.onnx")
    assert read_onnx_card(content, uri="m.onnx") == (tuned, input_type)
    rewritten = onnx.load_model_from_string(content)
    assert rewritten.graph == marked.graph
    keys = [entry.key for entry in rewritten.metadata_props]
    assert len(keys) == len(set(keys)) == len(marked.metadata_props)
    assert "somebody" in keys


def test_replace_onnx_card_refuses_what_does_not_fit(
    tiny_onnx: bytes, tiny_card: ModelCard
) -> None:
    with pytest.raises(CheckpointError, match=r"m\.onnx: expected an input of .*128"):
        replace_onnx_card(tiny_onnx, replace(tiny_card, canvas=(64, 128)), uri="m.onnx")
    with pytest.raises(CheckpointError, match=r"x\.onnx: not a readable ONNX file"):
        replace_onnx_card(b"nothing", tiny_card, uri="x.onnx")
