"""An exported file run by OpenVINO: the default on CPUs, in bf16 where they compute it."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from retinaray.detector.postprocess import Detections
from retinaray.errors import CheckpointError
from retinaray.inference.onnx_contract import INPUT_NAME, OUTPUT_NAMES, read_onnx_card
from retinaray.inference.predictor import PredictorSettings, Suppressor, check_canvas


class OpenVinoPredictor:
    """Runs an exported file on the CPU at a fixed batch; smaller ones are padded with black.

    Args:
        content: The ONNX file.
        uri: Its name, for messages.
        settings: How to run it.

    Raises:
        CheckpointError: If the file is not one of ours, or its graph is damaged.
        InferenceError: If the size does not fit.
    """

    backend = "openvino"

    def __init__(self, content: bytes, *, uri: str, settings: PredictorSettings) -> None:
        import openvino
        from openvino import properties

        self.card, self._input_type = read_onnx_card(content, uri=uri)
        core = openvino.Core()
        try:
            model = core.read_model(content)
        except RuntimeError as error:
            raise CheckpointError(f"{uri}: OpenVINO cannot load it: {error}") from error
        self.canvas = self.card.canvas
        check_canvas(settings.canvas, self.canvas, uri)
        self._batch = settings.batch
        # A fixed shape lets the plugin plan its memory; dynamic batches run slower.
        model.reshape({INPUT_NAME: [self._batch, 3, *self.canvas]})
        capabilities = core.get_property("CPU", properties.device.capabilities)
        precision = openvino.Type.bf16 if "BF16" in capabilities else openvino.Type.f32
        self._compiled = core.compile_model(
            model,
            "CPU",
            {
                properties.hint.inference_precision: precision,
                properties.hint.performance_mode: properties.hint.PerformanceMode.LATENCY,
                properties.inference_num_threads: settings.threads,
                properties.hint.enable_cpu_pinning: False,
            },
        )
        self._request = self._compiled.create_infer_request()
        self._suppress = Suppressor(self.card, settings)

    def predict(self, images: UInt8[Tensor, "N 3 H W"]) -> list[Detections]:
        """Detections of each image in network pixels."""
        count = images.shape[0]
        array = np.zeros((self._batch, 3, *self.canvas), dtype=self._input_type)
        array[:count] = images.numpy()
        results = self._request.infer({INPUT_NAME: array})
        boxes, scores, labels = (
            torch.from_numpy(np.array(results[name][:count])) for name in OUTPUT_NAMES
        )
        return self._suppress(boxes, scores, labels)
