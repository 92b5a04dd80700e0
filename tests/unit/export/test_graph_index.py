"""Walks over small graphs that are drawn beside them."""

from __future__ import annotations

import pytest
from onnx import GraphProto, ModelProto, TensorProto, helper

from retinaray.errors import ExportError
from retinaray.export.graph_index import index_graph, infer_types, load_graph


@pytest.fixture
def diamond() -> GraphProto:
    """A graph of five nodes.

    x -> 0 Relu -> a -> 1 Exp -> b -> 3 Add -> d -> 4 Relu -> y
                   a -> 2 Mul -> c -> 3          (2 takes a twice, 3 takes the constant k too)
    """
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Exp", ["a"], ["b"]),
        helper.make_node("Mul", ["a", "a"], ["c"]),
        helper.make_node("Sum", ["b", "c", "k"], ["d"]),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    constant = helper.make_tensor("k", TensorProto.FLOAT, [2], [1.0, 2.0])
    return helper.make_graph(nodes, "g", values[:1], values[1:], [constant])


def test_index_graph_finds_makers_and_takers(diamond: GraphProto) -> None:
    index = index_graph(diamond)
    assert dict(index.makers) == {"a": 0, "b": 1, "c": 2, "d": 3, "y": 4}
    assert dict(index.takers) == {"x": [0], "a": [1, 2], "b": [3], "c": [3], "k": [3], "d": [4]}
    assert set(index.constants) == {"k"}
    assert index.list_nodes("Relu", "Mul") == [0, 2, 4]
    assert (index.list_sources(3), index.list_targets(0)) == ([1, 2], [1, 2])


def test_find_sources_and_targets_follow_all_ways(diamond: GraphProto) -> None:
    index = index_graph(diamond)
    assert index.find_sources([3]) == {0, 1, 2, 3}
    assert index.find_targets([1]) == {1, 3, 4}
    assert index.find_targets([]) == set()


def test_find_targets_stops_at_what_does_not_pass(diamond: GraphProto) -> None:
    index = index_graph(diamond)
    # Mul does not pass, so that Sum is reached by Exp only; the start need not pass.
    assert index.find_targets([0], passes=lambda node: node.op_type != "Mul") == {0, 1, 3, 4}
    assert index.find_sources([4], passes=lambda node: node.op_type == "Relu") == {4}


def test_infer_types_knows_every_tensor(diamond: GraphProto) -> None:
    types = infer_types(helper.make_model(diamond))
    assert types == dict.fromkeys("xabcdky", TensorProto.FLOAT)


def test_infer_types_refuses_types_that_do_not_fit() -> None:
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
        helper.make_tensor_value_info("h", TensorProto.FLOAT16, [2]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [2]),
    ]
    node = helper.make_node("Add", ["x", "h"], ["y"], name="sum")
    model: ModelProto = helper.make_model(helper.make_graph([node], "g", values[:2], values[2:]))
    with pytest.raises(ExportError, match=r"(?s)the types of the ONNX graph do not fit .*sum"):
        infer_types(model)


def test_load_graph_refuses_what_is_no_onnx() -> None:
    with pytest.raises(ExportError, match=r"not a readable ONNX file \(9 bytes\)"):
        load_graph(b"\xff" * 9)
