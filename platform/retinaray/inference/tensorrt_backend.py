"""Detection by TensorRT, 10.3 to 11.x, on an NVIDIA GPU: from a plan, or from an ONNX file.

An ONNX file is built for this GPU when it is loaded. A plan comes with a description of itself and
is refused where it does not fit.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from retinaray.artifact import ModelCard
from retinaray.detector.postprocess import Detections
from retinaray.errors import CheckpointError, InferenceError
from retinaray.inference.onnx_contract import read_fixed_batch, read_onnx_card
from retinaray.inference.plan_fit import RuntimeHere, check_plan_fits
from retinaray.inference.plan_sidecar import check_plan_content, read_sidecar, rebuild_hint
from retinaray.inference.predictor import PredictorSettings, Suppressor, check_canvas
from retinaray.inference.tensorrt_buffers import EngineBuffers, Slot
from retinaray.inference.tensorrt_building import EngineSettings, build_engine
from retinaray.inference.tensorrt_device import (
    CudaDevice,
    Device,
    describe_gpu,
    describe_machine,
)
from retinaray.inference.tensorrt_engine import LoadedEngine
from retinaray.inference.tensorrt_loading import flavour_of, load_tensorrt

logger = logging.getLogger(__name__)

# While a graph is recorded nothing may wait for the whole device, which loading an engine does;
# and torch records one graph at a time.
_LOADING = threading.Lock()


def load_tensorrt_predictor(
    content: bytes, *, uri: str, settings: PredictorSettings
) -> TensorRtPredictor:
    """Build an exported ONNX file for this GPU; takes seconds to minutes.

    Args:
        content: The ONNX file; its own types decide the precision.
        uri: Its name, for messages.
        settings: How to run it. Its precision `fp32` also keeps float32 from being rounded to TF32.

    Raises:
        CheckpointError: If the file is not one of ours.
        InferenceError: If there is no GPU or no TensorRT, or it refuses the file.
    """
    trt = load_tensorrt()
    card, _ = read_onnx_card(content, uri=uri)
    check_canvas(settings.canvas, card.canvas, uri)
    fixed = read_fixed_batch(content, uri=uri)
    batch = (1, settings.batch, settings.batch) if fixed is None else (fixed, fixed, fixed)
    building = EngineSettings(batch=batch, allow_tf32=settings.precision != "fp32")
    built = build_engine(trt, content, building)
    return TensorRtPredictor(trt, built.plan, card=card, uri=uri, settings=settings)


def load_tensorrt_plan(
    content: bytes, sidecar: bytes | None, *, uri: str, settings: PredictorSettings
) -> TensorRtPredictor:
    """Load a plan that was built before.

    Args:
        content: The plan.
        sidecar: Its description, the file beside it; none = it is missing.
        uri: The plan's name, for messages.
        settings: How to run it.

    Raises:
        CheckpointError: If plan or description are damaged or do not belong together.
        InferenceError: If there is no GPU or no TensorRT, or the plan was built for another one.
    """
    described = read_sidecar(sidecar, uri=uri)
    check_plan_content(described, content, uri=uri)
    check_canvas(settings.canvas, described.card.canvas, uri)
    trt = load_tensorrt()
    here = RuntimeHere(flavour_of(trt), trt.__version__, describe_gpu(), describe_machine())
    check_plan_fits(described, here, uri=uri)
    return TensorRtPredictor(
        trt,
        content,
        card=described.card,
        uri=uri,
        settings=settings,
        allow_host_code=described.version_compatible,
    )


@dataclass(frozen=True)
class _Submitted:
    """A batch on its way: its slot, and how many of its images are real."""

    slot: Slot
    ticket: int
    count: int


class TensorRtPredictor:
    """Runs an engine on streams of its own; one loop in one thread at a time.

    Every call has the same number of images, the last ones are black if there are fewer, so that
    one recorded CUDA graph serves all. A second stream suppresses overlaps while the first works
    on the next batch.

    Args:
        trt: The tensorrt module.
        plan: Serialized engine.
        card: The model that it was built from.
        uri: Its name, for messages.
        settings: How to run it. Batches outside of what the engine takes are cut, or filled up.
        allow_host_code: See `LoadedEngine`.
        device: Where to run; none = the current GPU.

    Raises:
        CheckpointError: If the engine does not belong to the card.
        InferenceError: If the engine does not load or run here.
    """

    backend = "tensorrt"

    def __init__(
        self,
        trt: Any,
        plan: bytes,
        *,
        card: ModelCard,
        uri: str,
        settings: PredictorSettings,
        allow_host_code: bool = False,
        device: Device | None = None,
    ) -> None:
        self.card = card
        self.canvas = card.canvas
        self._uri = uri
        self._device = CudaDevice() if device is None else device
        self._stream = self._device.new_stream()
        self._tail_stream = self._device.new_stream()
        self._suppress = Suppressor(card, settings)
        self._is_open = True
        # TensorRT binds an engine to whichever device is current.
        with _LOADING, self._device.on_stream(self._stream), torch.inference_mode():
            self._loaded = LoadedEngine(trt, plan, uri=uri, allow_host_code=allow_host_code)
            if self._loaded.canvas != card.canvas:
                raise CheckpointError(
                    f"{uri}: the engine takes {self._loaded.canvas} (height, width), its card says "
                    f"{card.canvas}; {rebuild_hint(uri)}"
                )
            fewest, most = self._loaded.batch_limits
            self.batch = min(max(settings.batch, fewest), most)
            if self.batch != settings.batch:
                logger.info("%s takes %d to %d images at a time", uri, fewest, most)
            self._buffers = EngineBuffers(
                self._device,
                batch=self.batch,
                canvas=self.canvas,
                input_dtype=self._loaded.input_dtype,
                output_shapes=self._loaded.choose_batch(self.batch),
            )
            self._loaded.bind(self._buffers.bindings)
            self._replay = self._record()

    @property
    def uses_cuda_graph(self) -> bool:
        """Whether a batch is one launch instead of one per operator."""
        return self._replay is not None

    def predict(self, images: UInt8[Tensor, "N 3 H W"]) -> list[Detections]:
        """Detections of each image in network pixels, on the CPU; N may be any number.

        Raises:
            InferenceError: If TensorRT fails, or the predictor is closed.
        """
        if images.shape[0] == 0:
            return []
        parts = torch.split(images, self.batch)
        return [found for part in self.predict_batches(parts) for found in part]

    def predict_batches(
        self, batches: Iterable[UInt8[Tensor, "N 3 H W"]]
    ) -> Iterator[list[Detections]]:
        """Detections of many batches; a batch is copied while the one before is in the network.

        Args:
            batches: Each of 1 to `batch` images; taken one ahead of what is given back.

        Yields:
            The detections of one batch, as `predict` gives them.

        Raises:
            InferenceError: If TensorRT fails, the predictor is closed, or another loop uses it.
            ValueError: If a batch has too many images.
        """
        waiting: _Submitted | None = None
        for images in batches:
            submitted = self._submit(images)
            if waiting is not None:
                yield self._collect(waiting)
            waiting = submitted
        if waiting is not None:
            yield self._collect(waiting)

    def close(self) -> None:
        """Free the GPU memory; later calls of `predict` fail. Closing twice is harmless."""
        if not self._is_open:
            return
        self._is_open = False
        # Nothing may still run when its memory goes; the graph refers to the context.
        self._stream.synchronize()
        self._tail_stream.synchronize()
        self._replay = None
        self._loaded.close()
        del self._buffers

    @torch.inference_mode()
    def _submit(self, images: UInt8[Tensor, "N 3 H W"]) -> _Submitted:
        if not self._is_open:
            raise InferenceError(f"{self._uri}: the predictor is closed: load it again")
        count = images.shape[0]
        if not 1 <= count <= self.batch:
            raise ValueError(f"expected 1 to {self.batch} images in a batch, got {count}")
        slot = self._buffers.take_slot()
        slot.fill(images)
        with self._device.on_stream(self._stream):
            self._buffers.queue_batch(slot, self._replay or self._queue_network, self._stream)
        return _Submitted(slot, slot.ticket, count)

    @torch.inference_mode()
    def _collect(self, submitted: _Submitted) -> list[Detections]:
        slot = submitted.slot
        candidates = self._buffers.read_slot(slot, submitted.ticket, submitted.count)
        with self._device.on_stream(self._tail_stream):
            self._tail_stream.wait_event(slot.ready)
            boxes, scores, labels = candidates
            return self._suppress(boxes, scores, labels)

    def _queue_network(self) -> None:
        self._buffers.queue_input()
        # Never the default stream: TensorRT would synchronise the device around every call.
        self._loaded.enqueue(self._stream.cuda_stream)

    def _record(self) -> Callable[[], None] | None:
        """The network as one launch; none where it cannot be recorded, which is logged once."""
        # TensorRT sets itself up in the first call, which a recording would not allow.
        self._queue_network()
        self._stream.synchronize()
        replay, reason = self._try_capture()
        if replay is None:
            logger.warning(
                "%s: no CUDA graph (%s): every operator is launched by itself", self._uri, reason
            )
        return replay

    def _try_capture(self) -> tuple[Callable[[], None] | None, str]:
        if not self._loaded.is_capturable(self._stream.cuda_stream):
            return None, "TensorRT says that it cannot be recorded"
        try:
            replay = self._device.capture(self._queue_network, self._stream)
            self._buffers.forget_outputs()
            replay()
            self._stream.synchronize()
        except (RuntimeError, InferenceError) as error:
            return None, str(error).splitlines()[0]
        # A recording on a wrong device or stream is empty, and replays without an error.
        if not self._buffers.all_written():
            return None, "the recording is empty"
        return replay, ""
