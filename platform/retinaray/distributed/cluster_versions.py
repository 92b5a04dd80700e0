"""Whether a cluster runs the Ray and the Python of this process, which Ray demands of its drivers.

Ray's own check comes late, after steps that may fail in other ways between two versions, and says
it in seven lines. A job that came by `ray job submit` runs on the cluster's own versions.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from dataclasses import dataclass

from retinaray.errors import ClusterError

logger = logging.getLogger(__name__)

_READ_TIMEOUT_S = 10.0
# How Ray reports a driver of another version; `ray.client` prefixes it with a stack.
_RAY_REPORT = re.compile(
    r"Version mismatch: .*?Ray: (\S+)\s+Python: (\S+)\s.*?Ray: (\S+)\s+Python: (\S+)", re.DOTALL
)


@dataclass(frozen=True)
class Versions:
    """What a process or a cluster runs on.

    Attributes:
        ray: Such as 2.60.0.
        python: Such as 3.11.7.
    """

    ray: str
    python: str

    def __str__(self) -> str:
        return f"Ray {self.ray} on Python {self.python}"


def refuse_other_versions(address: str) -> None:
    """Compare the cluster's versions with this process's, as strictly as Ray would later.

    A cluster that does not tell its versions is left to Ray itself.

    Args:
        address: host:port of the cluster's GCS.

    Raises:
        ClusterError: If they differ.
    """
    cluster, own = read_cluster_versions(address), own_versions()
    if cluster is not None and not _go_together(cluster, own):
        raise ClusterError(_describe(address, cluster, own))


def own_versions() -> Versions:
    """What this process runs on."""
    import ray

    return Versions(ray.__version__, ".".join(map(str, sys.version_info[:3])))


def read_cluster_versions(address: str) -> Versions | None:
    """Ask a cluster what it was started with.

    Args:
        address: host:port of its GCS.

    Returns:
        None if it does not answer within ten seconds, or does not know.

    Raises:
        ClusterError: If it refuses our token, or wants one that we do not have.
    """
    from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray._private.ray_constants import KV_NAMESPACE_CLUSTER
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError, RayError

    try:
        # The client would end the process, and not by an exception, if there were no token.
        ensure_token_if_auth_enabled(create_token_if_missing=False)
        content = GcsClient(address=address).internal_kv_get(
            CLUSTER_METADATA_KEY, namespace=KV_NAMESPACE_CLUSTER, timeout=_READ_TIMEOUT_S
        )
        metadata = json.loads(content)
        return Versions(metadata["ray_version"], metadata["python_version"])
    except AuthenticationError as error:
        # Ray itself would ask for twenty seconds more, and then not say why.
        raise ClusterError(
            f"the cluster at {address} (RAY_ADDRESS) refuses this process: expected its token; set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token to that token"
        ) from error
    except (RayError, RuntimeError, KeyError, TypeError, ValueError) as error:
        logger.debug("the versions of the cluster at %s are not known: %s", address, error)
        return None


def explain_mismatch(report: str, address: str) -> str | None:
    """Put Ray's own words about two versions into one line.

    Args:
        report: Text of the exception that `ray.init` raised.
        address: As the user gave it.

    Returns:
        None if the report is about something else.
    """
    match = _RAY_REPORT.search(report)
    if match is None:
        return None
    cluster_ray, cluster_python, own_ray, own_python = match.groups()
    return _describe(address, Versions(cluster_ray, cluster_python), Versions(own_ray, own_python))


def _go_together(cluster: Versions, own: Versions) -> bool:
    """Ray's rule: all of both, unless its environment variable leaves out Python's last number."""
    digits = 2 if os.environ.get("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL") == "minor" else 3
    pythons = [versions.python.split(".")[:digits] for versions in (cluster, own)]
    return cluster.ray == own.ray and pythons[0] == pythons[1]


def _describe(address: str, cluster: Versions, own: Versions) -> str:
    return (
        f"the cluster at {address} (RAY_ADDRESS) runs {cluster}, this process {own}: expected the "
        f"same; run it under Python {cluster.python} with ray=={cluster.ray}, or hand the job in "
        "with `ray job submit`, which runs it on the cluster's own versions"
    )
