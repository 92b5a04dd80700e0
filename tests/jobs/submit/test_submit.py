"""Every script of jobs/ by `ray job submit`, from a clean clone to nodes without the package."""

from __future__ import annotations

import json
import platform
import subprocess
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.local_ray

Submit = Callable[..., subprocess.CompletedProcess[str]]


def test_nodes_lack_the_package_without_a_working_directory(bare_python: Path) -> None:
    answer = subprocess.run(
        [str(bare_python), "-c", "import ray, torch, retinaray"],
        env={},
        cwd=bare_python.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "No module named 'retinaray'" in answer.stderr


def test_probe_finds_the_uploaded_package_everywhere_when_submitted(
    submit: Submit, read_result: Callable[[str], dict[str, Any]], fetch_json: Callable[..., Any]
) -> None:
    answer = submit("probe", "jobs/probe.py")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = read_result(answer.stdout)
    for place in ("driver", "task", "actor"):
        package = Path(found[place]["package"])
        assert package.parts[-3:] == ("platform", "retinaray", "__init__.py")
        assert package.parts[-5] == "working_dir_files"
        assert found[place]["system"] == platform.system()
        assert found[place]["secrets"] == []
    # Of what the submitter has in the environment nothing, and nothing of ours but the path.
    for job in fetch_json("/api/jobs/"):
        if job["submission_id"] == "probe":
            assert job["runtime_env"].keys() <= {"working_dir", "_ray_commit", "env_vars"}
        assert "canary" not in json.dumps(job)
    address = fetch_json("/api/jobs/probe")["driver_agent_http_address"]
    assert address
    assert "/#/jobs/probe" in answer.stdout


def test_probe_finds_the_package_everywhere_when_it_is_a_driver(
    run_driver: Submit, read_result: Callable[[str], dict[str, Any]], clone: Path
) -> None:
    answer = run_driver("jobs/probe.py")
    assert answer.returncode == 0, answer.stderr
    found = read_result(answer.stdout)
    assert found["driver"]["package"] == str(clone / "platform" / "retinaray" / "__init__.py")
    for place in ("task", "actor"):
        assert Path(found[place]["package"]).parts[-4] == "py_modules_files"
        assert found[place]["system"] == platform.system()


def test_dashboard_and_job_are_announced_without_the_token(run_driver: Submit, head: Any) -> None:
    answer = run_driver("jobs/probe.py")
    lines = [line for line in answer.stderr.splitlines() if "dashboard" in line]
    assert len(lines) == 1, answer.stderr
    assert f"dashboard {head.dashboard}, this job {head.dashboard}/#/jobs/" in lines[0]
    assert head.token not in answer.stderr + answer.stdout


def test_jobs_are_refused_without_the_token(fetch_json: Callable[..., Any]) -> None:
    with pytest.raises(urllib.error.HTTPError, match=r"40[13]"):
        fetch_json("/api/jobs/", "another-token")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param("ray.__version__ = '2.59.1'", "this process Ray 2.59.1", id="Ray"),
        pytest.param("sys.version_info = (3, 10, 4)", "on Python 3.10.4", id="Python"),
        pytest.param(
            "resources.refuse_other_versions = print; ray.__version__ = '2.59.1'",
            "this process Ray 2.59.1",
            id="as ray.init says it",
        ),
    ],
)
def test_driver_of_another_version_is_told_so_in_one_line(
    change: str, message: str, run_driver: Submit
) -> None:
    program = (
        "import sys; sys.path.insert(0, 'platform')\n"
        "import ray\n"
        "from retinaray.distributed import resources\n"
        "from retinaray.errors import ClusterError\n"
        f"{change}\n"
        "try:\n"
        "    resources.connect().__enter__()\n"
        "except ClusterError as error:\n"
        "    raise SystemExit(str(error))\n"
    )
    answer = run_driver("-c", program)
    assert answer.returncode == 1
    assert len(answer.stderr.splitlines()) == 1, answer.stderr
    assert message in answer.stderr
    assert "hand the job in with `ray job submit`" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({"RAY_AUTH_TOKEN": "another-token"}, id="another token"),
        pytest.param({"RAY_AUTH_TOKEN": ""}, id="no token"),
        pytest.param({"RAY_AUTH_MODE": "disabled"}, id="no authentication"),
    ],
)
def test_driver_without_the_token_is_told_so_in_one_line(
    variables: dict[str, str], run_driver: Submit
) -> None:
    answer = run_driver(
        "-c",
        "import sys; sys.path.insert(0, 'platform')\n"
        "from retinaray.distributed.resources import connect\n"
        "from retinaray.errors import ClusterError\n"
        "try:\n"
        "    connect().__enter__()\n"
        "except ClusterError as error:\n"
        "    raise SystemExit(str(error))\n",
        **variables,
    )
    assert answer.returncode == 1
    ours = [line for line in answer.stderr.splitlines() if "RAY_ADDRESS" in line]
    assert len(ours) == 1, answer.stderr
    assert "refuses this process: expected its token" in ours[0]
    assert "Traceback" not in answer.stderr
    assert "StackTrace" not in answer.stderr
