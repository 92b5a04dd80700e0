"""What travels with the model to prove, on the device, that its engine finds the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import UInt8

from retinaray.detector.postprocess import Detections
from retinaray.errors import ExportError
from retinaray.export.edge_bundle.signature import Signature
from retinaray.export.edge_bundle.template_text import read_template
from retinaray.inference.onnx_contract import INPUT_NAME
from retinaray.inference.predictor import PredictorSettings

_BOX_DIGITS = 3
_SCORE_DIGITS = 6


@dataclass(frozen=True)
class Tolerance:
    """How far an engine's raw outputs may lie from those of the file that it was built from.

    Attributes:
        box_px: Of a corner, in network pixels ...
        box_share: ... and in addition this share of the box's longer side, because a box's size is
            the exponential of what the network gives.
        score: Of a score.
        lonely_share: Share of the clear candidates that may have no partner.
    """

    box_px: float
    box_share: float
    score: float
    lonely_share: float


TOLERANCES = {
    # Not zero: GPUs since Ampere round the inputs of FP32 convolutions to 10 bits (TF32).
    "fp32": Tolerance(box_px=0.5, box_share=0.005, score=0.01, lonely_share=0.0),
    "fp16": Tolerance(box_px=1.0, box_share=0.01, score=0.02, lonely_share=0.01),
    # A value that falls on another INT8 step moves what is behind it by a step.
    "int8": Tolerance(box_px=2.0, box_share=0.02, score=0.05, lonely_share=0.03),
}


@dataclass(frozen=True)
class Sample:
    """An image of the self-test and what the model proposes in it.

    Attributes:
        name: What the image is called in reports.
        canvas: The network's input, RGB 0..255.
        candidates: All that leaves the network, before thresholds and suppression, in network
            pixels: as a predictor gives it with `candidate_settings`.
    """

    name: str
    canvas: UInt8[np.ndarray, "H W 3"]
    candidates: Detections


def candidate_settings(num_candidates: int) -> PredictorSettings:
    """With these a predictor gives the candidates of samples.

    Args:
        num_candidates: As many as the file gives per image.
    """
    return PredictorSettings(
        batch=1, score_threshold=0.0, nms_kind="none", max_detections=num_candidates
    )


def write_self_test(
    samples: Sequence[Sample], signature: Signature, *, engine_name: str, precision: str
) -> dict[str, bytes]:
    """The files of the self-test.

    Args:
        samples: At least one.
        signature: The file that the engine is built from.
        engine_name: The engine's file name.
        precision: A key of TOLERANCES.

    Returns:
        File name in the bundle to content: selftest.py, selftest/expected.json and the images as
        binary PPM, so that nothing can be decoded differently.

    Raises:
        ExportError: If there is no sample, or one has another size than the network.
    """
    if not samples:
        raise ExportError("the self-test needs at least one image, got none; give --images")
    tolerance = TOLERANCES[precision]
    files: dict[str, bytes] = {"selftest.py": read_template("selftest.py.txt").encode()}
    entries = []
    for index, sample in enumerate(samples):
        path = f"selftest/{index:03d}.ppm"
        files[path] = _encode_ppm(sample, signature.card.canvas)
        entries.append({"file": path, **_describe_sample(sample, signature, tolerance)})
    expected = {
        "format": 1,
        "engine": engine_name,
        "precision": precision,
        "input": INPUT_NAME,
        "input_type": signature.input_type,
        "canvas": list(signature.card.canvas),
        "fixed_batch": signature.fixed_batch,
        "thresholds": list(signature.card.score_thresholds),
        "tolerance": asdict(tolerance),
        "samples": entries,
    }
    files["selftest/expected.json"] = (json.dumps(expected, indent=1) + "\n").encode()
    return files


def count_clear(samples: Sequence[Sample], signature: Signature, precision: str) -> int:
    """Candidates that the self-test compares; with none of them it proves nothing."""
    margin = TOLERANCES[precision].score
    thresholds = np.array(signature.card.score_thresholds)
    return sum(
        int((found.scores.numpy() > thresholds[found.labels.numpy()] + margin).sum())
        for found in (sample.candidates for sample in samples)
    )


def _encode_ppm(sample: Sample, canvas: tuple[int, int]) -> bytes:
    if sample.canvas.shape != (*canvas, 3) or sample.canvas.dtype != np.uint8:
        raise ExportError(
            f"self-test image {sample.name}: expected uint8 {(*canvas, 3)}, got "
            f"{sample.canvas.dtype} {sample.canvas.shape}"
        )
    head = f"P6\n{canvas[1]} {canvas[0]}\n255\n".encode()
    return head + np.ascontiguousarray(sample.canvas).tobytes()


def _describe_sample(
    sample: Sample, signature: Signature, tolerance: Tolerance
) -> dict[str, object]:
    found = sample.candidates
    boxes, scores, labels = (
        tensor.numpy() for tensor in (found.boxes_xyxy, found.scores, found.labels)
    )
    # Partners of whatever is clearly above its threshold; the rest is never compared.
    floors = np.array(signature.card.score_thresholds) - 2 * tolerance.score
    kept = scores >= floors[labels]
    return {
        "name": sample.name,
        # Here the list ends, and perhaps not the candidates.
        "lowest_score": round(float(scores.min()), _SCORE_DIGITS) if len(scores) else 0.0,
        "boxes": boxes[kept].astype(np.float64).round(_BOX_DIGITS).tolist(),
        "scores": scores[kept].astype(np.float64).round(_SCORE_DIGITS).tolist(),
        "labels": labels[kept].tolist(),
    }
