"""The description beside a plan: written, read, and refused when it is not what it should be."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from retinaray.artifact import ModelCard, hash_content
from retinaray.errors import CheckpointError
from retinaray.inference.plan_sidecar import (
    GpuInfo,
    PlanSidecar,
    check_plan_content,
    read_sidecar,
    sidecar_uri,
    write_sidecar,
)

PLAN = b"a serialized engine"


@pytest.fixture
def sidecar(tiny_card: ModelCard) -> PlanSidecar:
    return PlanSidecar(
        card=tiny_card,
        input_type="uint8",
        precision="fp16",
        batch=(1, 4, 8),
        flavour="tensorrt",
        version="10.16.1.11",
        gpu=GpuInfo("NVIDIA H200", (9, 0), "13.0", "580.95.05"),
        machine="Linux x86_64",
        workspace_bytes=1 << 30,
        optimization_level=3,
        version_compatible=False,
        hardware_compatibility="none",
        allow_tf32=True,
        plan_bytes=len(PLAN),
        plan_sha256=hash_content(PLAN),
        onnx_sha256=hash_content(b"onnx"),
    )


def test_read_sidecar_gives_back_what_was_written(sidecar: PlanSidecar) -> None:
    assert read_sidecar(write_sidecar(sidecar), uri="m.plan") == sidecar


def test_read_sidecar_gives_back_a_plan_that_was_built_without_a_gpu(sidecar: PlanSidecar) -> None:
    without = replace(sidecar, gpu=None)
    assert read_sidecar(write_sidecar(without), uri="m.plan") == without


def test_write_sidecar_is_readable_by_people_and_programs(sidecar: PlanSidecar) -> None:
    values = json.loads(write_sidecar(sidecar))
    assert values["format"] == "retinaray-plan-1"
    assert values["gpu"] == {
        "name": "NVIDIA H200",
        "compute_capability": [9, 0],
        "cuda": "13.0",
        "driver": "580.95.05",
    }
    assert values["batch"] == [1, 4, 8]
    assert values["onnx_sha256"] == hash_content(b"onnx")
    assert json.loads(values["card"]["retinaray.canvas"]) == [64, 96]
    assert write_sidecar(sidecar) == write_sidecar(sidecar)


def test_sidecar_uri_lies_beside_the_plan() -> None:
    assert sidecar_uri("s3://bucket/a/engine.plan") == "s3://bucket/a/engine.plan.json"


def test_read_sidecar_says_what_belongs_there_when_it_is_missing() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"a/m\.plan\.json: expected .* belongs to a/m\.plan, .*export model\.pth m\.plan",
    ):
        read_sidecar(None, uri="a/m.plan")


def test_read_sidecar_says_that_it_may_be_truncated(sidecar: PlanSidecar) -> None:
    content = write_sidecar(sidecar)
    for length in (0, 1, len(content) // 2, len(content) - 3):
        with pytest.raises(CheckpointError, match=rf"\({length} bytes\), it may be truncated"):
            read_sidecar(content[:length], uri="m.plan")


@pytest.mark.parametrize("content", [b"[]", b"3", b'{"format": "other-1"}', b"{}", b'"x"', b"null"])
def test_read_sidecar_refuses_another_format(content: bytes) -> None:
    with pytest.raises(CheckpointError, match="expected a description of format"):
        read_sidecar(content, uri="m.plan")


def test_read_sidecar_refuses_bytes_that_are_no_text() -> None:
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        read_sidecar(b"\xff\xfe\x00plan", uri="m.plan")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", None, "version is None"),
        ("plan_bytes", "12", "plan_bytes is '12'"),
        ("plan_bytes", True, "plan_bytes is True"),
        ("version_compatible", 1, "version_compatible is 1"),
        ("input_type", "int8", "input_type is 'int8'"),
        ("card", [], "card is missing"),
        ("batch", [1, 2], "ValueError"),
        ("batch", ["a", 1, 2], "ValueError"),
        ("gpu", {"name": "T4"}, "KeyError.*compute_capability"),
        ("gpu", {"name": "T4", "compute_capability": 75}, "TypeError"),
    ],
)
def test_read_sidecar_names_the_value_that_is_wrong(
    sidecar: PlanSidecar, key: str, value: Any, message: str
) -> None:
    values = json.loads(write_sidecar(sidecar)) | {key: value}
    with pytest.raises(CheckpointError, match=rf"m\.plan\.json: is damaged: .*{message}"):
        read_sidecar(json.dumps(values).encode(), uri="m.plan")


def test_read_sidecar_names_every_value_that_is_missing(sidecar: PlanSidecar) -> None:
    values = json.loads(write_sidecar(sidecar))
    del values["machine"], values["onnx_sha256"]
    with pytest.raises(CheckpointError, match="machine is missing; onnx_sha256 is missing"):
        read_sidecar(json.dumps(values).encode(), uri="m.plan")


def test_read_sidecar_names_what_the_card_lacks(sidecar: PlanSidecar) -> None:
    values = json.loads(write_sidecar(sidecar))
    del values["card"]["retinaray.categories"]
    with pytest.raises(CheckpointError, match=r"m\.plan\.json.*retinaray\.categories"):
        read_sidecar(json.dumps(values).encode(), uri="m.plan")


def test_check_plan_content_accepts_the_plan(sidecar: PlanSidecar) -> None:
    check_plan_content(sidecar, PLAN, uri="m.plan")


def test_check_plan_content_says_that_a_plan_is_truncated(sidecar: PlanSidecar) -> None:
    with pytest.raises(CheckpointError, match="expected 19 bytes, found 18: it is truncated"):
        check_plan_content(sidecar, PLAN[:-1], uri="m.plan")


@pytest.mark.parametrize("plan", [PLAN[:-1] + b"?", PLAN + b"more"], ids=["changed", "longer"])
def test_check_plan_content_says_that_files_do_not_belong_together(
    sidecar: PlanSidecar, plan: bytes
) -> None:
    with pytest.raises(
        CheckpointError,
        match=rf"{hash_content(plan)[:12]}.*{hash_content(PLAN)[:12]}.*do not belong together",
    ):
        check_plan_content(sidecar, plan, uri="m.plan")
