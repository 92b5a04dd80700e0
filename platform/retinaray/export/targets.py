"""Where exported files are built into engines: which file each place takes, and with which flags.

Weak typing (TensorRT 8, and 10 on request) chooses types while it builds and takes float32 types;
strong typing (10 on request, 11 always) builds the types that the file has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from retinaray.errors import ExportError
from retinaray.export.graph_index import load_graph
from retinaray.inference.onnx_contract import Precision, read_precision

FileKind = Literal["fp32", "fp16", "int8", "int8-fp16"]
"""Types of a file: float32, float16, Q/DQ with float32 scales, Q/DQ with all else in float16."""
Typing = Literal["weak", "strong"]

_WEAK_FILES: Mapping[Precision, FileKind] = {"fp32": "fp32", "fp16": "fp32", "int8": "int8"}
_STRONG_FILES: Mapping[Precision, FileKind] = {"fp32": "fp32", "fp16": "fp16", "int8": "int8-fp16"}
# An INT8 build needs float16 too, or all that is not INT8 stays float32.
_WEAK_FLAGS: Mapping[Precision, tuple[str, ...]] = {
    "fp32": (),
    "fp16": ("--fp16",),
    "int8": ("--int8", "--fp16"),
}


@dataclass(frozen=True)
class Target:
    """A place where engines are built.

    Attributes:
        name: As on the command line.
        description: What it is.
        tensorrt: TensorRT versions that it may have.
        max_opset: Highest ONNX opset that all of them read.
        typings: What it can build, the first by default.
        strong_flags: Of trtexec, for strong typing.
        takes_uint8: Whether a file with uint8 input can be used.
        deepstream: DeepStream versions that belong to it; empty = none.
    """

    name: str
    description: str
    tensorrt: tuple[str, ...]
    max_opset: int
    typings: tuple[Typing, ...]
    strong_flags: tuple[str, ...] = ()
    takes_uint8: bool = True
    deepstream: tuple[str, ...] = ()

    def file_for(self, precision: Precision, *, typing: Typing | None = None) -> FileKind:
        """The file that it takes for a precision.

        Raises:
            ExportError: If it cannot build with that typing.
        """
        chosen = self._choose_typing(typing)
        return (_WEAK_FILES if chosen == "weak" else _STRONG_FILES)[precision]

    def trtexec_flags(
        self,
        precision: Precision,
        *,
        typing: Typing | None = None,
        float32_nodes: Sequence[str] = (),
    ) -> tuple[str, ...]:
        """What trtexec needs for that file besides names, shapes and memory.

        Args:
            precision: What the engine should compute in.
            typing: None = the target's first.
            float32_nodes: See `mixed_precision.list_float32_nodes`; only weak typing needs to be
                told, which would otherwise decode boxes in float16 where that is faster.

        Raises:
            ExportError: If it cannot build with that typing.
        """
        if self._choose_typing(typing) == "strong":
            return self.strong_flags
        if precision == "fp32" or not float32_nodes:
            return _WEAK_FLAGS[precision]
        layers = ",".join(f"{name}:fp32" for name in float32_nodes)
        constraints = ("--precisionConstraints=obey", f"--layerPrecisions={layers}")
        return (*_WEAK_FLAGS[precision], *constraints)

    def check_opset(self, opset: int, *, what: str) -> None:
        """Refuse a file that its TensorRT cannot read.

        Args:
            opset: Of the file.
            what: The file, for the message.

        Raises:
            ExportError: If the opset is too high.
        """
        if opset > self.max_opset:
            raise ExportError(
                f"{self.name} has TensorRT {' or '.join(self.tensorrt)}, which reads opset "
                f"{self.max_opset} at most, and {what} has opset {opset}: give it a file of "
                f"opset {self.max_opset}, as `retinaray export` writes for it"
            )

    def _choose_typing(self, typing: Typing | None) -> Typing:
        chosen = typing or self.typings[0]
        if chosen not in self.typings:
            raise ExportError(
                f"{self.name} (TensorRT {', '.join(self.tensorrt)}) builds with "
                f"{' or '.join(self.typings)} typing, not {chosen}"
            )
        return chosen


_ALL = (
    Target(
        name="jetpack5",
        description="JetPack 5: Xavier and Orin",
        tensorrt=("8.5", "8.6"),
        max_opset=17,
        typings=("weak",),
        # 8.6 could; the Cast of 8.5 takes none.
        takes_uint8=False,
        deepstream=("6.2", "6.3"),
    ),
    Target(
        name="jetpack6",
        description="JetPack 6.1 and 6.2: Orin",
        tensorrt=("10.3",),
        max_opset=20,
        # Whether its strong typing is complete has not been seen on a device.
        typings=("strong", "weak"),
        strong_flags=("--stronglyTyped",),
        deepstream=("7.1",),
    ),
    Target(
        name="jetpack7",
        description="JetPack 7: Thor, and Orin from 7.2",
        tensorrt=("10.13", "10.16"),
        # No list of 10.13 is known; this is what 10.3 reads already.
        max_opset=20,
        typings=("strong",),
        strong_flags=("--stronglyTyped",),
        deepstream=("8.0", "9.0", "9.1", "9.2"),
    ),
    Target(
        name="tensorrt11",
        description="TensorRT 11 on a server, or on JetPack from 7.2.2",
        tensorrt=("11.x",),
        max_opset=24,
        typings=("strong",),
    ),
    Target(
        name="deepstream-dgpu",
        description="DeepStream on a graphics card",
        tensorrt=("10.3", "10.16"),
        max_opset=20,
        typings=("strong", "weak"),
        strong_flags=("--stronglyTyped",),
        # nvinfer hands planar float32 over.
        takes_uint8=False,
        deepstream=("7.1", "8.0", "9.0", "9.1", "9.2"),
    ),
    Target(
        name="triton",
        description="Triton Inference Server",
        tensorrt=("10.3", "10.16"),
        max_opset=20,
        typings=("strong", "weak"),
        strong_flags=("--stronglyTyped",),
    ),
)
TARGETS: Mapping[str, Target] = MappingProxyType({target.name: target for target in _ALL})
"""Every target by its name."""


def read_file_kind(content: bytes) -> FileKind:
    """Types of an exported file, from its graph.

    Raises:
        ExportError: If it is not ONNX.
    """
    import onnx

    precision = read_precision(content)
    if precision != "int8":
        return precision
    tensors = load_graph(content).graph.initializer
    is_half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in tensors)
    return "int8-fp16" if is_half else "int8"


def check_file(content: bytes, target: Target, *, typing: Typing | None = None) -> None:
    """Refuse a file that a target cannot build or feed.

    Args:
        content: An exported file.
        target: Where it would be built.
        typing: None = the target's first.

    Raises:
        ExportError: If its opset is too high, its input is uint8 where that cannot be fed, or its
            types are those of the other typing.
    """
    import onnx

    proto = load_graph(content)
    opset = max(entry.version for entry in proto.opset_import if entry.domain == "")
    target.check_opset(opset, what="this file")
    is_uint8 = proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    if is_uint8 and not target.takes_uint8:
        raise ExportError(
            f"{target.name} cannot feed an uint8 input: export with float32 input for it"
        )
    kind = read_file_kind(content)
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "int8")
    taken = dict.fromkeys(target.file_for(precision, typing=typing) for precision in precisions)
    if kind not in taken:
        raise ExportError(
            f"{target.name} takes files of the kinds {', '.join(taken)} with "
            f"{typing or target.typings[0]} typing, and this one is {kind}"
        )
