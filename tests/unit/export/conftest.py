from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from retinaray.artifact import ModelCard
from retinaray.detector.anchors import AnchorSpec
from retinaray.detector.retinanet import RetinaNet
from retinaray.export.calibration import CalibrationSettings
from retinaray.export.mixed_precision import to_fp16
from retinaray.export.nvidia_parser import is_nvidia_parser_available
from retinaray.export.onnx_graph import MAX_TOP_K, ExportSettings, export_onnx
from retinaray.export.quantization import quantize

Run = Callable[..., list[npt.NDArray[Any]]]


@dataclass(frozen=True)
class Export:
    """A network, how it was exported, and the file in every kind of types, each made once."""

    card: ModelCard
    model: RetinaNet
    settings: ExportSettings
    content: bytes
    images: Tensor
    written: dict[str, bytes] = field(default_factory=dict)

    def write(self, kind: str) -> bytes:
        """The file as `fp32`, `fp16`, `int8` or `int8-fp16`."""
        if kind not in self.written:
            self.written[kind] = self._write(kind)
        return self.written[kind]

    def _write(self, kind: str) -> bytes:
        if kind == "fp32":
            return self.content
        if kind == "int8":
            settings = CalibrationSettings(method="minmax")
            return quantize(self.content, [self.images], settings)
        return to_fp16(self.write("int8" if kind == "int8-fp16" else "fp32"))


@pytest.fixture(scope="session")
def get_export(
    make_tiny_card: Callable[..., ModelCard],
    make_lively_model: Callable[[ModelCard], RetinaNet],
    tiny_card: ModelCard,
    tiny_model: RetinaNet,
    tiny_onnx: bytes,
) -> Callable[[str], Export]:
    """Four networks that between them have every norm, backbone, level, input and convention."""

    def make(name: str) -> Export:
        if name == "gn":
            settings = ExportSettings(canvas=(64, 96))
            return Export(tiny_card, tiny_model, settings, tiny_onnx, make_noise(settings.canvas))
        if name == "head_norm":
            card = make_tiny_card(num_classes=2, head_depth=2, has_head_norm=True)
            settings = ExportSettings(canvas=(64, 64))
        elif name == "bn":
            anchors = AnchorSpec(convention="odtk")
            card = make_tiny_card(num_classes=1000, norm="bn", head_depth=0, anchors=anchors)
            settings = ExportSettings(
                canvas=(100, 133), input_type="float32", top_k=1500, fixed_batch=2
            )
        else:
            card = make_tiny_card(
                num_classes=1,
                backbone="MobileNetV3LargeFPN",
                norm="frozen_bn",
                head_depth=0,
                anchors=AnchorSpec(
                    ratios=(1.0,), strides=(4, 8, 16, 32, 64, 128), convention="odtk-legacy"
                ),
            )
            settings = ExportSettings(canvas=(64, 64), top_k=MAX_TOP_K)
        model, images = make_lively_model(card), make_noise(settings.canvas)
        fill_norms(model, images)
        return Export(card, model, settings, export_onnx(model, card, settings), images)

    return cache(make)


@pytest.fixture(scope="session", params=["gn", "bn", "mobilenet", "head_norm"])
def export(request: pytest.FixtureRequest, get_export: Callable[[str], Export]) -> Export:
    """Each of the four networks."""
    return get_export(request.param)


@pytest.fixture(scope="session")
def tiny_files(get_export: Callable[[str], Export]) -> Callable[..., bytes]:
    """The tiny network's file as `fp32`, `fp16`, `int8` or `int8-fp16`."""
    return get_export("gn").write


def make_noise(canvas: tuple[int, int]) -> Tensor:
    """Two images of noise."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (2, 3, *canvas), dtype=torch.uint8, generator=generator)


def fill_norms(model: RetinaNet, images: Tensor) -> None:
    """Give batch norms the statistics of these images, as training would.

    With the fresh ones the values of a deep network vanish, and with them what INT8 could lose.
    """

    def measure(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        norm.running_var.copy_(inputs[0].var((0, 2, 3), correction=0) + 0.01)

    kinds = (nn.BatchNorm2d, FrozenBatchNorm2d)
    norms = [module for module in model.modules() if isinstance(module, kinds)]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    with torch.no_grad():
        outputs = model(images)
        for head, values, spread in zip(
            (model.class_head, model.box_head), outputs, (2.0, 0.3), strict=True
        ):
            head.output.weight.mul_(spread / values.std())
    for hook in hooks:
        hook.remove()


@pytest.fixture(scope="session")
def run_file() -> Run:
    """Boxes, scores and labels of a file by ONNX Runtime, one thread."""

    def run(content: bytes, images: Tensor) -> list[npt.NDArray[Any]]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        # It writes biases as INT32 with scales that it multiplies in float16, where they vanish.
        session = onnxruntime.InferenceSession(
            content, options, disabled_optimizers=["WeightBiasQuantization"]
        )
        dtype = np.uint8 if session.get_inputs()[0].type == "tensor(uint8)" else np.float32
        feed = {"images": images.numpy().astype(dtype)}
        return list(session.run(["boxes", "scores", "labels"], feed))

    return run


@pytest.fixture(scope="session")
def run_openvino() -> Run:
    """Boxes, scores and labels of a file by OpenVINO in float32, one thread."""
    openvino = pytest.importorskip("openvino")

    def run(content: bytes, images: Tensor) -> list[npt.NDArray[Any]]:
        core = openvino.Core()
        model = core.read_model(content)
        names = [tensor.get_any_name() for tensor in model.outputs]
        config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        compiled = core.compile_model(model, "CPU", config)
        dtype = np.uint8 if model.inputs[0].element_type == openvino.Type.u8 else np.float32
        found = compiled([images.numpy().astype(dtype)])
        return [found[names.index(name)] for name in ("boxes", "scores", "labels")]

    return run


@pytest.fixture(scope="session")
def measure_best() -> Callable[..., tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """How far the 50 best boxes of each image lie from those of another run.

    measure_best(reference, found), both boxes, scores, labels: for each box the largest difference
    of a corner to the nearest box of the same label, and the difference of their scores.
    """

    def measure(
        reference: list[npt.NDArray[Any]], found: list[npt.NDArray[Any]]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        distances, differences = [], []
        for boxes, scores, labels, others, other_scores, other_labels in zip(
            *reference, *found, strict=True
        ):
            for box, score, label in zip(boxes[:50], scores[:50], labels[:50], strict=True):
                distance = np.abs(others - box).max(axis=1)
                distance[other_labels != label] = np.inf
                nearest = int(distance.argmin())
                distances.append(distance[nearest])
                differences.append(abs(other_scores[nearest] - score))
        return np.array(distances), np.array(differences)

    return measure


@pytest.fixture(scope="session")
def build_contract_file() -> Callable[..., bytes]:
    """A file that keeps the contract, around nodes of the caller's.

    build_contract_file(nodes, constants, ends): the nodes start at `pixels` (float32 [1, 3, 8, 8])
    and end at the tensors `ends`, which become boxes, scores and labels; all have its shape.
    """

    def build(
        nodes: list[onnx.NodeProto],
        constants: dict[str, npt.NDArray[Any]],
        *,
        ends: tuple[str, str, str],
        opset: int = 17,
    ) -> bytes:
        shape = (1, 3, 8, 8)
        last = [
            helper.make_node("Sub", [ends[0], "nothing"], ["boxes"], name="last.boxes"),
            helper.make_node("Sigmoid", [ends[1]], ["scores"], name="last.scores"),
            helper.make_node("Cast", [ends[2]], ["labels"], name="last.labels", to=6),
        ]
        outputs = [("boxes", 1), ("scores", 1), ("labels", 6)]
        constants = {**constants, "nothing": np.zeros((), np.float32)}
        graph = helper.make_graph(
            [helper.make_node("Cast", ["images"], ["pixels"], name="first", to=1), *nodes, *last],
            "g",
            [helper.make_tensor_value_info("images", TensorProto.UINT8, shape)],
            [helper.make_tensor_value_info(name, kind, shape) for name, kind in outputs],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset)],
            ir_version=8 if opset == 17 else 9,
        )
        helper.set_model_props(model, {"retinaray.canvas": "[8, 8]"})
        onnx.checker.check_model(model, full_check=True)
        return bytes(model.SerializeToString())

    return build


@pytest.fixture(scope="session")
def trt_operators(shared_data: Path) -> dict[str, Any]:
    """NVIDIA's operator lists, by TensorRT version."""
    import json

    path = shared_data.parent / "facts" / "trt_ops.json"
    if not path.is_file():
        pytest.skip(f"needs TensorRT's operator lists in {path}, which is absent")
    return dict(json.loads(path.read_text())["versions"])


@pytest.fixture(scope="session")
def nvidia_parser() -> None:
    """Skips without NVIDIA's parser."""
    if not is_nvidia_parser_available():
        pytest.skip(
            "needs NVIDIA's ONNX parser: pip install --no-deps tensorrt-rtx-cu13-libs "
            "tensorrt-rtx-cu13-bindings"
        )
