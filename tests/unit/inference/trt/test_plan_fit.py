"""Which plans run where: by version, GPU and machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from retinaray.artifact import ModelCard
from retinaray.errors import InferenceError
from retinaray.inference.plan_fit import RuntimeHere, check_plan_fits
from retinaray.inference.plan_sidecar import GpuInfo, PlanSidecar

A100 = GpuInfo("NVIDIA A100-SXM4-80GB", (8, 0))
A30 = GpuInfo("NVIDIA A30", (8, 0))
H200 = GpuInfo("NVIDIA H200", (9, 0))
T4 = GpuInfo("Tesla T4", (7, 5))
HERE = RuntimeHere("tensorrt", "10.16.1.11", A100, "Linux x86_64")


@pytest.fixture
def sidecar(tiny_card: ModelCard) -> PlanSidecar:
    """Built where it runs."""
    return PlanSidecar(
        card=tiny_card,
        input_type="uint8",
        precision="fp32",
        batch=(1, 8, 8),
        flavour=HERE.flavour,
        version=HERE.version,
        gpu=A100,
        machine=HERE.machine,
        workspace_bytes=1,
        optimization_level=3,
        version_compatible=False,
        hardware_compatibility="none",
        allow_tf32=True,
        plan_bytes=0,
        plan_sha256="",
        onnx_sha256="",
    )


def fits(sidecar: PlanSidecar, here: RuntimeHere) -> bool:
    try:
        check_plan_fits(sidecar, here, uri="m.plan")
    except InferenceError:
        return False
    return True


@pytest.mark.parametrize(
    ("built", "running", "is_compatible", "expected"),
    [
        ("10.16.1.11", "10.16.1.11", False, True),
        # JetPack's package has three numbers.
        ("10.3.0", "10.3.0.30", False, True),
        ("10.3.0.26", "10.3.0.30", False, False),
        ("10.16.1", "10.16.0", False, False),
        ("10.16.1", "11.4.0", False, False),
        ("10.3.0", "10.16.1", False, False),
        ("10.3.0", "10.16.1", True, True),
        ("10.3.0", "10.3.0", True, True),
        ("10.16.1", "10.3.0", True, False),
        ("10.16.1", "11.4.0", True, True),
        ("11.4.0", "10.16.1", True, False),
        ("11.4.0", "12.0.0", True, False),
        ("9.3.0", "11.4.0", True, False),
        ("", "", False, False),
        ("", "11.4.0", True, False),
    ],
)
def test_check_plan_fits_knows_which_versions_run_which(
    sidecar: PlanSidecar, built: str, running: str, is_compatible: bool, expected: bool
) -> None:
    plan = replace(sidecar, version=built, version_compatible=is_compatible)
    assert fits(plan, replace(HERE, version=running)) == expected


@pytest.mark.parametrize(
    ("level", "built", "running", "expected"),
    [
        ("none", A100, A100, True),
        ("none", A100, A30, False),
        ("none", A100, H200, False),
        ("same-compute-capability", A100, A30, True),
        ("same-compute-capability", A100, H200, False),
        ("ampere+", A100, H200, True),
        ("ampere+", H200, A30, True),
        ("ampere+", A100, T4, False),
        ("ampere+", T4, A100, False),
        ("a level of the future", A100, A100, False),
        ("none", None, T4, True),
    ],
)
def test_check_plan_fits_knows_which_gpus_run_which(
    sidecar: PlanSidecar, level: str, built: GpuInfo | None, running: GpuInfo, expected: bool
) -> None:
    plan = replace(sidecar, hardware_compatibility=level, gpu=built)
    assert fits(plan, replace(HERE, gpu=running)) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"version": "10.3.0"},
            r"was built by TensorRT 10\.3\.0, here is TensorRT 10\.16\.1\.11, and a plan runs with "
            "its own version only",
        ),
        (
            {"version": "11.4.0", "version_compatible": True},
            r"built by TensorRT 11\.4\.0 for newer versions .* here is TensorRT 10\.16\.1\.11",
        ),
        (
            {"flavour": "tensorrt_rtx", "version": "1.7.1.116"},
            r"built by TensorRT-RTX 1\.7\.1\.116, here is TensorRT 10\.16\.1\.11, which does not",
        ),
        (
            {"gpu": H200},
            r"NVIDIA H200 \(compute capability 9\.0\) .*'none', here is NVIDIA A100-SXM4-80GB "
            r"\(compute capability 8\.0\)",
        ),
        ({"machine": "Linux aarch64"}, "was built on Linux aarch64, here is Linux x86_64"),
    ],
    ids=["version", "compatible", "flavour", "gpu", "machine"],
)
def test_check_plan_fits_says_what_differs_and_what_to_do(
    sidecar: PlanSidecar, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InferenceError, match=message) as caught:
        check_plan_fits(replace(sidecar, **changes), HERE, uri="s3://models/m.plan")
    text = str(caught.value)
    assert text.startswith("s3://models/m.plan: was built")
    assert text.endswith("build it here: retinaray export model.pth m.plan")


def test_check_plan_fits_names_all_differences_at_once(sidecar: PlanSidecar) -> None:
    plan = replace(sidecar, version="11.4.0", gpu=T4, machine="Windows AMD64")
    with pytest.raises(InferenceError, match=r"11\.4\.0.*Tesla T4.*Windows AMD64"):
        check_plan_fits(plan, HERE, uri="m.plan")
