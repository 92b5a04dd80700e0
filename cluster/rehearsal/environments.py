"""What a process finds around it: a home and a few variables, nothing of the caller's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = Path(sys.executable).parent
"""Where `python` and `ray` lie."""


def make_home(folder: Path, token: str | None) -> Path:
    """A home directory; with a token where Ray looks for it, readable by its owner alone."""
    secrets = folder / ".ray"
    secrets.mkdir(parents=True)
    if token is not None:
        path = secrets / "auth_token"
        path.touch(mode=0o600)
        path.write_text(token, encoding="utf-8")
    return folder


def make_plain_environment(home: Path) -> dict[str, str]:
    """The environment of a new machine: nothing of the caller's but where programs are."""
    return {
        "PATH": f"{PROGRAMS}:{os.environ.get('PATH', os.defpath)}",
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(REPOSITORY / "platform"),
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def make_autoscaler_environment(head_node_id: str) -> dict[str, str]:
    """What Ray's fake provider and the autoscaler that `ray up` starts read when they start."""
    return {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": head_node_id,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head_node_id,
    }


def start_command(
    command: Sequence[str], environment: Mapping[str, str], log: Path, cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a command; stdout goes to `log`, stderr beside it to `*.err`."""
    with log.open("wb") as out, log.with_suffix(".err").open("wb") as errors:
        return subprocess.Popen(
            [*command],
            cwd=cwd or log.parent,
            env={**environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
        )
