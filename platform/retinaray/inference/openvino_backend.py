"""An exported file run by OpenVINO: the default on CPUs, in bf16 where they compute it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from retinaray.detector.postprocess import Detections
from retinaray.errors import CheckpointError, InferenceError
from retinaray.inference.onnx_contract import (
    INPUT_NAME,
    OUTPUT_NAMES,
    Precision,
    read_fixed_batch,
    read_onnx_card,
    read_precision,
)
from retinaray.inference.predictor import (
    ComputeType,
    PredictorSettings,
    Suppressor,
    check_canvas,
    describe_missing,
)


class OpenVinoPredictor:
    """Runs an exported file on the CPU at a fixed batch; smaller ones are padded with black.

    Args:
        content: The ONNX file; the batch of a file that takes only one size wins over the settings.
        uri: Its name, for messages.
        settings: How to run it.

    Attributes:
        precision: What float convolutions are computed in.
        precision_reason: Why, in words.

    Raises:
        CheckpointError: If the file is not one of ours, or its graph is damaged.
        InferenceError: If OpenVINO is not installed, the size does not fit, or bf16 is asked of a
            processor without it.
    """

    backend = "openvino"

    def __init__(self, content: bytes, *, uri: str, settings: PredictorSettings) -> None:
        capabilities = list_capabilities()
        import openvino
        from openvino import properties

        self.card = read_onnx_card(content, uri=uri)[0]
        self.canvas = self.card.canvas
        check_canvas(settings.canvas, self.canvas, uri)
        self.precision, self.precision_reason = choose_precision(
            settings.precision, read_precision(content, uri=uri), capabilities
        )
        core = openvino.Core()
        try:
            model = core.read_model(content)
        except RuntimeError as error:
            raise CheckpointError(f"{uri}: OpenVINO cannot load it: {error}") from error
        fixed = read_fixed_batch(content, uri=uri)
        self._batch = fixed or settings.batch
        if fixed is None:
            # A fixed shape lets the plugin plan its memory; dynamic batches run slower.
            model.reshape({INPUT_NAME: [self._batch, 3, *self.canvas]})
        model = _take_decoded_pixels(model)
        types = {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16}
        self._compiled = core.compile_model(
            model,
            "CPU",
            {
                properties.hint.inference_precision: types[self.precision],
                properties.hint.performance_mode: properties.hint.PerformanceMode.LATENCY,
                properties.inference_num_threads: settings.threads,
                properties.hint.enable_cpu_pinning: False,
            },
        )
        self._request = self._compiled.create_infer_request()
        self._suppress = Suppressor(self.card, settings)

    def predict(self, images: UInt8[Tensor, "N 3 H W"]) -> list[Detections]:
        """Detections of each image in network pixels."""
        return [
            found
            for part in torch.split(images.permute(0, 2, 3, 1), self._batch)
            for found in self._predict_batch(part)
        ]

    def _predict_batch(self, pixels: UInt8[Tensor, "n H W 3"]) -> list[Detections]:
        import openvino

        count = len(pixels)
        if count < self._batch:
            padded = torch.zeros((self._batch, *pixels.shape[1:]), dtype=torch.uint8)
            padded[:count] = pixels
            pixels = padded
        # Canvases lie in memory as they were decoded: a whole batch of them is not copied.
        array = openvino.Tensor(pixels.contiguous().numpy(), shared_memory=True)
        results = self._request.infer({INPUT_NAME: array})
        boxes, scores, labels = (
            torch.from_numpy(np.array(results[name][:count])) for name in OUTPUT_NAMES
        )
        return self._suppress(boxes, scores, labels)


def _take_decoded_pixels(model: Any) -> Any:
    """The same network over bytes [N, H, W, 3], in the order of decoding, whatever it took before.

    Around a network that computes nothing, eight canvases of 512x512 took 4.5 ms of a core when
    they were put into [N, 3, H, W] before the call; they take 1.0 ms.
    """
    import openvino
    from openvino.preprocess import PrePostProcessor

    steps = PrePostProcessor(model)
    images = steps.input(INPUT_NAME)
    images.tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    images.model().set_layout(openvino.Layout("NCHW"))
    return steps.build()


def list_capabilities() -> list[str]:
    """What OpenVINO computes on this processor, such as `FP32`, `BF16`, `INT8`.

    Raises:
        InferenceError: If it is not installed.
    """
    try:
        import openvino
        from openvino import properties
    except ImportError as error:
        raise describe_missing("openvino", "openvino", error) from error
    return list(openvino.Core().get_property("CPU", properties.device.capabilities))


def choose_precision(
    requested: Literal["auto"] | ComputeType, file_precision: Precision, capabilities: Sequence[str]
) -> tuple[ComputeType, str]:
    """What the convolutions that the file leaves in float are computed in.

    An INT8 file stays in float32 between its integer convolutions: there is hardly a float
    convolution left to gain from bf16 (on an EPYC with AVX512-BF16 and VNNI 78.3 ms against 77.3 ms
    for an image of 384x512 through ResNet-18), and each activation would be rounded twice.

    Args:
        requested: From the caller.
        file_precision: From the file; see `read_precision`.
        capabilities: OpenVINO's list for this processor.

    Returns:
        The type, and the reason in words.

    Raises:
        InferenceError: If bf16 is asked for and the processor does not have it: OpenVINO would
            silently compute something else.
    """
    has_bf16 = "BF16" in capabilities
    if requested == "bf16" and not has_bf16:
        raise InferenceError(
            "precision 'bf16' needs a processor that computes it, and OpenVINO lists "
            f"{', '.join(capabilities) or 'nothing'} for this one: leave --precision out"
        )
    if requested != "auto":
        return requested, f"{requested} asked for"
    if file_precision == "int8":
        return "fp32", "the file's convolutions are INT8, the rest in fp32"
    if has_bf16:
        return "bf16", "in bf16, which this processor computes"
    return "fp32", "in fp32, as this processor has no bf16"
