"""What this machine offers to this process."""

from __future__ import annotations

import os


def count_cores() -> int:
    """Processor cores that this process may use: its affinity, where the system knows one."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
