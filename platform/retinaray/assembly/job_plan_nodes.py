"""The machines that a job is planned for: EC2 types by name, others by what they have, or this one.

Knows no job and asks no cluster.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from retinaray.config.plan_schema import NodeRequest
from retinaray.machine import count_cores

GIB = 1 << 30

# Of each family: GPUs' memory in GiB, and by size (CPUs, GPUs, memory in GiB).
_EC2: dict[str, tuple[int, dict[str, tuple[int, int, int]]]] = {
    "g4dn": (
        16,
        {
            "xlarge": (4, 1, 16),
            "2xlarge": (8, 1, 32),
            "4xlarge": (16, 1, 64),
            "8xlarge": (32, 1, 128),
            "12xlarge": (48, 4, 192),
            "16xlarge": (64, 1, 256),
        },
    ),
    "g5": (
        24,
        {
            "xlarge": (4, 1, 16),
            "2xlarge": (8, 1, 32),
            "4xlarge": (16, 1, 64),
            "8xlarge": (32, 1, 128),
            "12xlarge": (48, 4, 192),
            "16xlarge": (64, 1, 256),
            "24xlarge": (96, 4, 384),
            "48xlarge": (192, 8, 768),
        },
    ),
    "g6": (
        24,
        {
            "xlarge": (4, 1, 16),
            "2xlarge": (8, 1, 32),
            "4xlarge": (16, 1, 64),
            "8xlarge": (32, 1, 128),
            "12xlarge": (48, 4, 192),
            "16xlarge": (64, 1, 256),
            "24xlarge": (96, 4, 384),
            "48xlarge": (192, 8, 768),
        },
    ),
    "g6e": (
        48,
        {
            "xlarge": (4, 1, 32),
            "2xlarge": (8, 1, 64),
            "4xlarge": (16, 1, 128),
            "8xlarge": (32, 1, 256),
            "12xlarge": (48, 4, 384),
            "16xlarge": (64, 1, 512),
            "24xlarge": (96, 4, 768),
            "48xlarge": (192, 8, 1536),
        },
    ),
    "p3": (16, {"2xlarge": (8, 1, 61), "8xlarge": (32, 4, 244), "16xlarge": (64, 8, 488)}),
    "p4d": (40, {"24xlarge": (96, 8, 1152)}),
    "p4de": (80, {"24xlarge": (96, 8, 1152)}),
    "p5": (80, {"48xlarge": (192, 8, 2048)}),
}
# Families without GPUs: GiB per CPU, and their numbers of CPUs.
_PLAIN_EC2 = {
    "c6i": (2, (4, 8, 16, 32, 48, 64, 96, 128)),
    "c7i": (2, (4, 8, 16, 32, 48, 64, 96, 192)),
    "m6i": (4, (4, 8, 16, 32, 48, 64, 96, 128)),
    "m7i": (4, (4, 8, 16, 32, 48, 64, 96, 192)),
    "r6i": (8, (4, 8, 16, 32, 48, 64, 96, 128)),
}
_CPUS_PER_XLARGE = 4
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class NodeKind:
    """Equal machines.

    Attributes:
        name: What they are called.
        count: How many.
        num_cpus: Logical processors of each.
        num_gpus: GPUs of each.
        memory_bytes: Host memory of each.
        gpu_memory_bytes: Memory of each of their GPUs; 0 without any.
    """

    name: str
    count: int
    num_cpus: float
    num_gpus: int
    memory_bytes: int
    gpu_memory_bytes: int = 0


def resolve_nodes(requests: Iterable[NodeRequest]) -> tuple[tuple[NodeKind, ...], tuple[str, ...]]:
    """Machines by what they have.

    Args:
        requests: As they were asked for.

    Returns:
        Those that are known, and one line for each type that is not.

    Source: vCPUs, GPUs and memory of AWS's instance types as of 2025, held against the list of AWS
    types in OpenShift's documentation and, for g6e, torchx's; memory of GPUs is the nominal one.
    """
    table = _list_types()
    nodes, unknown = [], []
    for request in requests:
        if request.type is None:
            have = request.resources
            num_gpus = int(have.get("gpu", 0))
            nodes.append(
                NodeKind(
                    name=f"{have['cpu']:g} CPUs, {num_gpus} GPUs",
                    count=request.count,
                    num_cpus=have["cpu"],
                    num_gpus=num_gpus,
                    memory_bytes=int(have["mem"]),
                    gpu_memory_bytes=int(have.get("gpu_mem", 0)),
                )
            )
        elif request.type in table:
            num_cpus, num_gpus, memory_gib, gpu_gib = table[request.type]
            nodes.append(
                NodeKind(
                    name=request.type,
                    count=request.count,
                    num_cpus=num_cpus,
                    num_gpus=num_gpus,
                    memory_bytes=memory_gib * GIB,
                    gpu_memory_bytes=gpu_gib * GIB,
                )
            )
        else:
            unknown.append(
                f"nodes: {request.type!r} is no machine that is known here: write "
                f"{request.count}x(cpu=..,gpu=..,mem=..GiB,gpu_mem=..GiB); known are "
                f"{', '.join([*_EC2, *_PLAIN_EC2])}, as in g5.12xlarge"
            )
    return tuple(nodes), tuple(unknown)


def _list_types() -> dict[str, tuple[int, int, int, int]]:
    """CPUs, GPUs, GiB of memory and GiB of each GPU, by type."""
    table = {
        f"{family}.{size}": (*parts, gpu_gib)
        for family, (gpu_gib, sizes) in _EC2.items()
        for size, parts in sizes.items()
    }
    for family, (gib_per_cpu, sizes) in _PLAIN_EC2.items():
        for num_cpus in sizes:
            factor = num_cpus // _CPUS_PER_XLARGE
            size = "xlarge" if factor == 1 else f"{factor}xlarge"
            table[f"{family}.{size}"] = (num_cpus, 0, gib_per_cpu * num_cpus, 0)
    return table


def describe_this_machine() -> NodeKind:
    """This machine: its processors, its memory or its container's, its GPUs as torch sees them."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text("ascii").strip() if _CGROUP_LIMIT.is_file() else "max"
    gpus = [
        torch.cuda.get_device_properties(index).total_memory
        for index in range(torch.cuda.device_count())
    ]
    return NodeKind(
        name="this machine",
        count=1,
        num_cpus=count_cores(),
        num_gpus=len(gpus),
        memory_bytes=min(memory, int(limit)) if limit.isdecimal() else memory,
        gpu_memory_bytes=min(gpus, default=0),
    )
