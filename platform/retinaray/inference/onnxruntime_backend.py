"""An exported file run by ONNX Runtime on the CPU: portable, and the reference of parity checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from retinaray.detector.postprocess import Detections
from retinaray.errors import CheckpointError, InferenceError
from retinaray.inference.onnx_contract import (
    INPUT_NAME,
    OUTPUT_NAMES,
    read_fixed_batch,
    read_onnx_card,
)
from retinaray.inference.predictor import (
    PredictorSettings,
    Suppressor,
    check_canvas,
    describe_missing,
    pad_batches,
    refuse_bf16,
)


def load_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        InferenceError: If it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise describe_missing("onnxruntime", "onnxruntime", error) from error
    return onnxruntime


class OnnxRuntimePredictor:
    """Runs an exported file with the CPU provider, in the types of the file.

    Args:
        content: The ONNX file; one that takes only one size of batch is run at it, the last batch
            filled up with black.
        uri: Its name, for messages.
        settings: How to run it.

    Raises:
        CheckpointError: If the file is not one of ours, or its graph is damaged.
        InferenceError: If ONNX Runtime is not installed, would run it elsewhere than on the CPU,
            bf16 is asked for, or the size does not fit.
    """

    backend = "onnxruntime"

    def __init__(self, content: bytes, *, uri: str, settings: PredictorSettings) -> None:
        refuse_bf16(settings, "onnxruntime")
        onnxruntime = load_onnxruntime()
        self.card, self._input_type = read_onnx_card(content, uri=uri)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.threads
        options.log_severity_level = 3
        # Idle threads that wait for more work would take the processor from whatever runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # Where scales are float16 its fusion of Q/DQ nodes quantizes each bias with the product of
        # two of them, which underflows: boxes of a ResNet-18 moved by up to 9 px, as against 0.7 px
        # with the nodes run as they stand. Nor is it faster (252 against 209 ms for an image of
        # 400x667 on an EPYC with VNNI).
        options.add_session_config_entry("session.disable_quant_qdq", "1")
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
        self._fixed_batch = read_fixed_batch(content, uri=uri)
        self._suppress = Suppressor(self.card, settings)

    def predict(self, images: UInt8[Tensor, "N 3 H W"]) -> list[Detections]:
        """Detections of each image in network pixels."""
        boxes, scores, labels = self.run(images)
        return self._suppress(boxes, scores, labels)

    def run(self, images: UInt8[Tensor, "N 3 H W"]) -> tuple[Tensor, Tensor, Tensor]:
        """The file's raw outputs: boxes, scores, labels of every candidate."""
        if self._fixed_batch is None:
            whole = images.contiguous().numpy().astype(self._input_type, copy=False)
            parts = [(whole, len(images))]
        else:
            parts = list(pad_batches(images, self._fixed_batch, self._input_type))
        outputs = [
            [torch.from_numpy(output[:count]) for output in self._run_batch(array)]
            for array, count in parts
        ]
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        return boxes, scores, labels

    def _run_batch(self, array: np.ndarray) -> list[np.ndarray]:
        outputs: list[np.ndarray] = self._session.run(list(OUTPUT_NAMES), {INPUT_NAME: array})
        return outputs
