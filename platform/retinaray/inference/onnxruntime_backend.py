"""An exported file run by ONNX Runtime on the CPU: portable, and the reference of parity checks."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from retinaray.detector.postprocess import Detections
from retinaray.errors import CheckpointError, InferenceError
from retinaray.inference.onnx_contract import INPUT_NAME, OUTPUT_NAMES, read_onnx_card
from retinaray.inference.predictor import PredictorSettings, Suppressor, check_canvas


class OnnxRuntimePredictor:
    """Runs an exported file with the CPU provider.

    Args:
        content: The ONNX file.
        uri: Its name, for messages.
        settings: How to run it.

    Raises:
        CheckpointError: If the file is not one of ours, or its graph is damaged.
        InferenceError: If ONNX Runtime would run it elsewhere than on the CPU, or the size does not
            fit.
    """

    backend = "onnxruntime"

    def __init__(self, content: bytes, *, uri: str, settings: PredictorSettings) -> None:
        import onnxruntime

        self.card, self._input_type = read_onnx_card(content, uri=uri)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.threads
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        # Its errors have no common class below Exception.
        except Exception as error:
            raise CheckpointError(f"{uri}: ONNX Runtime cannot load it: {error}") from error
        provider = self._session.get_providers()[0]
        if provider != "CPUExecutionProvider":
            raise InferenceError(f"expected CPUExecutionProvider, ONNX Runtime took {provider}")
        self.canvas = self.card.canvas
        check_canvas(settings.canvas, self.canvas, uri)
        self._suppress = Suppressor(self.card, settings)

    def predict(self, images: UInt8[Tensor, "N 3 H W"]) -> list[Detections]:
        """Detections of each image in network pixels."""
        boxes, scores, labels = self.run(images)
        return self._suppress(boxes, scores, labels)

    def run(self, images: UInt8[Tensor, "N 3 H W"]) -> tuple[Tensor, Tensor, Tensor]:
        """The file's raw outputs: boxes, scores, labels of every candidate."""
        array = images.contiguous().numpy().astype(self._input_type, copy=False)
        outputs: list[np.ndarray] = self._session.run(list(OUTPUT_NAMES), {INPUT_NAME: array})
        boxes, scores, labels = (torch.from_numpy(output) for output in outputs)
        return boxes, scores, labels
