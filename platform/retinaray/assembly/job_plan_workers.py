"""How many workers a job has and what each takes: pure decisions, shared by `plan` and the drivers.

Knows no Ray. What it refuses here is refused before anything is started.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from retinaray.assembly.job_plan_nodes import NodeKind
from retinaray.errors import ClusterError

PARTS_AT_ONCE = 2
"""Parts that a worker has in hand: one is read and committed while the engine has the other."""
DECODE_GROUP = 8
"""Images that travel together to a decoding task."""
CHECKPOINTS_KEPT = 2
"""The best and the last one."""
PREFETCHED_BATCHES = 4
"""Batches that each loader process has ready."""

_CPU_THREADS_PER_ENGINE = 2
_MAX_LOADERS = 16


@dataclass(frozen=True)
class ClusterSize:
    """What a Ray cluster offers in all.

    Attributes:
        num_cpus: Logical processors.
        num_gpus: GPUs.
        num_nodes: Machines.
        is_local: Whether the cluster was started by and for this command.
    """

    num_cpus: float
    num_gpus: float
    num_nodes: int
    is_local: bool

    def counting_on(self, *, num_cpus: int | None, num_gpus: int | None) -> ClusterSize:
        """The cluster as a job may count on it.

        Args:
            num_cpus: Logical processors; none = those that are there, or as many as the GPUs.
            num_gpus: GPUs; none = those that are there.

        Raises:
            ClusterError: If more is wanted of this machine alone, to which nobody brings anything.
        """
        gpus = self.num_gpus if num_gpus is None else num_gpus
        # No machine with GPUs has fewer processors than GPUs.
        cpus = max(self.num_cpus, gpus) if num_cpus is None else num_cpus
        if self.is_local and (gpus > self.num_gpus or cpus > self.num_cpus):
            raise ClusterError(
                f"expected {cpus:g} CPUs and {gpus:g} GPUs (--cpus, --gpus), this machine has "
                f"{self.num_cpus:g} and {self.num_gpus:g} and there is no cluster to grow: set "
                "RAY_ADDRESS, or leave these options out"
            )
        return replace(self, num_cpus=cpus, num_gpus=gpus)


@dataclass(frozen=True)
class WorkerPlan:
    """How many worker processes run, and what each takes.

    Attributes:
        num_workers: Processes.
        num_cpus: Logical processors that each reserves.
        num_gpus: GPUs that each reserves, at most 1; 0 without any.
        num_threads: Threads that each computes with.
    """

    num_workers: int
    num_cpus: float
    num_gpus: float
    num_threads: int


@dataclass(frozen=True)
class SweepPlan:
    """Resources of a sweep.

    Attributes:
        num_concurrent: Trials at once.
        workers: Of each trial.
    """

    num_concurrent: int
    workers: WorkerPlan


def plan_training(num_workers: int, cluster: ClusterSize) -> WorkerPlan:
    """Resources of the training workers: one GPU each where there are any, else processors.

    Raises:
        ClusterError: If the cluster has GPUs but fewer than workers, or fewer processors than
            workers.
    """
    if cluster.num_gpus and cluster.num_gpus < num_workers:
        raise ClusterError(
            f"run.workers={num_workers} needs {num_workers} GPUs, the cluster has "
            f"{cluster.num_gpus:g}: lower --workers, add GPU nodes, or say with --gpus how many an "
            "autoscaler will bring"
        )
    if cluster.num_cpus < num_workers:
        raise ClusterError(
            f"run.workers={num_workers} needs {num_workers} CPUs, the cluster has "
            f"{cluster.num_cpus:g}: lower --workers, add nodes, or say with --gpus or --cpus how "
            "many an autoscaler will bring"
        )
    threads = max(1, int(cluster.num_cpus / num_workers))
    num_gpus = 1 if cluster.num_gpus else 0
    return WorkerPlan(num_workers=num_workers, num_cpus=1, num_gpus=num_gpus, num_threads=threads)


def plan_inference(
    num_workers: int | None,
    num_parts: int,
    cluster: ClusterSize,
    *,
    gpus_per_worker: float = 1.0,
    decode_cpus: int = 0,
) -> WorkerPlan:
    """Resources of the engine workers; one processor at least stays free for Ray Data itself.

    Args:
        num_workers: As asked for; none = as many as the GPUs hold, or one per two processors
            without GPUs.
        num_parts: Units of work: more workers than these would idle.
        cluster: What there is.
        gpus_per_worker: Part of a GPU that each takes: 1, or 1 divided by a whole number.
        decode_cpus: Processors that decode for all workers, and are not theirs.

    Raises:
        ClusterError: If the cluster has GPUs but not enough for the workers, or too few processors.
    """
    num_gpus = _share_gpu(gpus_per_worker) if cluster.num_gpus else 0.0
    capacity = int(cluster.num_gpus) * round(1 / gpus_per_worker)
    if num_workers is None:
        by_cpu = max(1, int(cluster.num_cpus // _CPU_THREADS_PER_ENGINE))
        num_workers = capacity or by_cpu
    elif cluster.num_gpus and capacity < num_workers:
        raise ClusterError(
            f"workers={num_workers} of {gpus_per_worker:g} GPUs each do not fit on the "
            f"{cluster.num_gpus:g} GPUs of the cluster: lower --workers or --gpus-per-worker, add "
            "GPU nodes, or say with --gpus how many an autoscaler will bring"
        )
    num_workers = max(1, min(num_workers, num_parts))
    if decode_cpus and cluster.num_cpus < decode_cpus + 1:
        # Tasks that no node can take wait for ever, without an error.
        raise ClusterError(
            f"decoding.num_cpus={decode_cpus} leaves none of {cluster.num_cpus:g} CPUs to Ray and "
            "to the engines: lower --decode-cpus or add CPU nodes"
        )
    # Ray Data stalls without an error when its actors hold every logical CPU.
    free = max(0.5, cluster.num_cpus - decode_cpus - 1)
    num_cpus = min(1.0, int(100 * free / num_workers) / 100)
    if num_cpus < 0.01:
        raise ClusterError(
            f"workers={num_workers} is too many for {cluster.num_cpus:g} CPUs: lower --workers, "
            "add nodes, or say with --cpus how many an autoscaler will bring"
        )
    return WorkerPlan(
        num_workers=num_workers,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        num_threads=max(1, int(cluster.num_cpus / num_workers)),
    )


def plan_sweep(
    *, num_trials: int, num_concurrent: int | None, num_workers: int, cluster: ClusterSize
) -> SweepPlan:
    """Fit trials into a cluster, all workers of all running trials at once.

    A trial that holds some of its workers while it waits for the others would wait for ever, so
    what does not fit is refused here.

    Args:
        num_trials: Trials in all: no more than these run at once.
        num_concurrent: As asked for; none = as many as fit.
        num_workers: Workers of each trial: a GPU each where there are any, and a processor each.
        cluster: What there is.

    Raises:
        ClusterError: If not even one trial fits, or fewer than asked for.
    """
    what, available = "CPU", cluster.num_cpus
    if 0 < cluster.num_gpus <= cluster.num_cpus:
        what, available = "GPU", cluster.num_gpus
    slots = int(available // num_workers)
    each = f"{num_workers} {what}{'s' if num_workers > 1 else ''}"
    if slots < 1:
        raise ClusterError(
            f"run.workers={num_workers}: a trial needs {each}, the cluster has {available:g}: "
            "lower --workers, add nodes, or say with --gpus or --cpus how many an autoscaler will "
            "bring"
        )
    if num_concurrent is not None and min(num_concurrent, num_trials) > slots:
        asked = min(num_concurrent, num_trials)
        raise ClusterError(
            f"sweep.concurrent={num_concurrent}: {asked} trials x {each} need "
            f"{asked * num_workers} {what}s, the cluster has {available:g}: "
            f"lower --concurrent to {slots}, lower --workers, or add nodes"
        )
    concurrent = min(num_concurrent or slots, num_trials)
    return SweepPlan(
        num_concurrent=concurrent,
        workers=WorkerPlan(
            num_workers=num_workers,
            num_cpus=1,
            num_gpus=1 if cluster.num_gpus else 0,
            num_threads=max(1, int(cluster.num_cpus / (num_workers * concurrent))),
        ),
    )


def count_threads(planned: int, *, num_cpus: float, num_gpus: float) -> int:
    """Threads of a worker, once it is on its machine.

    A plan that counts on machines which an autoscaler has still to bring knows little of their
    processors; beside a GPU they are there to be used.

    Args:
        planned: Threads by the plan.
        num_cpus: Logical processors of the machine.
        num_gpus: Its GPUs; without any the plan holds.
    """
    return max(planned, int(num_cpus / num_gpus)) if num_gpus else planned


def count_loaders(asked: int | None, *, num_threads: int, has_gpu: bool) -> int:
    """Decoding processes of a worker: one per core beside a GPU; on a CPU they fight the step.

    Args:
        asked: As asked for; none = chosen here.
        num_threads: Threads of the worker.
        has_gpu: Whether it trains on a GPU.
    """
    if asked is not None:
        return asked
    return min(_MAX_LOADERS, max(1, num_threads - 1)) if has_gpu else 0


def add_up(nodes: Iterable[NodeKind], *, is_local: bool, min_cpus: int = 1) -> ClusterSize:
    """What machines are together for Ray.

    Args:
        nodes: The machines; at least one.
        is_local: A cluster of this machine alone, started by the command.
        min_cpus: Logical processors that such a cluster has at least; see `connect`.
    """
    nodes = tuple(nodes)
    num_cpus = sum(node.count * node.num_cpus for node in nodes)
    return ClusterSize(
        num_cpus=max(num_cpus, min_cpus) if is_local else num_cpus,
        num_gpus=sum(node.count * node.num_gpus for node in nodes),
        num_nodes=sum(node.count for node in nodes),
        is_local=is_local,
    )


def count_on_node(plan: WorkerPlan, num_processes: int, node: NodeKind, *, num_nodes: int) -> int:
    """Worker processes on one machine, at most.

    Args:
        plan: What each of them takes.
        num_processes: All of them, those of all trials at once included.
        node: The machine.
        num_nodes: Machines in all: processes without GPUs are spread over these.

    Returns:
        With GPUs as many as its GPUs hold: they are filled up one machine after the other.
    """
    if plan.num_gpus:
        return min(num_processes, node.num_gpus * int(1 / plan.num_gpus + 1e-9))
    return math.ceil(num_processes / num_nodes)


def _share_gpu(gpus_per_worker: float) -> float:
    """What Ray is asked for: it counts in 1/10000, and of a third rounded up only two fit."""
    return math.floor(10_000 / round(1 / gpus_per_worker)) / 10_000
