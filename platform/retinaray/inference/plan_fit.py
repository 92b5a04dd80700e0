"""May a plan run here? A plan fits the TensorRT that built it and the kind of GPU it was built on.

Refused before TensorRT sees it: what it says of a foreign plan names neither cause nor remedy.
"""

from __future__ import annotations

from dataclasses import dataclass

from retinaray.errors import InferenceError
from retinaray.inference.plan_sidecar import GpuInfo, PlanSidecar, rebuild_hint
from retinaray.inference.tensorrt_loading import parse_release, product_name

_AMPERE = (8, 0)


@dataclass(frozen=True)
class RuntimeHere:
    """What would run a plan.

    Attributes:
        flavour: `tensorrt` or `tensorrt_rtx`.
        version: Its version.
        gpu: The GPU of this process.
        machine: Operating system and processor.
    """

    flavour: str
    version: str
    gpu: GpuInfo
    machine: str


def check_plan_fits(sidecar: PlanSidecar, here: RuntimeHere, *, uri: str) -> None:
    """Refuse a plan that was built for something else.

    Raises:
        InferenceError: If flavour, version, GPU or machine differ more than the plan allows; the
            text says how and what to do.
    """
    faults = [
        fault
        for fault in (
            _describe_version(sidecar, here),
            _describe_gpu(sidecar, here.gpu),
            _describe_machine(sidecar, here),
        )
        if fault
    ]
    if faults:
        raise InferenceError(f"{uri}: {'; '.join(faults)}: {rebuild_hint(uri)}")


def _describe_version(sidecar: PlanSidecar, here: RuntimeHere) -> str:
    built = f"{product_name(sidecar.flavour)} {sidecar.version}"
    running = f"{product_name(here.flavour)} {here.version}"
    if sidecar.flavour != here.flavour:
        return f"was built by {built}, here is {running}, which does not read such plans"
    old, new = parse_release(sidecar.version), parse_release(here.version)
    if sidecar.version_compatible:
        if _may_run_later(old, new):
            return ""
        return (
            f"was built by {built} for newer versions of the same major (and 10 for 11), here is "
            f"{running}"
        )
    # Some packages give three numbers, some four.
    shared = min(len(old), len(new))
    if shared and old[:shared] == new[:shared]:
        return ""
    return f"was built by {built}, here is {running}, and a plan runs with its own version only"


def _may_run_later(old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Source: NVIDIA's page on engine compatibility; the other way round never."""
    shared = min(len(old), len(new))
    if not shared or new[:shared] < old[:shared]:
        return False
    return new[0] == old[0] or (old[0], new[0]) == (10, 11)


def _describe_gpu(sidecar: PlanSidecar, here: GpuInfo) -> str:
    built = sidecar.gpu
    if built is None:
        return ""
    same_capability = built.compute_capability == here.compute_capability
    fits = {
        "none": same_capability and built.name == here.name,
        "same-compute-capability": same_capability,
        "ampere+": min(built.compute_capability, here.compute_capability) >= _AMPERE,
    }
    if fits.get(sidecar.hardware_compatibility, False):
        return ""
    return (
        f"was built on {_describe(built)} with hardware_compatibility="
        f"{sidecar.hardware_compatibility!r}, here is {_describe(here)}"
    )


def _describe(gpu: GpuInfo) -> str:
    major, minor = gpu.compute_capability
    return f"{gpu.name} (compute capability {major}.{minor})"


def _describe_machine(sidecar: PlanSidecar, here: RuntimeHere) -> str:
    if sidecar.machine == here.machine:
        return ""
    return f"was built on {sidecar.machine}, here is {here.machine}"
