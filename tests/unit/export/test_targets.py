"""What each target takes: that the right file fits it, and that a wrong one is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import pytest
from onnx import TensorProto

from retinaray.errors import ExportError
from retinaray.export.graph_index import infer_types
from retinaray.export.targets import TARGETS, Target, check_file, read_file_kind

# The list of the nearest version that is known and not newer.
LISTS = {"10.13": "10.3"}
NAMES = {"FLOAT": "FP32", "FLOAT16": "FP16"}

# Target, typing, then the file for fp32, fp16 and int8.
TAKEN = [
    ("jetpack5", "weak", "fp32", "fp32", "int8"),
    ("jetpack6", "strong", "fp32", "fp16", "int8-fp16"),
    ("jetpack6", "weak", "fp32", "fp32", "int8"),
    ("jetpack7", "strong", "fp32", "fp16", "int8-fp16"),
    ("tensorrt11", "strong", "fp32", "fp16", "int8-fp16"),
    ("deepstream-dgpu", "strong", "fp32", "fp16", "int8-fp16"),
    ("deepstream-dgpu", "weak", "fp32", "fp32", "int8"),
    ("triton", "strong", "fp32", "fp16", "int8-fp16"),
    ("triton", "weak", "fp32", "fp32", "int8"),
]


def feed(content: bytes, target: Target) -> bytes:
    """The file with the input that the target takes; a Cast to float of float32 is one too."""
    proto = onnx.load_model_from_string(content)
    if not target.takes_uint8:
        proto.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
    return bytes(proto.SerializeToString())


@pytest.mark.parametrize(("name", "typing", "fp32", "fp16", "int8"), TAKEN)
def test_each_target_takes_its_files(
    tiny_files: Callable[[str], bytes],
    trt_operators: dict[str, Any],
    name: str,
    typing: Any,
    fp32: str,
    fp16: str,
    int8: str,
) -> None:
    target = TARGETS[name]
    kinds = [target.file_for(each, typing=typing) for each in ("fp32", "fp16", "int8")]
    assert kinds == [fp32, fp16, int8]
    if typing == target.typings[0]:
        assert kinds == [target.file_for(each) for each in ("fp32", "fp16", "int8")]
    for kind in set(kinds):
        content = feed(tiny_files(kind), target)
        check_file(content, target, typing=typing)
        for version in target.tensorrt:
            assert not list_unknown(content, trt_operators[LISTS.get(version, version)])


def list_unknown(content: bytes, known: dict[str, Any]) -> list[str]:
    """What of a file a TensorRT does not list: its opset, operators, and their types."""
    proto = onnx.load_model_from_string(content)
    types = infer_types(proto)
    unknown = [f"opset {e.version}" for e in proto.opset_import if e.version > known["opset_max"]]
    for node in proto.graph.node:
        entry = known["ops"].get(node.op_type, {"supported": False, "types": []})
        element = TensorProto.DataType.Name(types[node.input[0]])
        element = NAMES.get(element, element)
        if known["opset_max"] == 17 and element == "INT64":
            element = "INT32"
        # The lists of 10.15 and later leave the types of the plainest operators out.
        if not entry["supported"] or (entry["types"] and element not in entry["types"]):
            unknown.append(f"{node.op_type} of {element}")
    return unknown


def test_list_unknown_would_find_an_uint8_input(
    tiny_files: Callable[[str], bytes], trt_operators: dict[str, Any]
) -> None:
    assert list_unknown(tiny_files("fp32"), trt_operators["8.5"]) == ["Cast of UINT8"]
    assert list_unknown(tiny_files("int8-fp16"), trt_operators["8.6"]) == ["opset 19"]


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_opsets_of_targets_are_those_of_their_tensorrt(
    trt_operators: dict[str, Any], target: Target
) -> None:
    limits = [trt_operators[LISTS.get(each, each)]["opset_max"] for each in target.tensorrt]
    assert target.max_opset == min(limits)


def test_targets_are_listed_by_their_names() -> None:
    assert list(TARGETS) == list(dict.fromkeys(row[0] for row in TAKEN))
    assert all(name == target.name for name, target in TARGETS.items())
    assert {(name, typing) for name, typing, *_ in TAKEN} == {
        (name, typing) for name, target in TARGETS.items() for typing in target.typings
    }


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8", "int8-fp16"])
def test_read_file_kind_reads_the_graph(tiny_files: Callable[[str], bytes], kind: str) -> None:
    assert read_file_kind(tiny_files(kind)) == kind


@pytest.mark.parametrize(
    ("name", "kind", "typing", "text"),
    [
        (
            "jetpack5",
            "int8-fp16",
            None,
            "jetpack5 has TensorRT 8.5 or 8.6, which reads opset 17 at",
        ),
        ("jetpack5", "fp16", None, "kinds fp32, int8 with weak typing, and this one is fp16"),
        ("jetpack6", "int8", None, "kinds fp32, fp16, int8-fp16 with strong typing, and this one"),
        ("jetpack6", "fp16", "weak", "kinds fp32, int8 with weak typing, and this one is fp16"),
        ("jetpack7", "int8", None, "jetpack7 takes files of the kinds fp32, fp16, int8-fp16"),
        ("jetpack7", "fp32", "weak", "jetpack7 .* builds with strong typing, not weak"),
        ("tensorrt11", "fp32", "weak", r"tensorrt11 \(TensorRT 11.x\) builds with strong typing"),
        (
            "jetpack5",
            "fp32",
            "strong",
            r"\(TensorRT 8.5, 8.6\) builds with weak typing, not strong",
        ),
    ],
)
def test_check_file_refuses_what_a_target_cannot_build(
    tiny_files: Callable[[str], bytes], name: str, kind: str, typing: Any, text: str
) -> None:
    target = TARGETS[name]
    with pytest.raises(ExportError, match=text):
        check_file(feed(tiny_files(kind), target), target, typing=typing)


@pytest.mark.parametrize("name", ["jetpack5", "deepstream-dgpu"])
def test_check_file_refuses_an_uint8_input_that_cannot_be_fed(
    tiny_files: Callable[[str], bytes], name: str
) -> None:
    with pytest.raises(ExportError, match=f"{name} cannot feed an uint8 input: export with float"):
        check_file(tiny_files("fp32"), TARGETS[name])


@pytest.mark.parametrize(
    ("name", "typing", "precision", "flags"),
    [
        ("jetpack5", None, "fp32", ()),
        ("jetpack5", None, "fp16", ("--fp16",)),
        ("jetpack5", None, "int8", ("--int8", "--fp16")),
        ("jetpack6", None, "int8", ("--stronglyTyped",)),
        ("jetpack6", "weak", "int8", ("--int8", "--fp16")),
        ("jetpack7", None, "fp16", ("--stronglyTyped",)),
        ("tensorrt11", None, "int8", ()),
        ("triton", None, "fp32", ("--stronglyTyped",)),
    ],
)
def test_trtexec_flags_say_how_types_are_chosen(
    name: str, typing: Any, precision: Any, flags: tuple[str, ...]
) -> None:
    assert TARGETS[name].trtexec_flags(precision, typing=typing) == flags


def test_trtexec_flags_keep_decoding_in_float32_when_the_builder_chooses() -> None:
    nodes = ("exp", "sigmoid")
    constraints = ("--precisionConstraints=obey", "--layerPrecisions=exp:fp32,sigmoid:fp32")
    jetpack5, jetpack6 = TARGETS["jetpack5"], TARGETS["jetpack6"]
    assert jetpack5.trtexec_flags("fp16", float32_nodes=nodes) == ("--fp16", *constraints)
    assert jetpack6.trtexec_flags("int8", typing="weak", float32_nodes=nodes) == (
        "--int8",
        "--fp16",
        *constraints,
    )
    # Nothing to choose: all float32, or written in the file.
    assert jetpack5.trtexec_flags("fp32", float32_nodes=nodes) == ()
    assert jetpack6.trtexec_flags("fp16", float32_nodes=nodes) == ("--stronglyTyped",)


def test_trtexec_flags_refuse_a_typing_that_is_not_there() -> None:
    with pytest.raises(ExportError, match=r"jetpack7 .* builds with strong typing, not weak"):
        TARGETS["jetpack7"].trtexec_flags("fp16", typing="weak")
