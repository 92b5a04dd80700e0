"""What a run was made with: package versions, git commit, a run id."""

from __future__ import annotations

import secrets
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from retinaray.config.loading import to_dict
from retinaray.config.nodes import Job

_PACKAGES = (
    "retinaray",
    "torch",
    "torchvision",
    "ray",
    "onnx",
    "openvino",
    "pycocotools",
    "pillow",
)


def collect_versions() -> dict[str, str]:
    """Versions of the packages that shape results, and retinaray's git commit if it has one."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    versions["commit"] = _read_commit()
    return versions


def describe_making(job: Job) -> dict[str, Any]:
    """How a result came about: `job`, its settings, and `versions`, as records have them."""
    return {"job": to_dict(job), "versions": collect_versions()}


def make_run_id() -> str:
    """A sortable name that no other run has: UTC time and random letters."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def _read_commit() -> str:
    # An installed package may lie inside somebody else's repository, whose commit says nothing.
    if _ask_git("ls-files", "--error-unmatch", Path(__file__).name):
        return _ask_git("rev-parse", "HEAD") or "unknown"
    return "unknown"


def _ask_git(*arguments: str) -> str:
    """What git prints about this folder; empty when it fails or is not there."""
    try:
        answer = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
