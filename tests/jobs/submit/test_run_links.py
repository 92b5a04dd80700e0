"""What a process can tell about the job that it is, and what it says of the dashboard."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from retinaray.distributed.run_links import (
    Submission,
    announce,
    find_uploaded_root,
    read_submission,
)

SUBMITTED = Submission("monday", frozenset(), frozenset())


def test_read_submission_is_none_when_nobody_submitted() -> None:
    assert read_submission({"RAY_ADDRESS": "10.0.0.1:6379"}) is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param({}, Submission("", frozenset(), frozenset()), id="nothing"),
        pytest.param(
            {"runtime_env": None, "metadata": {"job_submission_id": "monday"}},
            SUBMITTED,
            id="no environment",
        ),
        pytest.param(
            {
                "runtime_env": {"working_dir": "gcs://a.zip", "env_vars": {"PYTHONPATH": "x"}},
                "metadata": {"job_submission_id": "monday"},
            },
            Submission("monday", frozenset({"working_dir", "env_vars"}), frozenset({"PYTHONPATH"})),
            id="variables",
        ),
    ],
)
def test_read_submission_gives_what_ray_left(
    config: dict[str, object], expected: Submission
) -> None:
    assert read_submission({"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(config)}) == expected


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("/tmp/ray/s/working_dir_files/_ray_pkg_1a/platform", "platform"),
        ("/tmp/ray/s/working_dir_files/s3_bucket_code/a/platform", "a/platform"),
        ("/tmp/ray/s/working_dir_files/_ray_pkg_1a", "."),
        ("/opt/retinaray/platform", None),
    ],
)
def test_find_uploaded_root_is_relative_to_the_upload(folder: str, expected: str | None) -> None:
    assert find_uploaded_root(Path(folder)) == expected


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("10.0.0.1:8265", "http://10.0.0.1:8265"),
        ("http://10.0.0.1:8265/", "http://10.0.0.1:8265"),
        ("https://me:secret@proxy.example/ray/?token=secret#x", "https://proxy.example/ray"),
    ],
)
def test_announce_shows_address_and_job_without_secrets(
    url: str, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "retinaray"):
        announce(url, "01000000", SUBMITTED)
        announce(url, "01000000", None)
    assert caplog.messages == [
        f"dashboard {address}, this job {address}/#/jobs/monday",
        f"dashboard {address}, this job {address}/#/jobs/01000000",
    ]


@pytest.mark.parametrize("url", [None, ""])
def test_announce_is_silent_without_a_dashboard(
    url: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "retinaray"):
        announce(url, "01000000", SUBMITTED)
    assert caplog.messages == []
