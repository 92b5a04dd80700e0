"""Reaching Ray, and deciding how much of it a job takes. Only `connect` talks to Ray."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from retinaray.errors import ClusterError
from retinaray.machine import count_cores

logger = logging.getLogger(__name__)

# Enough for the manifests and receipts that pass through it; pixels never do.
_OBJECT_STORE_BYTES = 512 * 1024 * 1024
_CPU_THREADS_PER_ENGINE = 2
_CONNECT_TIMEOUT_S = 10.0


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


def plan_training(num_workers: int, cluster: ClusterSize) -> WorkerPlan:
    """Resources of the training workers: one GPU each where there are any, else processors.

    Raises:
        ClusterError: If the cluster has GPUs but fewer than workers, or fewer processors than
            workers.
    """
    if cluster.num_gpus and cluster.num_gpus < num_workers:
        raise ClusterError(
            f"run.workers={num_workers} needs {num_workers} GPUs, the cluster has "
            f"{cluster.num_gpus:g}: "
            "lower --workers or add GPU nodes"
        )
    if cluster.num_cpus < num_workers:
        raise ClusterError(
            f"run.workers={num_workers} needs {num_workers} CPUs, the cluster has "
            f"{cluster.num_cpus:g}: "
            "lower --workers or add nodes"
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
            f"{cluster.num_gpus:g} GPUs of the cluster: lower --workers or --gpus-per-worker, or "
            "add GPU nodes"
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
            f"workers={num_workers} is too many for {cluster.num_cpus:g} CPUs: lower --workers "
            "or add nodes"
        )
    return WorkerPlan(
        num_workers=num_workers,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        num_threads=max(1, int(cluster.num_cpus / num_workers)),
    )


def _share_gpu(gpus_per_worker: float) -> float:
    """What Ray is asked for: it counts in 1/10000, and of a third rounded up only two fit."""
    return math.floor(10_000 / round(1 / gpus_per_worker)) / 10_000


@contextmanager
def connect(*, min_cpus: int = 1) -> Iterator[ClusterSize]:
    """Be connected to Ray: as already connected, at RAY_ADDRESS, or on this machine alone.

    Args:
        min_cpus: Logical processors that an own cluster shall have at least.

    Yields:
        What the cluster offers. An own cluster is stopped afterwards.

    Raises:
        ClusterError: If Ray cannot be reached or started.
    """
    _prepare_environment()
    import ray

    was_connected = ray.is_initialized()
    address = os.environ.get("RAY_ADDRESS")
    if not was_connected:
        _start(address, min_cpus)
    try:
        totals = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield ClusterSize(
            num_cpus=totals.get("CPU", 0),
            num_gpus=totals.get("GPU", 0),
            num_nodes=_count_nodes(),
            is_local=address is None,
        )
    finally:
        if not was_connected:
            ray.shutdown()


def _count_nodes() -> int:
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return sum(bool(node["Alive"]) for node in nodes)


def _start(address: str | None, min_cpus: int) -> None:
    import ray
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    # Ray read the environment when it was imported, which a caller may have done before us; the
    # cluster that it starts reads it now, and would refuse its own driver.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    if address is not None:
        _refuse_dead_address(address)
    try:
        if address is not None:
            logger.info("connecting to Ray at %s", address)
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
            return
        num_cpus = max(count_cores(), min_cpus)
        logger.info("starting Ray on this machine (%d CPUs)", num_cpus)
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
    # Ray reports some failures, such as too slow a start, as bare Exceptions.
    except Exception as error:
        if address is not None:
            text = f"cannot reach Ray at {address} (RAY_ADDRESS): {error}"
        else:
            text = (
                f"cannot start Ray on this machine: {error}\nRun the command again when the "
                "machine is less busy; Ray's logs are below /tmp/ray/session_latest/logs"
            )
        raise ClusterError(text) from error


def _refuse_dead_address(address: str) -> None:
    """Try the address first: Ray itself tries for minutes before it says that nobody is there.

    Raises:
        ClusterError: If it names a host and a port at which nobody listens.
    """
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"cannot reach Ray at {address} (RAY_ADDRESS): {error}; start the cluster, correct the "
            "address, or unset RAY_ADDRESS to use this machine alone"
        ) from error


def _prepare_environment() -> None:
    """Settings that Ray reads when it starts; what the user has set stays."""
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Workers keep the driver's folder instead of one of their own.
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }
    if "RAY_ADDRESS" not in os.environ and "RAY_AUTH_MODE" not in os.environ:
        # A cluster of our own listens on this machine's ports: nobody else may use it, and no token
        # file is
        # left behind that would switch authentication on for the user's other clusters.
        defaults |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
