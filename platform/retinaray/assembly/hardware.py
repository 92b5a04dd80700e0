"""What a measurement ran on, in words."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

_CPU_INFO = Path("/proc/cpuinfo")


def describe_hardware() -> str:
    """Processor and number of cores, and the GPU where torch has one."""
    parts = [_name_processor()]
    if torch.cuda.is_available():
        parts.append(str(torch.cuda.get_device_name()))
    return ", ".join(parts)


def _name_processor() -> str:
    # Linux tells the model in this file only.
    lines = _CPU_INFO.read_text("utf-8").splitlines() if _CPU_INFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
