"""One of three nodes of an inference is lost, in three ways, with parts in its hands."""

from __future__ import annotations

import time
from collections.abc import Callable

from clusters import Host, RayCluster
from environments import PROGRAMS
from lab import FINISH_S, Finding, Lab
from machines import RehearsalError, wait_until
from workload import NUM_PARTS, NUM_TEST, PART_SIZE, Command, Results

_WORKERS = 3
# Of each worker at least its first part.
_WAITING = _WORKERS * PART_SIZE
_NOTICE_S = 8
_DEATH_S = 90.0


def kill_inference_node(lab: Lab) -> Finding:
    """End all processes of a node at once."""
    return _disturb(
        lab, "killed", lambda cluster, victim: cluster.remove(victim), "all its processes killed"
    )


def cut_inference_node_off(lab: Lab) -> Finding:
    """Let a node go silent: nobody is told that it is gone."""
    cluster = lab.open_cluster()
    has_cable = cluster.has_namespaces

    def cut(_: RayCluster, victim: Host) -> None:
        victim.machine.cut_off()

    finding = _disturb(lab, "cut-off", cut, "its cable pulled" if has_cable else "it was stopped")
    _bury(cluster)
    return finding


def drain_inference_node(lab: Lab) -> Finding:
    """Give a node notice, as a spot instance gets it, and take it away at the deadline."""

    def reclaim(cluster: RayCluster, victim: Host) -> None:
        deadline = time.monotonic() + _NOTICE_S
        node = cluster.find_node(victim)
        notice = [
            *(str(PROGRAMS / "ray"), "drain-node", "--address", cluster.address),
            *("--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
            *("--reason-message", "spot", "--deadline-remaining-seconds", str(_NOTICE_S)),
        ]
        log = victim.folder / "drain.log"
        Command(cluster.launch_on_head(notice, log), log).expect_success(timeout_s=_DEATH_S)
        wait_until(
            lambda: not victim.machine.is_running() or time.monotonic() > deadline,
            "the deadline",
            timeout_s=_DEATH_S,
        )
        cluster.remove(victim)

    return _disturb(lab, "drained", reclaim, f"{_NOTICE_S} s of notice, then it was killed")


def _disturb(lab: Lab, name: str, disturb: Callable[[RayCluster, Host], None], how: str) -> Finding:
    """Run an inference whose images are held until every node has work; then disturb a node."""
    cluster, workload = lab.open_cluster(), lab.workload
    expected = lab.undisturbed_results(cluster)
    hosts = cluster.reshape([2, 2, 2])
    for host in hosts:
        host.door.forget()
        host.door.admit(0)
    run = lab.start_inference(cluster, name, workers=_WORKERS)
    run.wait_until(
        lambda: sum(host.door.num_waiting for host in hosts) >= _WAITING,
        f"{_WORKERS} workers that read images",
        timeout_s=FINISH_S,
    )
    victim = choose_victim(hosts)
    for host in hosts:
        host.door.admit(None if host is not victim else 0)
    run.wait_until(lambda: workload.count_parts(name) >= 2, "two parts", timeout_s=FINISH_S)
    in_hand = workload.find_parts(victim.door.asked)
    moment = time.time()
    disturb(cluster, victim)
    run.finish(timeout_s=FINISH_S)
    compare_results(workload.read_results(name), expected)
    times = workload.list_parts(name)
    recovery_s = max(times[part] for part in in_hand) - moment
    if recovery_s < 0:
        raise RehearsalError(f"expected parts {sorted(in_hand)} to be lost, they were committed")
    return Finding(
        f"1 of 3 inference nodes lost with {len(in_hand)} parts in hand: {how}",
        f"{NUM_PARTS} of {NUM_PARTS} parts, {NUM_TEST} images once each, all files equal to those "
        "of an undisturbed run byte for byte",
        recovery_s,
    )


def choose_victim(hosts: list[Host]) -> Host:
    """The node with the least work, so that most of it goes on; but it has some.

    Raises:
        RehearsalError: If all work is on one node.
    """
    busy = [host for host in hosts if host.door.num_waiting]
    if len(busy) < 2:
        raise RehearsalError(f"expected workers on 2 nodes at least, they are on {len(busy)}")
    return min(busy, key=lambda host: host.door.num_waiting)


def compare_results(found: Results, expected: Results) -> None:
    """Refuse results that differ from the undisturbed ones in any byte.

    Raises:
        RehearsalError: If files are missing, surplus or different.
    """
    different = sorted(
        name for name in {*found, *expected} if found.get(name) != expected.get(name)
    )
    if different:
        raise RehearsalError(
            f"expected {len(expected)} files as in an undisturbed run, {len(different)} differ: "
            f"{', '.join(different[:4])}"
        )


def _bury(cluster: RayCluster) -> None:
    """Wait until the head has given the silent node up, and switch it off.

    Raises:
        RehearsalError: If the head still takes it for alive.
    """
    living = {node.address for node in cluster.list_workers()}
    silent = [host for host in cluster.workers if host.machine.address not in living]
    if len(silent) != 1:
        raise RehearsalError(f"expected the head to have given up 1 node, it gave up {len(silent)}")
    cluster.remove(silent[0])
