"""A network that computes nothing, for measuring all that is around one; no case of its own."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from retinaray.artifact import ModelCard


def make(card: ModelCard) -> bytes:
    """An exported file that finds nothing, at no cost."""
    nodes = [
        helper.make_node("Shape", ["images"], ["batch"], start=0, end=1),
        helper.make_node("Concat", ["batch", "one"], ["flat"], axis=0),
        helper.make_node("Concat", ["batch", "one", "four"], ["wide"], axis=0),
    ]
    outputs = []
    for name, shape, kind, axes in (
        ("boxes", "wide", TensorProto.FLOAT, ("N", 1, 4)),
        ("scores", "flat", TensorProto.FLOAT, ("N", 1)),
        ("labels", "flat", TensorProto.INT32, ("N", 1)),
    ):
        zero = helper.make_tensor("zero", kind, [1], [0])
        nodes.append(helper.make_node("ConstantOfShape", [shape], [name], value=zero))
        outputs.append(helper.make_tensor_value_info(name, kind, axes))
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 3, *card.canvas])
    constants = [
        numpy_helper.from_array(np.array([value], dtype=np.int64), name)
        for name, value in (("one", 1), ("four", 4))
    ]
    graph = helper.make_graph(nodes, "nothing", [images], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    for key, value in card.to_metadata().items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content
