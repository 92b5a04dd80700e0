"""An exported file built and run by TensorRT, 10.3 to 11.x, on an NVIDIA GPU.

The engine is built from the ONNX file when a worker starts: a built engine fits one TensorRT
version and one kind of GPU only. Names and their absence per version are checked by a test against
the bindings' own lists.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from retinaray.detector.postprocess import Detections
from retinaray.errors import InferenceError
from retinaray.inference.onnx_contract import INPUT_NAME, OUTPUT_NAMES, read_onnx_card
from retinaray.inference.predictor import PredictorSettings, Suppressor, check_canvas

logger = logging.getLogger(__name__)

_WORKSPACE_BYTES = 4 << 30


def load_tensorrt_predictor(
    content: bytes, *, uri: str, settings: PredictorSettings
) -> TensorRtPredictor:
    """Build an exported file for this GPU.

    Raises:
        CheckpointError: If the file is not one of ours.
        InferenceError: If there is no GPU or no TensorRT, or it refuses the file.
    """
    # A TensorRT object made without a driver can take the whole process down, so this comes first.
    if not torch.cuda.is_available():
        raise InferenceError(
            "backend 'tensorrt' needs an NVIDIA GPU with CUDA, and torch sees none here: "
            "run with --backend openvino"
        )
    try:
        import tensorrt as trt
    except ImportError as error:
        raise InferenceError(
            "backend 'tensorrt' needs the tensorrt package: pip install 'retinaray[tensorrt]' "
            "on a machine "
            "that reaches NVIDIA's package index, or run with --backend openvino"
        ) from error
    card, _ = read_onnx_card(content, uri=uri)
    check_canvas(settings.canvas, card.canvas, uri)
    plan = build_plan(trt, content, batch=settings.batch, canvas=card.canvas)
    return TensorRtPredictor(trt, plan, content=content, uri=uri, settings=settings)


def build_plan(trt: Any, content: bytes, *, batch: int, canvas: tuple[int, int]) -> bytes:
    """Build an engine for one batch size.

    Args:
        trt: The tensorrt module (or tensorrt_rtx, which has the same builder).
        content: The ONNX file; its own types decide the precision.
        batch: Images per call, 1 to batch; tuned for the full batch.
        canvas: Height and width.

    Returns:
        The serialized engine.

    Raises:
        InferenceError: If the parser or the builder refuses; the text names node and reason.
    """
    trt_logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(trt_logger)
    # Required by 10.x, accepted and ignored by 11.x. The enum's value moved between them: never a
    # number.
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, trt_logger)
    if not parser.parse(content):
        faults = [parser.get_error(index) for index in range(parser.num_errors)]
        lines = [
            f"{fault.node_name()} ({fault.node_operator()}): {fault.desc()}" for fault in faults
        ]
        raise InferenceError(f"TensorRT cannot read the exported file: {'; '.join(lines)}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE_BYTES)
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT_NAME, (1, 3, *canvas), (batch, 3, *canvas), (batch, 3, *canvas))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise InferenceError(
            "TensorRT could not build an engine (its log above says why): a smaller --batch "
            "needs less memory"
        )
    return bytes(plan)


class TensorRtPredictor:
    """Runs a built engine on the current GPU, on a stream of its own.

    Args:
        trt: The tensorrt module.
        plan: Serialized engine.
        content: The ONNX file that it was built from.
        uri: Its name, for messages.
        settings: How to run it.

    Raises:
        InferenceError: If the engine does not load here.
    """

    backend = "tensorrt"

    def __init__(
        self, trt: Any, plan: bytes, *, content: bytes, uri: str, settings: PredictorSettings
    ) -> None:
        self.card, input_type = read_onnx_card(content, uri=uri)
        self.canvas = self.card.canvas
        self._batch = settings.batch
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise InferenceError(f"{uri}: the engine does not load with TensorRT {trt.__version__}")
        self._context = self._engine.create_execution_context()
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        input_dtype = torch.uint8 if input_type == "uint8" else torch.float32
        self._staging = torch.empty(
            (self._batch, 3, *self.canvas), dtype=torch.uint8, pin_memory=True
        )
        self._buffers: dict[str, Tensor] = {
            INPUT_NAME: torch.zeros(
                (self._batch, 3, *self.canvas), dtype=input_dtype, device="cuda"
            )
        }
        self._context.set_input_shape(INPUT_NAME, (self._batch, 3, *self.canvas))
        missing = self._context.infer_shapes()
        if missing:
            raise InferenceError(f"{uri}: TensorRT needs the shapes of {missing}")
        for name in OUTPUT_NAMES:
            shape = tuple(self._context.get_tensor_shape(name))
            dtype = torch.int32 if name == "labels" else torch.float32
            self._buffers[name] = torch.empty(shape, dtype=dtype, device="cuda")
        for name, buffer in self._buffers.items():
            self._context.set_tensor_address(name, buffer.data_ptr())
        self._suppress = Suppressor(self.card, settings)

    @torch.inference_mode()
    def predict(self, images: UInt8[Tensor, "N 3 H W"]) -> list[Detections]:
        """Detections of each image in network pixels, on the CPU; N at most the batch."""
        count = images.shape[0]
        self._staging[:count] = images
        with self._on_stream():
            self._buffers[INPUT_NAME][:count].copy_(self._staging[:count], non_blocking=True)
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise InferenceError("TensorRT failed to run the engine; its log above says why")
            return self._suppress(*(self._buffers[name][:count] for name in OUTPUT_NAMES))

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        # The default stream would make TensorRT synchronise the device around every call.
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()
