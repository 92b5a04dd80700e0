"""Reaching Ray: the cluster that is there, or one of our own for the length of a command."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from retinaray.assembly.job_plan_workers import ClusterSize
from retinaray.config.nodes import ClusterConfig
from retinaray.distributed.cluster_versions import explain_mismatch, refuse_other_versions
from retinaray.distributed.run_links import (
    Submission,
    announce,
    find_uploaded_root,
    read_submission,
)
from retinaray.errors import ClusterError
from retinaray.machine import count_cores

logger = logging.getLogger(__name__)

# Enough for the manifests and receipts that pass through it; pixels never do.
_OBJECT_STORE_BYTES = 512 * 1024 * 1024
_CONNECT_TIMEOUT_S = 10.0
# What a shell reports for a program that SIGTERM ended.
_TERMINATED = 128 + signal.SIGTERM
_SOURCE_ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def connect(
    *, min_cpus: int = 1, counting_on: ClusterConfig | None = None
) -> Iterator[ClusterSize]:
    """Be connected to Ray: as already connected, at RAY_ADDRESS, or on this machine alone.

    Args:
        min_cpus: Logical processors that an own cluster shall have at least.
        counting_on: What the job wants to use; none = what is there.

    Yields:
        What the job may count on. An own cluster is stopped afterwards.

    Raises:
        ClusterError: If Ray cannot be reached or started, or runs other versions than we do, or
            more is wanted of this machine than it has.
        SystemExit: In the block, when SIGTERM comes, as from `ray job stop`.
    """
    _prepare_environment()
    import ray

    address = os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():
        yield _count_on(_measure(address), counting_on)
        return
    _start(address, min_cpus)
    try:
        with _stop_on_sigterm():
            yield _count_on(_measure(address), counting_on)
    finally:
        ray.shutdown()


def _measure(address: str | None) -> ClusterSize:
    import ray

    totals = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return ClusterSize(
        num_cpus=totals.get("CPU", 0),
        num_gpus=totals.get("GPU", 0),
        num_nodes=_count_nodes(),
        is_local=address is None,
    )


def _count_on(present: ClusterSize, wanted: ClusterConfig | None) -> ClusterSize:
    if wanted is None:
        return present
    cluster = present.counting_on(num_cpus=wanted.cpus, num_gpus=wanted.gpus)
    if cluster.num_gpus > present.num_gpus or cluster.num_cpus > present.num_cpus:
        logger.info(
            "counting on %g CPUs and %g GPUs; %g and %g are there, an autoscaler has to bring the "
            "rest",
            *(cluster.num_cpus, cluster.num_gpus, present.num_cpus, present.num_gpus),
        )
    elif not present.is_local and not cluster.num_gpus:
        logger.info(
            "no GPU in this cluster: CPUs do the work; --gpus N waits for those of an autoscaler"
        )
    return cluster


def _count_nodes() -> int:
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return sum(bool(node["Alive"]) for node in nodes)


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """Leave the block when SIGTERM comes: locks are given back, logs and curves are written.

    Ray's own handler says nothing, and that of a cluster of our own first waits half a minute.
    `ray job stop` kills after three seconds; what had no time to happen, the next start makes up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)
        logger.warning(
            "stopped by SIGTERM; the same command goes on from the last checkpoint or part"
        )
        raise SystemExit(_TERMINATED)

    earlier = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _start(address: str | None, min_cpus: int) -> None:
    import ray
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    # Ray read the environment when it was imported, which a caller may have done before us; the
    # cluster that it starts reads it now, and would refuse its own driver.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    if address is not None:
        _refuse_wrong_address(address)
    try:
        if address is not None:
            _join(address)
            return
        num_cpus = max(count_cores(), min_cpus)
        logger.info("starting Ray on this machine (%d CPUs)", num_cpus)
        with _show_code():
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
            text = explain_mismatch(str(error), address) or (
                f"cannot reach Ray at {address} (RAY_ADDRESS): {error}"
            )
        else:
            text = (
                f"cannot start Ray on this machine: {error}\nRun the command again when the "
                "machine is less busy; Ray's logs are below /tmp/ray/session_latest/logs"
            )
        raise ClusterError(text) from error


def _join(address: str) -> None:
    """Connect to a cluster that is there, and say where it can be watched."""
    import ray

    logger.info("connecting to Ray at %s", address)
    submission = read_submission(os.environ)
    context = ray.init(
        address=address,
        runtime_env=_share_code(submission),
        logging_level=logging.WARNING,
        log_to_driver=False,
    )
    announce(context.dashboard_url, ray.get_runtime_context().get_job_id(), submission)


def _share_code(submission: Submission | None) -> dict[str, Any] | None:
    """What workers need to import this very package; None when nodes have it, or the user said.

    Nothing else goes this way: everybody who sees the cluster's list of jobs can read it.
    """
    given: frozenset[str] = frozenset()
    if submission is not None:
        given = submission.fields | submission.env_names
    if _is_installed() or given & {"PYTHONPATH", "py_modules"}:
        return None
    root = find_uploaded_root(_SOURCE_ROOT) if submission is not None else None
    if root is not None:
        # Ray puts the root of the upload on the import path; the package is one level deeper.
        return {"env_vars": {"PYTHONPATH": root}}
    return {"py_modules": [str(_SOURCE_ROOT / "retinaray")]}


def _is_installed() -> bool:
    return _SOURCE_ROOT.name in ("site-packages", "dist-packages")


@contextmanager
def _show_code() -> Iterator[None]:
    """Let a cluster that is started in this block find the package where this process did."""
    earlier = os.environ.get("PYTHONPATH")
    if not _is_installed():
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_SOURCE_ROOT), earlier)))
    try:
        yield
    finally:
        if earlier is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = earlier


def _refuse_wrong_address(address: str) -> None:
    """Try the address first: Ray itself tries for minutes before it says that nobody is there.

    Raises:
        ClusterError: If it names a host and a port at which nobody listens, or a cluster of other
            versions.
    """
    scheme, _, rest = address.rpartition("://")
    host, _, port = rest.partition("/")[0].rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"cannot reach Ray at {address} (RAY_ADDRESS): {error}; start the cluster, correct the "
            "address, or unset RAY_ADDRESS to use this machine alone"
        ) from error
    if not scheme:
        refuse_other_versions(address)


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
