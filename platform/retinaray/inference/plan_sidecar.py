"""What stands beside a built engine: `engine.plan` has `engine.plan.json`.

A plan says nothing readable of itself. The description holds what it was built from, by and for,
and the whole model card, so that the plan runs without its ONNX file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from retinaray.artifact import ModelCard, hash_content
from retinaray.errors import CheckpointError

SIDECAR_FORMAT = "retinaray-plan-1"
INPUT_TYPES = ("uint8", "float32")


@dataclass(frozen=True)
class GpuInfo:
    """A GPU and the software below it.

    Attributes:
        name: As the driver gives it, `NVIDIA H200`.
        compute_capability: Major and minor.
        cuda: Version of CUDA that torch was built with.
        driver: Version of the driver; empty where it cannot be read.
    """

    name: str
    compute_capability: tuple[int, int]
    cuda: str = ""
    driver: str = ""


@dataclass(frozen=True)
class PlanSidecar:
    """What is known of a plan.

    Attributes:
        card: The model.
        input_type: `uint8` or `float32`.
        precision: `fp32`, `fp16` or `int8`, as the ONNX file has it.
        batch: Fewest, tuned and most images per call.
        flavour: `tensorrt` or `tensorrt_rtx`.
        version: Its version.
        gpu: What it was built on; none = built without a GPU, which only TensorRT-RTX can.
        machine: Operating system and processor, `Linux x86_64`.
        workspace_bytes: GPU memory that a layer may use.
        optimization_level: The builder's effort.
        version_compatible: Whether newer versions run it; see `EngineSettings`.
        hardware_compatibility: Which other GPUs run it; see `EngineSettings`.
        allow_tf32: Whether float32 convolutions may round.
        plan_bytes: Length of the plan.
        plan_sha256: Of the plan.
        onnx_sha256: Of the file that it was built from.
    """

    card: ModelCard
    input_type: str
    precision: str
    batch: tuple[int, int, int]
    flavour: str
    version: str
    gpu: GpuInfo | None
    machine: str
    workspace_bytes: int
    optimization_level: int
    version_compatible: bool
    hardware_compatibility: str
    allow_tf32: bool
    plan_bytes: int
    plan_sha256: str
    onnx_sha256: str


# Every value but the card and the GPU, with what JSON makes of it.
_TYPES: dict[str, type] = {
    "input_type": str,
    "precision": str,
    "batch": list,
    "flavour": str,
    "version": str,
    "machine": str,
    "workspace_bytes": int,
    "optimization_level": int,
    "version_compatible": bool,
    "hardware_compatibility": str,
    "allow_tf32": bool,
    "plan_bytes": int,
    "plan_sha256": str,
    "onnx_sha256": str,
}


def sidecar_uri(uri: str) -> str:
    """Where the description of a plan lies: beside it."""
    return f"{uri}.json"


def write_sidecar(sidecar: PlanSidecar) -> bytes:
    """The description as a JSON file; the same values give the same bytes."""
    gpu = None
    if sidecar.gpu is not None:
        gpu = vars(sidecar.gpu) | {"compute_capability": list(sidecar.gpu.compute_capability)}
    values = {
        "format": SIDECAR_FORMAT,
        **{key: getattr(sidecar, key) for key in _TYPES},
        "batch": list(sidecar.batch),
        "gpu": gpu,
        "card": sidecar.card.to_metadata(),
    }
    return (json.dumps(values, indent=2) + "\n").encode()


def read_sidecar(content: bytes | None, *, uri: str) -> PlanSidecar:
    """Read a description.

    Args:
        content: The file; none = it is missing.
        uri: Name of the plan, for messages.

    Raises:
        CheckpointError: If it is missing, truncated, foreign or damaged.
    """
    name = sidecar_uri(uri)
    if content is None:
        raise CheckpointError(
            f"{name}: expected the description that belongs to {uri}, found none: copy both files, "
            f"or {rebuild_hint(uri)}"
        )
    try:
        values = json.loads(content)
    except ValueError as error:
        raise CheckpointError(
            f"{name}: not readable as JSON ({len(content)} bytes), it may be truncated: {error}; "
            f"copy it again, or {rebuild_hint(uri)}"
        ) from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != SIDECAR_FORMAT:
        raise CheckpointError(
            f"{name}: expected a description of format {SIDECAR_FORMAT!r}, found {found!r}: "
            f"{rebuild_hint(uri)}"
        )
    _check_types(values, name, uri)
    return _read_values(values, name, uri)


def _check_types(values: dict[str, Any], name: str, uri: str) -> None:
    # bool is an int in Python, not in JSON.
    faults = [
        f"{key} is {'missing' if key not in values else repr(values[key])}"
        for key, kind in _TYPES.items()
        if not isinstance(values.get(key), kind) or (kind is int and isinstance(values[key], bool))
    ]
    if not isinstance(values.get("card"), dict):
        faults.append("card is missing")
    if values.get("input_type") not in INPUT_TYPES:
        faults.append(f"input_type is {values.get('input_type')!r}")
    if faults:
        raise CheckpointError(f"{name}: is damaged: {'; '.join(faults)}; {rebuild_hint(uri)}")


def _read_values(values: dict[str, Any], name: str, uri: str) -> PlanSidecar:
    plain = {key: values[key] for key in _TYPES if key != "batch"}
    card = ModelCard.from_metadata(values["card"], source=name)
    try:
        fewest, tuned, most = (int(count) for count in values["batch"])
        gpu = _read_gpu(values["gpu"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{name}: is damaged: {type(error).__name__}: {error}; {rebuild_hint(uri)}"
        ) from error
    return PlanSidecar(card=card, batch=(fewest, tuned, most), gpu=gpu, **plain)


def _read_gpu(values: Any) -> GpuInfo | None:
    if values is None:
        return None
    major, minor = (int(part) for part in values["compute_capability"])
    return GpuInfo(
        name=str(values["name"]),
        compute_capability=(major, minor),
        cuda=str(values["cuda"]),
        driver=str(values["driver"]),
    )


def check_plan_content(sidecar: PlanSidecar, plan: bytes, *, uri: str) -> None:
    """Hold a plan to the length and hash in its description.

    Raises:
        CheckpointError: If they differ.
    """
    if len(plan) < sidecar.plan_bytes:
        raise CheckpointError(
            f"{uri}: expected {sidecar.plan_bytes} bytes, found {len(plan)}: it is truncated; "
            f"copy it again, or {rebuild_hint(uri)}"
        )
    found = hash_content(plan)
    if found != sidecar.plan_sha256:
        raise CheckpointError(
            f"{uri}: its SHA-256 is {found[:12]}..., but {sidecar_uri(uri)} describes "
            f"{sidecar.plan_sha256[:12]}...: they do not belong together; copy both again, or "
            f"{rebuild_hint(uri)}"
        )


def rebuild_hint(uri: str) -> str:
    """The command that makes a plan for this machine."""
    return f"build it here: retinaray export model.pth {PurePosixPath(uri).name}"
