"""The table of permitted operators, against NVIDIA's own lists, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, load_model_from_string, numpy_helper

from retinaray.export.graph_index import infer_types
from retinaray.export.operators import MAX_TOP_K, PERMITTED_OPERATORS, find_foreign_nodes

# As NVIDIA writes ONNX's types.
NAMES = {"FLOAT": "FP32", "FLOAT16": "FP16"}
VERSIONS = ("8.5", "8.6", "10.3", "10.16", "11.x")


@pytest.mark.parametrize("version", VERSIONS)
def test_tensorrt_takes_every_permitted_operator_and_type(
    trt_operators: dict[str, Any], version: str
) -> None:
    known = trt_operators[version]["ops"]
    refused = []
    for operator, elements in PERMITTED_OPERATORS.items():
        entry = known.get(operator, {"supported": False, "types": []})
        types = set(entry["types"])
        for element in elements:
            name = NAMES.get(element, element)
            if version.startswith("8") and element == "INT64":
                name = "INT32"  # TensorRT 8 has no INT64 and narrows it while it reads.
            # The lists of 10.15 and later leave the types of the plainest operators out.
            if not entry["supported"] or (types and name not in types):
                refused.append((operator, element))
    # 8.5 has an uint8 Cast in none of its lists; `targets` gives it no file with uint8 input.
    assert refused == ([("Cast", "UINT8")] if version == "8.5" else [])


def test_every_permitted_operator_is_used(export: Any) -> None:
    used = set()
    for kind in ("fp32", "int8-fp16"):
        proto = load_model_from_string(export.write(kind))
        types = infer_types(proto)
        names = TensorProto.DataType
        used |= {(node.op_type, names.Name(types[node.input[0]])) for node in proto.graph.node}
    permitted = {(name, kind) for name, kinds in PERMITTED_OPERATORS.items() for kind in kinds}
    assert used <= permitted
    # What this network has no use for, another of the three has.
    missing = {name for name, _ in permitted} - {name for name, _ in used}
    network = export.card.architecture
    is_mobile = network.backbone.startswith("MobileNet")
    expected = {"MaxPool"} if is_mobile else {"HardSigmoid", "HardSwish", "ReduceMean"}
    if network.norm != "gn":
        expected |= {"InstanceNormalization"}
    assert missing == expected


def test_find_foreign_nodes_finds_nothing_in_a_permitted_file(
    build_contract_file: Callable[..., bytes],
) -> None:
    content = build_contract_file([], {}, ends=("pixels", "pixels", "pixels"))
    assert find_foreign_nodes(load_model_from_string(content)) == []


@pytest.mark.parametrize("operator", ["Erf", "Floor", "Softmax"])
def test_find_foreign_nodes_names_node_and_operator(
    build_contract_file: Callable[..., bytes], operator: str
) -> None:
    node = helper.make_node(operator, ["pixels"], ["end"], name="here")
    content = build_contract_file([node], {}, ends=("end", "end", "end"))
    (fault,) = find_foreign_nodes(load_model_from_string(content))
    assert fault.startswith(f"node 'here' has the operator {operator}, which is none of the 31")


def test_find_foreign_nodes_refuses_decoding_in_float16(
    build_contract_file: Callable[..., bytes],
) -> None:
    nodes = [
        helper.make_node("Cast", ["pixels"], ["half"], name="down", to=TensorProto.FLOAT16),
        helper.make_node("Exp", ["half"], ["grown"], name="growth"),
        helper.make_node("Cast", ["grown"], ["end"], name="up", to=TensorProto.FLOAT),
    ]
    content = build_contract_file(nodes, {}, ends=("end", "end", "end"))
    faults = find_foreign_nodes(load_model_from_string(content))
    assert faults == ["node 'growth' (Exp) works on FLOAT16, permitted are FLOAT"]


@pytest.mark.parametrize(("count", "num_faults"), [(1, 0), (MAX_TOP_K, 0), (MAX_TOP_K + 1, 1)])
def test_find_foreign_nodes_limits_top_k(count: int, num_faults: int) -> None:
    graph = helper.make_graph(
        [helper.make_node("TopK", ["images", "k"], ["values", "indices"], name="pick")],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 6000])],
        [helper.make_tensor_value_info("values", TensorProto.FLOAT, [1, count])],
        [numpy_helper.from_array(np.array([count]), "k")],
    )
    faults = find_foreign_nodes(helper.make_model(graph))
    assert len(faults) == num_faults
    if faults:
        assert faults == [
            "node 'pick' (TopK) takes 3840 values, permitted are 1 to 3839 as a constant"
        ]


def test_find_foreign_nodes_refuses_a_computed_top_k() -> None:
    graph = helper.make_graph(
        [helper.make_node("TopK", ["images", "k"], ["values", "indices"], name="pick")],
        "g",
        [
            helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 6000]),
            helper.make_tensor_value_info("k", TensorProto.INT64, [1]),
        ],
        [helper.make_tensor_value_info("values", TensorProto.FLOAT, [1, "K"])],
    )
    faults = find_foreign_nodes(helper.make_model(graph))
    assert faults == [
        "node 'pick' (TopK) takes a computed number of values, permitted are 1 to 3839 as a "
        "constant"
    ]
