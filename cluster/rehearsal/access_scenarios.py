"""Who gets in: submitting without the token, and a training through the job server with it."""

from __future__ import annotations

import json
from typing import Any

from environments import PROGRAMS
from lab import FINISH_S, Finding, Lab
from machines import RehearsalError
from workload import NUM_STEPS

_REFUSAL_S = 60.0
_RUNTIME = {"env_vars": {"PYTHONPATH": "platform"}}
_WRONG_TOKEN = "0" * 64


def refuse_without_token(lab: Lab) -> Finding:
    """Submit a job without the token, and ask the job server with none and with a wrong one."""
    cluster = lab.open_cluster()
    ray = str(PROGRAMS / "ray")
    command = lab.start_outside(
        "without-token",
        [ray, "job", "submit", "--address", cluster.dashboard, "--", "true"],
        with_token=False,
    )
    statuses = [cluster.ask("/api/jobs/", token=token)[0] for token in (None, _WRONG_TOKEN)]
    if not all(status in (401, 403) for status in statuses):
        raise RehearsalError(
            f"expected 401 or 403 without a token and with a wrong one: {statuses}"
        )
    code = command.process.wait(_REFUSAL_S)
    said = command.explain()
    if code == 0 or "oken" not in said:
        raise RehearsalError(
            f"expected a refusal that names the token, got exit code {code}: {said}"
        )
    jobs = cluster.fetch("/api/jobs/")
    if jobs:
        raise RehearsalError(f"expected no job on the cluster, got {len(jobs)}")
    return Finding(
        "job submitted without the token; job server asked without and with a wrong one",
        f"all three refused (exit code {code}, HTTP {statuses[0]} and {statuses[1]}), no job there",
    )


def submit_training(lab: Lab) -> Finding:
    """Send the checkout and a training on two nodes to the job server, with the token."""
    cluster = lab.open_cluster()
    cluster.reshape([1, 1])
    submission = [
        *(str(PROGRAMS / "ray"), "job", "submit", "--address", cluster.dashboard),
        *("--working-dir", ".", "--runtime-env-json", json.dumps(_RUNTIME), "--"),
        *("python", "jobs/train.py", *lab.workload.make_training("submitted")),
    ]
    command = lab.start_outside("submitted", submission, with_token=True)
    outcome = command.finish(timeout_s=FINISH_S)
    lab.keep_training("submitted", outcome)
    jobs: list[dict[str, Any]] = cluster.fetch("/api/jobs/")
    states = [job["status"] for job in jobs]
    if "SUCCEEDED" not in states:
        raise RehearsalError(f"expected a job that SUCCEEDED, the job server says {states}")
    return Finding(
        "ray job submit of jobs/train.py with the token, from outside, on 2 nodes",
        f"{NUM_STEPS} steps, weights on the shared disk, job SUCCEEDED",
    )
