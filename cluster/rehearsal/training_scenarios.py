"""A node of a training is lost in the middle; it goes on when another node has taken its place."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from clusters import Host
from lab import FINISH_S, Finding, Lab
from machines import RehearsalError
from workload import NUM_STEPS, NUM_TRAIN, Workload

_WORKERS = 2
# One worker's images of the first epoch, and of half of the second.
_IMAGES_BEFORE = 3 * (NUM_TRAIN // _WORKERS) // 2
_NAME = "killed"


def kill_training_node(lab: Lab) -> Finding:
    """End one of two nodes after the first checkpoint; a new node comes."""
    cluster, workload = lab.open_cluster(), lab.workload
    expected = lab.undisturbed_tensors(cluster)
    hosts = cluster.reshape([1, 1])
    for host in hosts:
        host.door.admit(_IMAGES_BEFORE)
    run = lab.start_training(cluster, _NAME)
    run.wait_until(
        lambda: (
            all(host.door.num_waiting for host in hosts)
            and max(workload.read_steps(_NAME), default=0) > workload.read_checkpoint(_NAME) > 0
        ),
        "a checkpoint, and a step of the epoch after it",
        timeout_s=FINISH_S,
    )
    reported, checkpoint = len(workload.read_steps(_NAME)), workload.read_checkpoint(_NAME)
    victim, survivor = choose_victim(hosts, cluster.find_actors("EventBoard"))
    cluster.remove(victim)
    survivor.door.admit(None)
    cluster.add(1)
    recovery_s = run.wait_until(
        lambda: checkpoint + 1 in workload.read_steps(_NAME)[reported:],
        f"step {checkpoint + 1} again, after the checkpoint in step {checkpoint}",
        timeout_s=FINISH_S,
    )
    outcome = run.finish(timeout_s=FINISH_S)
    steps = workload.read_steps(_NAME)[reported:]
    check_continuation(steps, checkpoint=checkpoint, taken=outcome.get("steps"))
    _compare(workload, expected)
    return Finding(
        f"1 of 2 training nodes killed after step {reported} of {NUM_STEPS}, a new node started",
        f"went on from step {checkpoint}, {NUM_STEPS} steps in all, weights equal to those of an "
        "undisturbed training bit for bit",
        recovery_s,
    )


def choose_victim(hosts: Sequence[Host], addresses: Collection[str]) -> list[Host]:
    """The two nodes, first the one with a helper of the driver on it: the worse loss.

    Args:
        hosts: The nodes.
        addresses: Where helpers run.
    """
    return sorted(hosts, key=lambda host: host.machine.address not in addresses)


def check_continuation(steps: list[int], *, checkpoint: int, taken: object) -> None:
    """Refuse a training that did not go on from its checkpoint, step by step, to its end.

    Args:
        steps: Reported after the disturbance, in the order of the reports.
        checkpoint: Step of the checkpoint that there was.
        taken: Steps that the training says it has taken in all.

    Raises:
        RehearsalError: If steps are missing, or it started over.
    """
    expected = list(range(checkpoint + 1, NUM_STEPS + 1))
    # Before them come reports that were on their way when the node was lost.
    if steps[-len(expected) :] != expected or taken != NUM_STEPS:
        raise RehearsalError(
            f"expected steps {expected} after the checkpoint and {NUM_STEPS} in all, got {steps} "
            f"and {taken}"
        )


def _compare(workload: Workload, expected: dict[str, torch.Tensor]) -> None:
    found = workload.read_tensors(_NAME)
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    if different or set(found) != set(expected):
        raise RehearsalError(
            f"expected the weights of an undisturbed training, {len(different)} of {len(expected)} "
            f"tensors differ, first {different[:2]}"
        )
