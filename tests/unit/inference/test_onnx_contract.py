"""ONNX files that are not, or no longer, what `retinaray export` writes."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest
from onnx import TensorProto, helper

from retinaray.artifact import ModelCard
from retinaray.errors import CheckpointError
from retinaray.inference.onnx_contract import (
    read_fixed_batch,
    read_onnx_card,
    read_precision,
)


@pytest.fixture
def build_onnx(tiny_card: ModelCard) -> Callable[..., bytes]:
    """A file of the right outside and an empty inside, with changes to the outside."""

    def build(
        *,
        input_name: str = "images",
        outputs: tuple[str, ...] = ("boxes", "scores", "labels"),
        shape: tuple[object, ...] = ("N", 3, 64, 96),
        element: int = TensorProto.UINT8,
        has_metadata: bool = True,
    ) -> bytes:
        graph = helper.make_graph(
            [helper.make_node("Cast", [input_name], [name], to=1) for name in outputs],
            "g",
            [helper.make_tensor_value_info(input_name, element, shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        )
        model = helper.make_model(graph)
        if has_metadata:
            helper.set_model_props(model, tiny_card.to_metadata())
        return bytes(model.SerializeToString())

    return build


@pytest.mark.parametrize(
    ("element", "name"), [(TensorProto.UINT8, "uint8"), (TensorProto.FLOAT, "float32")]
)
def test_read_onnx_card_gives_card_and_input_type(
    build_onnx: Callable[..., bytes], tiny_card: ModelCard, element: int, name: str
) -> None:
    content = build_onnx(element=element)
    assert read_onnx_card(content, uri="m.onnx") == (tiny_card, name)


def test_read_onnx_card_reads_what_export_wrote(tiny_onnx: bytes, tiny_card: ModelCard) -> None:
    assert read_onnx_card(tiny_onnx, uri="m.onnx") == (tiny_card, "uint8")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999, 0.99999])
def test_read_onnx_card_refuses_a_truncated_file(tiny_onnx: bytes, share: float) -> None:
    content = tiny_onnx[: int(share * len(tiny_onnx))]
    with pytest.raises(CheckpointError, match=r"^cut.onnx: (not a readable|expected)"):
        read_onnx_card(content, uri="cut.onnx")


@pytest.mark.parametrize("num_bytes", [1, 100, 700, 1400, 2000])
def test_read_onnx_card_refuses_a_file_that_lost_its_end(
    build_onnx: Callable[..., bytes], num_bytes: int
) -> None:
    # The metadata stand at the end of the file: some cuts leave a valid but shorter list.
    content = build_onnx()
    with pytest.raises(CheckpointError, match=r"cut\.onnx: "):
        read_onnx_card(content[:-num_bytes], uri="cut.onnx")


@pytest.mark.parametrize("content", [b"<html>404</html>", b"PK\x03\x04", b"\x00" * 64, b"text"])
def test_read_onnx_card_refuses_what_is_no_onnx(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^x.onnx: "):
        read_onnx_card(content, uri="x.onnx")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"has_metadata": False}, r"lack retinaray\.architecture, .*`retinaray export`"),
        ({"outputs": ("boxes", "scores")}, r"expected input .*\('boxes', 'scores'\)"),
        ({"outputs": ("scores", "boxes", "labels")}, "expected input .*'labels'"),
        ({"input_name": "input"}, r"expected input 'images' .*\('input',\)"),
        ({"shape": ("N", 3, 96, 64)}, r"expected an input of \('N', 3, 64, 96\).*\('N', 3, 96, 64"),
        ({"shape": ("N", 3, "H", "W")}, r"found \('N', 3, 0, 0\)"),
        ({"shape": ("N", 64, 96, 3)}, r"found \('N', 64, 96, 3\)"),
        ({"element": TensorProto.FLOAT16}, "found .*FLOAT16"),
    ],
)
def test_read_onnx_card_refuses_another_contract(
    build_onnx: Callable[..., bytes], change: dict[str, object], text: str
) -> None:
    with pytest.raises(CheckpointError, match=f"^m.onnx: .*{text}"):
        read_onnx_card(build_onnx(**change), uri="m.onnx")


def test_read_onnx_card_refuses_damaged_metadata(build_onnx: Callable[..., bytes]) -> None:
    model = onnx.load_model_from_string(build_onnx())
    for entry in model.metadata_props:
        if entry.key == "retinaray.anchors":
            entry.value = entry.value[:-2]
    with pytest.raises(CheckpointError, match=r"m\.onnx: its retinaray metadata are damaged"):
        read_onnx_card(model.SerializeToString(), uri="m.onnx")


def test_read_onnx_card_accepts_a_fixed_batch(
    build_onnx: Callable[..., bytes], tiny_card: ModelCard
) -> None:
    content = build_onnx(shape=(4, 3, 64, 96))
    assert read_onnx_card(content, uri="m.onnx") == (tiny_card, "uint8")


@pytest.mark.parametrize(("batch", "expected"), [("N", None), (1, 1), (4, 4), (None, None)])
def test_read_fixed_batch_reads_the_first_axis(
    build_onnx: Callable[..., bytes], batch: object, expected: int | None
) -> None:
    assert read_fixed_batch(build_onnx(shape=(batch, 3, 64, 96))) == expected


def test_read_fixed_batch_refuses_an_input_without_axes(
    build_onnx: Callable[..., bytes],
) -> None:
    with pytest.raises(
        CheckpointError, match=r"^m\.onnx: expected one input 'images' of four axes"
    ):
        read_fixed_batch(build_onnx(shape=()), uri="m.onnx")


@pytest.mark.parametrize(
    ("has_nodes", "element", "expected"),
    [
        (False, TensorProto.FLOAT, "fp32"),
        (False, TensorProto.FLOAT16, "fp16"),
        (True, TensorProto.FLOAT, "int8"),
        (True, TensorProto.FLOAT16, "int8"),
    ],
)
def test_read_precision_reads_the_graph_and_not_the_name(
    build_onnx: Callable[..., bytes], has_nodes: bool, element: int, expected: str
) -> None:
    model = onnx.load_model_from_string(build_onnx())
    model.graph.initializer.append(helper.make_tensor("weight", element, [1], [1.0]))
    if has_nodes:
        model.graph.node.append(helper.make_node("QuantizeLinear", ["images", "weight"], ["q"]))
    assert read_precision(model.SerializeToString()) == expected


@pytest.mark.parametrize("read", [read_precision, read_fixed_batch])
def test_reading_what_is_no_onnx_names_the_file(read: Callable[..., object]) -> None:
    with pytest.raises(CheckpointError, match=r"^m\.onnx: not a readable ONNX file \(5 bytes\)"):
        read(b"\xff" * 5, uri="m.onnx")
