"""How many trials run at once and what each of their workers takes. Pure decisions."""

from __future__ import annotations

from dataclasses import dataclass

from retinaray.distributed.resources import ClusterSize, WorkerPlan
from retinaray.errors import ClusterError


@dataclass(frozen=True)
class SweepPlan:
    """Resources of a sweep.

    Attributes:
        num_concurrent: Trials at once.
        workers: Of each trial.
    """

    num_concurrent: int
    workers: WorkerPlan


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
            "lower --workers or add nodes"
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
