"""What ties this process to a cluster: the submitted job that it is, and the page that shows it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

# Where the job manager leaves what `ray job submit` was given, for `ray.init` in the entrypoint.
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# Ray unpacks each upload into a folder of its own below one of this name, on every node.
_UPLOADS_FOLDER = "working_dir_files"


@dataclass(frozen=True)
class Submission:
    """What `ray job submit` said about this process.

    Attributes:
        submission_id: As `ray job status` takes it; empty when the cluster did not tell.
        fields: Parts of Ray's runtime environment that the user gave to the job.
        env_names: Variables among them.
    """

    submission_id: str
    fields: frozenset[str]
    env_names: frozenset[str]


def read_submission(environment: Mapping[str, str]) -> Submission | None:
    """Look whether this process is the entrypoint of a submitted job; None when it is not."""
    content = environment.get(_JOB_CONFIG)
    if content is None:
        return None
    config = json.loads(content)
    runtime_env = config.get("runtime_env") or {}
    return Submission(
        submission_id=(config.get("metadata") or {}).get("job_submission_id", ""),
        fields=frozenset(runtime_env),
        env_names=frozenset(runtime_env.get("env_vars") or {}),
    )


def find_uploaded_root(source_root: Path) -> str | None:
    """Where a source root lies in the working directory that was uploaded with the job.

    Args:
        source_root: Absolute folder that a package was imported from.

    Returns:
        Relative to the working directory, which is where Ray starts each worker; None if it is in
        none, as that of an installed package.
    """
    for folder in (source_root, *source_root.parents):
        if folder.parent.name == _UPLOADS_FOLDER:
            return str(source_root.relative_to(folder))
    return None


def announce(dashboard_url: str | None, job_id: str, submission: Submission | None) -> None:
    """Log where a browser shows the cluster and this job; nothing without a dashboard.

    Args:
        dashboard_url: As Ray gives it, with or without a scheme; empty or None without one.
        job_id: Ray's number of this driver, for jobs that were not submitted.
        submission: What this process was submitted as.
    """
    if not dashboard_url:
        return
    address = _strip_secrets(dashboard_url)
    name = submission.submission_id if submission is not None else ""
    logger.info("dashboard %s, this job %s/#/jobs/%s", address, address, name or job_id)


def _strip_secrets(url: str) -> str:
    """Scheme, host, port and path: a proxy's address may carry a password or a token."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path.rstrip('/')}"
