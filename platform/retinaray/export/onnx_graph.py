"""A trained detector as one ONNX file: standard operators, opset 17, no NMS, metadata inside.

Normalisation is the first operation of the graph and the boxes leave it decoded, so that no runtime
has anything of its own to get wrong.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from retinaray.artifact import ModelCard
from retinaray.detector.anchors import make_anchors
from retinaray.detector.postprocess import select_candidates
from retinaray.detector.retinanet import RetinaNet
from retinaray.errors import ExportError
from retinaray.export.operators import MAX_TOP_K, find_foreign_nodes
from retinaray.inference.onnx_contract import INPUT_NAME, OUTPUT_NAMES

if TYPE_CHECKING:
    import onnx

# TensorRT 8.5 to 11 read opset 17.
OPSET = 17
# The format that came with each opset; runtimes as old as that refuse newer ones.
IR_VERSIONS = {17: 8, 18: 8, 19: 9}
# The lowest that torch's exporter writes. Its own conversion downwards gives up, with a mere
# warning, on a network that averages in two places.
_TRACED_OPSET = 18
# What these operators gained in opset 18, with the values that mean the same as before.
_GAINED_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "Resize": {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"},
    "ReduceMax": {"noop_with_empty_axes": 0},
    "ReduceMean": {"noop_with_empty_axes": 0},
}
AXES_MOVED = frozenset(["ReduceMax", "ReduceMean"])

InputType = Literal["uint8", "float32"]


@dataclass(frozen=True)
class ExportSettings:
    """What to write.

    Attributes:
        canvas: Network height and width.
        input_type: `uint8` for batch inference, `float32` for DeepStream; RGB 0..255 either way.
        top_k: Candidates per image, at most MAX_TOP_K; fewer where there are not as many anchors
            times classes.
        fixed_batch: The only batch size that the file takes; none = any.
    """

    canvas: tuple[int, int]
    input_type: InputType = "uint8"
    top_k: int = 1000
    fixed_batch: int | None = None


class ExportedDetector(nn.Module):
    """The graph that is exported: pixels in, candidates out.

    Args:
        model: The trained network.
        settings: Canvas and number of candidates.
    """

    def __init__(self, model: RetinaNet, settings: ExportSettings) -> None:
        super().__init__()
        self.model = _unfreeze_norms(model)
        self._height, self._width = settings.canvas
        self._top_k = settings.top_k
        anchors = make_anchors(model.anchor_spec, *settings.canvas)
        self.anchors_xyxy: Tensor
        self.register_buffer("anchors_xyxy", anchors, persistent=False)

    def forward(
        self, images: UInt8[Tensor, "N 3 H W"] | Float[Tensor, "N 3 H W"]
    ) -> tuple[Float[Tensor, "N D 4"], Float[Tensor, "N D"], Int[Tensor, "N D"]]:
        """Boxes xyxy in network pixels, scores and labels, by falling score."""
        logits, deltas = self.model(images)
        return select_candidates(
            logits,
            deltas,
            self.anchors_xyxy,
            height=self._height,
            width=self._width,
            top_k=self._top_k,
        )


def export_onnx(model: RetinaNet, card: ModelCard, settings: ExportSettings) -> bytes:
    """Write a network as ONNX.

    Args:
        model: The trained network, on the CPU in evaluation mode.
        card: Travels in the file's metadata, with the exported canvas.
        settings: What to write.

    Returns:
        The file's content: input `images` [N, 3, H, W]; outputs `boxes` [N, D, 4] float32 xyxy in
        network pixels, `scores` [N, D] float32 and `labels` [N, D] int32; N is free, or fixed, and
        no other axis is free.

    Raises:
        ExportError: If the exporter or the ONNX checker refuses, or the graph does not keep the
            contract.
    """
    import onnx

    if not 1 <= settings.top_k <= MAX_TOP_K:
        raise ExportError(
            f"top_k={settings.top_k}: expected 1 to {MAX_TOP_K} candidates; TensorRT takes no more"
        )
    if settings.fixed_batch is not None and settings.fixed_batch < 1:
        raise ExportError(
            f"fixed_batch={settings.fixed_batch}: expected at least 1, or none for any batch"
        )
    program = _trace(ExportedDetector(model, settings).eval(), settings)
    buffer = io.BytesIO()
    program.save(buffer)
    proto = onnx.load_model_from_string(buffer.getvalue())
    _lower_opset(proto)
    for key, value in replace(card, canvas=settings.canvas).to_metadata().items():
        proto.metadata_props.add(key=key, value=value)
    set_batch(proto, settings.fixed_batch)
    check_contract(proto)
    return bytes(proto.SerializeToString())


def _unfreeze_norms(model: RetinaNet) -> RetinaNet:
    """A copy whose frozen batch norms are plain ones, which the exporter folds into convolutions.

    It leaves a frozen one as a multiplication and an addition after each convolution, which cost
    time, and stand between a convolution and its INT8 output.
    """
    if not any(isinstance(module, FrozenBatchNorm2d) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, FrozenBatchNorm2d):
                norm = nn.BatchNorm2d(len(child.weight), eps=child.eps)
                norm.load_state_dict(child.state_dict(), strict=False)
                setattr(parent, name, norm.eval())
    return model


def _divide_integers(dividend: Any, divisor: int, *, rounding_mode: str) -> Any:
    """Truncating division as one operator.

    torch's exporter goes through a float division, whose last bit an accelerator may round another
    way: the pair (row, class 0) would then read as the row before, and a class that does not exist.
    """
    from onnxscript import opset18

    if rounding_mode != "trunc":
        raise ExportError(f"division with rounding_mode={rounding_mode!r}: expected 'trunc'")
    return opset18.Div(dividend, opset18.Constant(value_int=divisor))


def _trace(detector: ExportedDetector, settings: ExportSettings) -> Any:
    """The exporter's program for a free batch size."""
    dtype = torch.uint8 if settings.input_type == "uint8" else torch.float32
    # Two images: the exporter specialises on a batch of one.
    example = torch.zeros(2, 3, *settings.canvas, dtype=dtype)
    try:
        with warnings.catch_warnings(), _quiet("torch.onnx"), _quiet("onnxscript"):
            # The exporter warns and logs about its own internals.
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                detector,
                (example,),
                dynamo=True,
                opset_version=_TRACED_OPSET,
                input_names=[INPUT_NAME],
                output_names=list(OUTPUT_NAMES),
                dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1, max=1024)}},
                custom_translation_table={torch.ops.aten.div.Tensor_mode: _divide_integers},
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        raise ExportError(f"torch's ONNX exporter failed: {error}") from error


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    exporter_logger = logging.getLogger(name)
    level = exporter_logger.level
    exporter_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        exporter_logger.setLevel(level)


def _lower_opset(proto: onnx.ModelProto) -> None:
    """Write a graph of opset 18 as opset 17, which says the same in other places.

    What is not known here stays, and `check_contract` refuses it.
    """
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        gained = _GAINED_ATTRIBUTES.get(node.op_type, {})
        kept = [
            attribute
            for attribute in node.attribute
            if gained.get(attribute.name) != helper.get_attribute_value(attribute)
        ]
        if node.op_type in AXES_MOVED and len(node.input) == 2:
            axes = numpy_helper.to_array(constants[node.input.pop()]).tolist()
            kept.append(helper.make_attribute("axes", axes))
        del node.attribute[:]
        node.attribute.extend(kept)
        # Notes of the exporter's optimizer, which IR version 8 does not know.
        del node.metadata_props[:]
    used = {name for node in proto.graph.node for name in node.input}
    for tensor in [tensor for tensor in proto.graph.initializer if tensor.name not in used]:
        proto.graph.initializer.remove(tensor)
    for entry in proto.opset_import:
        if entry.domain == "" and entry.version == _TRACED_OPSET:
            entry.version = OPSET
    proto.ir_version = IR_VERSIONS[OPSET]


def set_batch(proto: onnx.ModelProto, batch: int | None) -> None:
    """Fix the batch size of a file, or free it with none; the operators serve both."""
    # Sizes of inner tensors, which every reader infers anew.
    del proto.graph.value_info[:]
    for value in (*proto.graph.input, *proto.graph.output):
        axis = value.type.tensor_type.shape.dim[0]
        if batch is None:
            axis.dim_param = "N"
        else:
            axis.dim_value = batch


def check_contract(proto: onnx.ModelProto, *, opset: int = OPSET) -> None:
    """Hold an ONNX file to the contract.

    Args:
        proto: The whole model.
        opset: The one it must have.

    Raises:
        ExportError: If the checker refuses it, an operator or its type is none that every TensorRT
            takes, the opset is another, or a shape other than the batch is free; names the nodes.
    """
    import onnx

    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the ONNX checker refuses the exported file: {error}") from error
    faults = []
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    if opsets.get("") != opset:
        faults.append(f"opset {opsets.get('')} instead of {opset}")
    if proto.functions:
        faults.append("operators outside the standard: local functions")
    faults += find_foreign_nodes(proto)
    for label, values, expected in (
        ("inputs", proto.graph.input, (INPUT_NAME,)),
        ("outputs", proto.graph.output, OUTPUT_NAMES),
    ):
        names = tuple(value.name for value in values)
        if names != expected:
            faults.append(f"{label} {names} instead of {expected}")
    for value in (*proto.graph.input, *proto.graph.output):
        if not all(axis.dim_value > 0 for axis in value.type.tensor_type.shape.dim[1:]):
            faults.append(f"{value.name} has a free axis besides the batch")
    if faults:
        raise ExportError(f"the exported file does not keep its contract: {'; '.join(faults)}")
