"""What can be said of the machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from retinaray.inference.tensorrt_device import describe_machine, read_driver_version


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025\n"
        "GCC version:  gcc version 12.2.0\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (x)\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.95.05  Release Build\n",
    ],
    ids=["closed", "open", "arm"],
)
def test_read_driver_version_reads_what_the_kernel_module_says(tmp_path: Path, text: str) -> None:
    path = tmp_path / "version"
    path.write_text(text, "utf-8")
    assert read_driver_version(path) == "580.95.05"


def test_read_driver_version_is_empty_when_there_is_none(tmp_path: Path) -> None:
    assert read_driver_version(tmp_path / "absent") == ""
    (tmp_path / "version").write_text("something else 1\n", "utf-8")
    assert read_driver_version(tmp_path / "version") == ""


def test_describe_machine_names_system_and_processor() -> None:
    system, processor = describe_machine().split(" ")
    assert system in ("Linux", "Darwin", "Windows")
    assert processor
