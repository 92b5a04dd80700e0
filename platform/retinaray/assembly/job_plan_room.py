"""Whether the processes of a job fit into the memory of the machines: estimates with allowances.

Everything that is assumed stands here, by name, with where it comes from.
"""

from __future__ import annotations

from collections.abc import Sequence

from retinaray.assembly.job_plan_nodes import NodeKind
from retinaray.assembly.job_plan_workers import WorkerPlan, count_on_node
from retinaray.reporting.plan_table import PlanSheet, format_bytes

_MIB = 1 << 20
# A worker with Ray, torch and this package, without its network: 706 MiB with a ResNet-50 network
# on a processor were measured, of which 130 MiB are the network.
WORKER_BASE_BYTES = 600 * _MIB
# A process that decodes, before its first image: 324 MiB (PSS) were measured.
LOADER_BASE_BYTES = 330 * _MIB
# Ray's own processes of a machine, and the driver with its controllers: Ray 2.60, measured.
NODE_BASE_BYTES = 1536 * _MIB
# Ray ends processes when a machine is fuller than this.
_USABLE_HOST_SHARE = 0.95
# The nominal memory less what a driver shows: 15,360 of 16,384 MiB on a T4, 23,028 of 24,576 on an
# A10G.
_USABLE_GPU_SHARE = 0.937
# Assumptions, not studied: context and workspaces of kernels, and what the allocator cannot use.
_GPU_PROCESS_BYTES = 1024 * _MIB
_GPU_FRAGMENTATION = 1.1
# See `decode_memory`: JPEG and PNG; other formats take up to 20.
_DECODE_BYTES_PER_PIXEL = 8
_ASSUMED_PIXELS = 4000 * 2250


def estimate_decoding(largest_pixels: int | None, largest_file_bytes: int) -> int:
    """Bytes that one image takes while it is decoded, its file included.

    Args:
        largest_pixels: Of the largest image; none = that of a photo is assumed.
        largest_file_bytes: Of the largest file.
    """
    pixels = _ASSUMED_PIXELS if largest_pixels is None else largest_pixels
    return _DECODE_BYTES_PER_PIXEL * pixels + 2 * largest_file_bytes


def check_gpu_room(
    peak_bytes: int, num_per_gpu: int, nodes: Sequence[NodeKind], sheet: PlanSheet
) -> None:
    """Say how much GPU memory is needed, and which machines have less.

    Args:
        peak_bytes: Of one process, workspaces not counted.
        num_per_gpu: Processes that share a GPU.
        nodes: The machines; those without GPUs are left alone.
        sheet: Gets the figure, and what is missing.
    """
    needed = round(num_per_gpu * (peak_bytes * _GPU_FRAGMENTATION + _GPU_PROCESS_BYTES))
    note = f"{num_per_gpu} of them, with 10 % and 1 GiB each for kernels and context (assumed)"
    sheet.estimate("GPU memory per worker", "needed_per_gpu_bytes", needed, note)
    for node in nodes:
        usable = node.gpu_memory_bytes * _USABLE_GPU_SHARE
        if node.num_gpus and needed > usable:
            sheet.miss(
                f"{node.name}: a GPU has about {format_bytes(usable)}, its workers need about "
                f"{format_bytes(needed)}: lower the batch or the canvas, or take larger GPUs"
            )


def _name(node: NodeKind) -> str:
    return f"needed_on_{node.name.replace(' ', '_')}_bytes"


def check_host_room(
    worker_bytes: int,
    workers: WorkerPlan,
    num_processes: int,
    nodes: Sequence[NodeKind],
    sheet: PlanSheet,
    *,
    store_bytes: int = 0,
) -> None:
    """Say how much host memory each machine needs, and which have less.

    Args:
        worker_bytes: Of one worker process with what belongs to it.
        workers: What each takes.
        num_processes: All workers that run at once.
        nodes: The machines.
        sheet: Gets the figures, and what is missing.
        store_bytes: Of the object store, in all machines together.
    """
    fit = [node for node in nodes if node.num_gpus or not workers.num_gpus]
    num_nodes = sum(node.count for node in fit)
    for node in fit:
        count = count_on_node(workers, num_processes, node, num_nodes=num_nodes)
        needed = NODE_BASE_BYTES + count * worker_bytes + store_bytes // num_nodes
        workers_here = "1 worker" if count == 1 else f"{count} workers"
        note = f"{workers_here}, {format_bytes(NODE_BASE_BYTES)} for Ray and the driver"
        sheet.estimate("host memory per node", _name(node), needed, note)
        if needed > node.memory_bytes * _USABLE_HOST_SHARE:
            sheet.miss(
                f"{node.name}: has {format_bytes(node.memory_bytes)} of memory, {workers_here} "
                f"and Ray need about {format_bytes(needed)}: fewer workers per machine, a smaller "
                "batch, or machines with more memory"
            )
