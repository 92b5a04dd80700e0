"""Who makes and who takes each tensor of an ONNX graph, and of which type it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retinaray.errors import ExportError

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class GraphIndex:
    """A graph, looked up by tensor. It does not follow later changes of the graph.

    Attributes:
        nodes: The graph's nodes, each after the makers of its inputs.
        makers: Tensor name to the index of the node that makes it.
        takers: Tensor name to the indices of the nodes that take it, each once, rising.
        constants: The graph's initializers by name.
    """

    nodes: Sequence[onnx.NodeProto]
    makers: Mapping[str, int]
    takers: Mapping[str, Sequence[int]]
    constants: Mapping[str, onnx.TensorProto]

    def list_sources(self, node: int) -> list[int]:
        """Indices of the nodes that make a node's inputs."""
        return [self.makers[name] for name in self.nodes[node].input if name in self.makers]

    def list_targets(self, node: int) -> list[int]:
        """Indices of the nodes that take a node's outputs."""
        return [taker for name in self.nodes[node].output for taker in self.takers.get(name, ())]

    def find_sources(
        self, starts: Iterable[int], passes: Callable[[onnx.NodeProto], bool] | None = None
    ) -> set[int]:
        """The starts, and all nodes that they depend on.

        Args:
            starts: Where to begin.
            passes: Of a node that does not pass neither it nor what is behind it is listed.
        """
        return self._spread(starts, self.list_sources, passes)

    def find_targets(
        self, starts: Iterable[int], passes: Callable[[onnx.NodeProto], bool] | None = None
    ) -> set[int]:
        """The starts, and all nodes that depend on them; `passes` as in `find_sources`."""
        return self._spread(starts, self.list_targets, passes)

    def _spread(
        self,
        starts: Iterable[int],
        neighbours: Callable[[int], list[int]],
        passes: Callable[[onnx.NodeProto], bool] | None,
    ) -> set[int]:
        found, waiting = set(starts), list(starts)
        while waiting:
            for node in neighbours(waiting.pop()):
                if node not in found and (passes is None or passes(self.nodes[node])):
                    found.add(node)
                    waiting.append(node)
        return found

    def list_nodes(self, *operators: str) -> list[int]:
        """Indices of the nodes with one of these operators."""
        return [index for index, node in enumerate(self.nodes) if node.op_type in operators]


def index_graph(graph: onnx.GraphProto) -> GraphIndex:
    """Look a graph up by tensor; its nodes must be in order, as ONNX asks for."""
    takers: dict[str, list[int]] = defaultdict(list)
    for index, node in enumerate(graph.node):
        for name in dict.fromkeys(node.input):
            takers[name].append(index)
    return GraphIndex(
        nodes=list(graph.node),
        makers={name: index for index, node in enumerate(graph.node) for name in node.output},
        takers=dict(takers),
        constants={tensor.name: tensor for tensor in graph.initializer},
    )


def infer_types(proto: onnx.ModelProto) -> dict[str, int]:
    """Element type (`onnx.TensorProto.DataType`) of every tensor.

    Raises:
        ExportError: If types or shapes contradict each other.
    """
    import onnx

    try:
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(f"the types of the ONNX graph do not fit together: {error}") from error
    graph = inferred.graph
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def load_graph(content: bytes) -> onnx.ModelProto:
    """Parse a file.

    Raises:
        ExportError: If it is not ONNX.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load_model_from_string(content)
    except DecodeError as error:
        raise ExportError(f"not a readable ONNX file ({len(content)} bytes): {error}") from error
