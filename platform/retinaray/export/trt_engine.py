"""A plan and its description for the GPU of this machine, from an exported ONNX file.

The mechanism of building lies beside the runtime, which builds ONNX files when it loads them.
"""

from __future__ import annotations

from dataclasses import dataclass

from retinaray.artifact import hash_content
from retinaray.inference.onnx_contract import read_onnx_card, read_precision
from retinaray.inference.plan_sidecar import PlanSidecar, sidecar_uri, write_sidecar
from retinaray.inference.tensorrt_building import BuiltEngine, EngineSettings, build_engine
from retinaray.inference.tensorrt_device import describe_gpu, describe_machine
from retinaray.inference.tensorrt_loading import flavour_of, load_tensorrt

__all__ = [
    "BuiltEngine",
    "EngineSettings",
    "PlanFiles",
    "build_engine",
    "build_plan",
    "load_tensorrt",
    "sidecar_uri",
]


@dataclass(frozen=True)
class PlanFiles:
    """What a build writes.

    Attributes:
        plan: The serialized engine.
        sidecar: Its description, for the file at `sidecar_uri`.
        timing_cache: What was measured, for the next build; none where there is no such thing.
    """

    plan: bytes
    sidecar: bytes
    timing_cache: bytes | None


def build_plan(content: bytes, *, uri: str, settings: EngineSettings) -> PlanFiles:
    """Build an exported file for this GPU.

    Args:
        content: The ONNX file; its own types decide the precision.
        uri: Its name, for messages.
        settings: How to build.

    Raises:
        CheckpointError: If the file is not one of ours.
        InferenceError: If there is no GPU or no TensorRT, or it refuses the file.
    """
    card, input_type = read_onnx_card(content, uri=uri)
    precision = read_precision(content, uri=uri)
    trt = load_tensorrt()
    built = build_engine(trt, content, settings)
    sidecar = PlanSidecar(
        card=card,
        input_type=input_type,
        precision=precision,
        batch=built.batch,
        flavour=flavour_of(trt),
        version=trt.__version__,
        gpu=describe_gpu(),
        machine=describe_machine(),
        workspace_bytes=settings.workspace_bytes,
        optimization_level=settings.optimization_level,
        version_compatible=settings.version_compatible,
        hardware_compatibility=settings.hardware_compatibility,
        allow_tf32=settings.allow_tf32,
        plan_bytes=len(built.plan),
        plan_sha256=hash_content(built.plan),
        onnx_sha256=hash_content(content),
    )
    return PlanFiles(built.plan, write_sidecar(sidecar), built.timing_cache)
