"""Weights files: what goes in comes out, and nothing else is accepted or run."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from retinaray.artifact import (
    METADATA_PREFIX,
    ModelCard,
    dump_weights,
    hash_content,
    load_tensors,
    model_kind,
    read_weights,
)
from retinaray.data.coco import Category, CategoryTable
from retinaray.detector.anchors import AnchorSpec
from retinaray.detector.retinanet import RetinaNet
from retinaray.errors import CheckpointError


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self._marker, "executed")


def to_bytes(values: object) -> bytes:
    stream = io.BytesIO()
    torch.save(values, stream)
    return stream.getvalue()


def open_bytes(content: bytes) -> dict[str, Any]:
    values: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    return values


def test_metadata_give_an_equal_card_back(make_tiny_card: Callable[..., ModelCard]) -> None:
    card = replace(
        make_tiny_card(num_classes=2),
        categories=CategoryTable((Category(2**60, "Zürich 日本"), Category("b", 'quote"\n'))),
        anchors=AnchorSpec(scales=(1.1, 3.3), ratios=(0.7,), convention="odtk"),
        canvas=(100, 132),
        score_thresholds=(0.1, 0.7000000000000001),
        nms_iou=0.45,
        nms_kind="agnostic",
        max_detections=17,
        training={"data": {"classes": None, "size": [3, 4]}, "lr": 1e-30},
    )
    metadata = card.to_metadata()
    assert all(key.startswith("retinaray.") for key in metadata)
    assert all(isinstance(text, str) and text.isascii() for text in metadata.values())
    assert ModelCard.from_metadata(metadata | {"other": "x"}, source="f") == card


def test_from_metadata_reads_files_that_are_older_than_the_nms_kind(tiny_card: ModelCard) -> None:
    newer = {METADATA_PREFIX + key for key in ("nms_kind", "max_detections")}
    metadata = tiny_card.to_metadata()
    assert newer < set(metadata)
    older = {key: text for key, text in metadata.items() if key not in newer}
    card = ModelCard.from_metadata(older, source="old.pth")
    assert (card.nms_kind, card.max_detections) == ("class", 100)
    assert card == tiny_card


def test_from_metadata_reads_files_that_are_older_than_norms_in_the_heads(
    tiny_card: ModelCard,
) -> None:
    metadata = tiny_card.to_metadata()
    architecture = json.loads(metadata["retinaray.architecture"])
    del architecture["has_head_norm"]
    older = {**metadata, "retinaray.architecture": json.dumps(architecture)}
    assert ModelCard.from_metadata(older, source="old.pth") == tiny_card


def test_read_weights_gives_norms_in_the_heads_back(
    make_tiny_card: Callable[..., ModelCard],
) -> None:
    card = make_tiny_card(head_depth=2, has_head_norm=True)
    model = card.build_model()
    norms = [m for m in model.class_head.tower if isinstance(m, torch.nn.GroupNorm)]
    assert [norm.num_channels for norm in norms] == [16, 16]
    again, loaded = read_weights(dump_weights(card, model.state_dict()), source="a.pth")
    assert again == card
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("nms_kind", '"soft"', r"f\.pth: .*nms_kind='soft'.*newer version"),
        ("nms_kind", "[]", r"f\.pth: .*nms_kind=\[\]"),
        ("max_detections", "0", r"f\.pth: .*max_detections=0.*at least 1"),
        ("max_detections", "null", r"f\.pth: its retinaray metadata are damaged: TypeError"),
    ],
)
def test_from_metadata_refuses_a_suppression_that_it_does_not_know(
    tiny_card: ModelCard, key: str, text: str, message: str
) -> None:
    metadata = tiny_card.to_metadata() | {METADATA_PREFIX + key: text}
    with pytest.raises(CheckpointError, match=message):
        ModelCard.from_metadata(metadata, source="f.pth")


def test_read_weights_gives_card_and_network_back(
    tiny_card: ModelCard, tiny_model: RetinaNet, tiny_weights: bytes
) -> None:
    card, model = read_weights(tiny_weights, source="model.pth")
    assert card == tiny_card
    assert not model.training
    state = model.state_dict()
    assert state.keys() == tiny_model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in tiny_model.state_dict().items())


def test_read_weights_does_not_ask_for_the_random_state(tiny_weights: bytes) -> None:
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        _, model = read_weights(tiny_weights, source="model.pth")
        with torch.inference_mode():
            outputs.append(model(torch.full((1, 3, 32, 32), 77, dtype=torch.uint8))[0])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_read_weights_refuses_a_truncated_file(tiny_weights: bytes, share: float) -> None:
    content = tiny_weights[: int(share * len(tiny_weights))]
    with pytest.raises(CheckpointError, match=rf"^m.pth: not a readable .*\({len(content)} bytes"):
        read_weights(content, source="m.pth")


def test_read_weights_refuses_a_file_with_one_wrong_byte(tiny_weights: bytes) -> None:
    damaged = bytearray(tiny_weights)
    damaged[len(damaged) // 2] ^= 0xFF
    with pytest.raises(CheckpointError, match=r"m\.pth: not a readable .* is damaged"):
        read_weights(bytes(damaged), source="m.pth")


@pytest.mark.parametrize("container", ["plain", "legacy", "zip", "inside"])
def test_read_weights_never_executes_what_a_pickle_asks_for(
    tmp_path: Path, tiny_weights: bytes, container: str
) -> None:
    marker = tmp_path / "marker"
    payload = Payload(marker)
    if container == "plain":
        content = pickle.dumps(payload)
    elif container == "inside":
        content = to_bytes(open_bytes(tiny_weights) | {"card": payload})
    else:
        stream = io.BytesIO()
        torch.save(payload, stream, _use_new_zipfile_serialization=container == "zip")
        content = stream.getvalue()
    with pytest.raises(CheckpointError, match=r"evil\.pth: not a readable weights file"):
        read_weights(content, source="evil.pth")
    assert not marker.exists()


def test_the_malicious_pickle_would_have_worked(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.read_text() == "executed"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (to_bytes({"conv1.weight": torch.zeros(3)}), "expected a retinaray weights file .*None"),
        (to_bytes({"format": "retinaray-training-1"}), "found format 'retinaray-training-1'"),
        (to_bytes([1, 2]), "expected a dictionary, found list"),
        (to_bytes({"format": "retinaray-weights-1"}), "it lacks its card or its tensors"),
        (
            to_bytes({"format": "retinaray-weights-1", "card": 3, "state": {}}),
            "it lacks its card or its tensors",
        ),
        (b"PK\x03\x04 no torch file", "not a readable weights file"),
        (b"<html>404 Not Found</html>", "not a readable weights file"),
    ],
)
def test_read_weights_refuses_foreign_files(content: bytes, text: str) -> None:
    with pytest.raises(CheckpointError, match=f"^other.pth: .*{text}"):
        read_weights(content, source="other.pth")


def test_load_tensors_refuses_a_zip_of_something_else() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"a\.zip: not a readable weights file"):
        load_tensors(stream.getvalue(), source="a.zip")


@pytest.mark.parametrize("change", ["missing", "shape", "extra", "type"])
def test_read_weights_refuses_tensors_that_do_not_fit_the_card(
    tiny_weights: bytes, change: str
) -> None:
    values = open_bytes(tiny_weights)
    state = values["state"]
    if change == "missing":
        del state["fpn.p6.bias"]
    elif change == "extra":
        state["fpn.p9.bias"] = torch.zeros(1)
    else:
        state["fpn.p6.bias"] = torch.zeros(5) if change == "shape" else "text"
    with pytest.raises(CheckpointError, match=r"(?s)m.pth: its tensors do not fit.*fpn\.p"):
        read_weights(to_bytes(values), source="m.pth")


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("anchors", "{not json", "metadata are damaged"),
        ("anchors", '{"scales": [1], "ratios": [1], "strides": [8]}', "damaged.*convention"),
        ("anchors", "[1, 2]", "metadata are damaged"),
        ("architecture", '{"backbone": "ResNet10FPN"}', "damaged.*norm"),
        ("architecture", "7", "metadata are damaged"),
        ("categories", "[]", "damaged.*at least one category"),
        ("categories", '[{"id": 1.5, "name": "a"}]', "damaged.*expected a category"),
        ("canvas", "[64]", "metadata are damaged"),
        ("canvas", "null", "metadata are damaged"),
        ("nms_iou", '"half"', "damaged.*half"),
        ("score_thresholds", "[0.3]", "1 score thresholds for 3 categories"),
        ("score_thresholds", "0.3", "metadata are damaged"),
    ],
)
def test_from_metadata_refuses_damaged_values(
    tiny_card: ModelCard, key: str, text: str, message: str
) -> None:
    metadata = tiny_card.to_metadata() | {METADATA_PREFIX + key: text}
    with pytest.raises(CheckpointError, match=f"^model.onnx: .*{message}"):
        ModelCard.from_metadata(metadata, source="model.onnx")


def test_from_metadata_names_every_missing_key(tiny_card: ModelCard) -> None:
    metadata = tiny_card.to_metadata()
    del metadata["retinaray.canvas"], metadata["retinaray.run_id"]
    with pytest.raises(
        CheckpointError, match=r"lack retinaray\.canvas, retinaray\.run_id; export it again"
    ):
        ModelCard.from_metadata(metadata, source="x.onnx")


def test_read_weights_refuses_a_card_that_names_no_known_network(tiny_weights: bytes) -> None:
    values = open_bytes(tiny_weights)
    architecture = json.loads(values["card"]["retinaray.architecture"])
    values["card"]["retinaray.architecture"] = json.dumps(architecture | {"backbone": "VGG"})
    with pytest.raises(CheckpointError, match=r"m\.pth: .*backbone='VGG'"):
        read_weights(to_bytes(values), source="m.pth")


def test_dump_weights_takes_gradients_and_other_memory_formats(
    tiny_card: ModelCard, make_lively_model: Callable[[ModelCard], RetinaNet]
) -> None:
    model = make_lively_model(tiny_card).to(memory_format=torch.channels_last)
    state = dict(model.state_dict()) | dict(model.named_parameters())
    assert any(value.requires_grad for value in state.values())
    _, loaded = read_weights(dump_weights(tiny_card, state), source="m.pth")
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize(
    ("uri", "kind"), [("a.pth", "weights"), ("s3://b/x.y/M.ONNX", "onnx"), ("./a.b.pth", "weights")]
)
def test_model_kind_goes_by_the_ending(uri: str, kind: str) -> None:
    assert model_kind(uri) == kind


@pytest.mark.parametrize("uri", ["model", "model.pt", "s3://b.pth/model", ".pth"])
def test_model_kind_refuses_other_endings(uri: str) -> None:
    with pytest.raises(CheckpointError, match=r"expected a model file that ends in \.pth, \.onnx"):
        model_kind(uri)


def test_hash_content_is_sha256() -> None:
    # The SHA-256 of the empty string, FIPS 180-4.
    assert hash_content(b"").startswith("e3b0c44298fc1c149afbf4c8996fb924")
