"""Work appears on a cluster of a head alone: a node comes, the work is done, the node goes."""

from __future__ import annotations

from typing import Any

from inference_scenarios import compare_results
from lab import FINISH_S, Finding, Lab
from machines import RehearsalError, wait_until
from workload import NUM_TEST

_IDLE_S = 12
# What Ray's fake provider expects the head to be called.
_HEAD_NODE_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
# By its path: Ray's name for it, fake_multinode, wants a file that the wheel of Ray 2.60 lacks.
_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
_OBJECT_STORE_BYTES = 80_000_000
# As the nodes of the undisturbed run: with other threads sums are rounded otherwise.
_NODE_CPUS = 2
# Nodes are processes: there is nothing to copy to them, and nothing to run on them.
_EMPTY: dict[str, Any] = {
    "auth": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}
_NAME = "autoscaled"


def make_configuration(*, idle_s: float) -> dict[str, Any]:
    """A cluster like that of `ray_cluster.yaml`, with Ray's fake provider in place of AWS."""
    return {
        "cluster_name": "rehearsal",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            "type": "external",
            "module": _PROVIDER,
            "gcs_address": "{address}",
            "head_node_id": _HEAD_NODE_ID,
            "launch_multiple": True,
            # There is no SSH to them.
            "disable_node_updaters": True,
        },
        **_EMPTY,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            # The provider knows the head by this name.
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "cpu": {
                "resources": {"CPU": _NODE_CPUS, "object_store_memory": _OBJECT_STORE_BYTES},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
    }


def scale_from_zero(lab: Lab) -> Finding:
    """Start an inference where no node is; it must wait for one, and give it back."""
    expected = lab.undisturbed_results(lab.open_cluster())
    cluster = lab.open_autoscaling_cluster(make_configuration(idle_s=_IDLE_S))
    before = cluster.list_workers()
    if before:
        raise RehearsalError(f"expected no node before there is work, got {len(before)}")
    run = lab.start_inference(cluster, _NAME, workers=2, num_cpus=2 * _NODE_CPUS)
    came_s = run.wait_until(
        lambda: bool(cluster.list_workers()), "a node for the waiting work", timeout_s=FINISH_S
    )
    run.finish(timeout_s=FINISH_S)
    compare_results(lab.workload.read_results(_NAME), expected)
    num_nodes = len([node for node in cluster.list_nodes() if not node.is_head])
    wait_until(
        lambda: not cluster.list_workers(),
        f"the idle nodes to be given back after {_IDLE_S} s",
        timeout_s=FINISH_S,
        pause_s=0.5,
    )
    lab.reset()
    return Finding(
        "inference started on a head without nodes; autoscaler with a fake provider",
        f"{num_nodes} node(s) came for it; {NUM_TEST} images once each, all files equal to those "
        f"of an undisturbed run byte for byte; idle nodes given back after {_IDLE_S} s",
        came_s,
    )
