"""A cluster whose nodes lack the package, a clean clone, and `ray job submit` between the two.

The cluster is started as a person does, by `ray start`, with a token, with a home and ports of its
own, under an interpreter that sees every installed package except this one.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import urllib.error
import urllib.request
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[3]
# What a user has in the environment, and nobody else may see.
SECRETS = {
    "AWS_ACCESS_KEY_ID": "canary-of-the-key",
    "AWS_SECRET_ACCESS_KEY": "canary-of-the-secret",
    "AWS_SESSION_TOKEN": "canary-of-the-session",
}
PATIENCE_S = 600.0
# Says where driver, task and actor find things; begins as the scripts in jobs/ do.
PROBE = """
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from retinaray.distributed.resources import connect


def look():
    import os
    import platform

    import retinaray

    secrets = [name for name, value in os.environ.items() if "canary" in value]
    return {"package": retinaray.__file__, "system": platform.system(), "secrets": secrets}


class Looker:
    def look(self):
        return look()


logging.basicConfig(level=logging.INFO)
with connect():
    import ray

    found = {
        "driver": look(),
        "task": ray.get(ray.remote(look).remote()),
        "actor": ray.get(ray.remote(Looker).remote().look.remote()),
    }
sys.stdout.write(json.dumps(found) + "\\n")
"""


@dataclass(frozen=True)
class Head:
    """A running cluster of one node.

    Attributes:
        address: host:port for drivers.
        dashboard: Its address, for submitters.
        token: Needed for both.
        python: Interpreter of all its processes.
        environment: Of a user who has the token; RAY_ADDRESS is not in it.
        process: `ray start --block`; it ends when one of its processes does.
        log: What that one says.
    """

    address: str
    dashboard: str
    token: str
    python: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """Fail with what the cluster said if it is gone: nothing would answer any more."""
        assert self.process.poll() is None, self.log.read_text(errors="replace")


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git would bring to another machine: the working tree without ignored files."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs git, which is not installed")
    if answer.returncode != 0:
        pytest.skip(f"needs a git checkout: {answer.stderr.decode().strip()}")
    folder = tmp_path_factory.mktemp("clone") / "retinaray"
    for name in filter(None, answer.stdout.decode().split("\0")):
        # A file that was deleted and not committed is still listed.
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, folder / name)
    (folder / "jobs" / "probe.py").write_text(PROBE, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with everything that is installed here except the package itself."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    python = folder / "bin" / "python"
    scheme = {"base": str(folder), "platbase": str(folder)}
    target = Path(sysconfig.get_path("purelib", "venv", scheme))
    sources = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    for entry in (entry for source in sources for entry in source.iterdir()):
        # Also the file that makes an editable installation importable.
        if "retinaray" not in entry.name and not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry)
    (folder / "bin" / "ray").write_text(
        f"#!{python}\nfrom ray.scripts.scripts import main\n\nmain()\n", encoding="utf-8"
    )
    (folder / "bin" / "ray").chmod(0o755)
    return python


@pytest.fixture(scope="session")
def head(
    bare_python: Path,
    ray_priority: dict[str, str],
    wait_until: Callable[[Callable[[], object], str], None],
) -> Iterator[Head]:
    """The cluster for all tests here: two logical processors, the dashboard, a token."""
    # Sockets below it have at most 107 characters in their paths.
    folder = Path(tempfile.mkdtemp(prefix="rj"))
    (folder / "home").mkdir()
    token = secrets.token_hex(16)
    gcs, dashboard, agent, client = _free_ports(4)
    names = (*SECRETS, "PYTHONPATH", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if "RAY_" not in k and k not in names}
    environment |= {
        "HOME": str(folder / "home"),
        "PATH": os.pathsep.join([str(bare_python.parent), os.environ["PATH"]]),
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        **ray_priority,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [
        *(str(bare_python.parent / "ray"), "start", "--head", "--block", f"--port={gcs}"),
        *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--ray-client-server-port={client}", "--min-worker-port=0", "--max-worker-port=0"),
        *("--num-cpus=2", "--object-store-memory=200000000", f"--temp-dir={folder / 'ray'}"),
        *("--node-ip-address=127.0.0.1", "--disable-usage-stats"),
    ]
    url = f"http://127.0.0.1:{dashboard}"
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(lambda: _answers(url, token, process, folder / "head.log"), "the dashboard")
        yield Head(
            f"127.0.0.1:{gcs}", url, token, bare_python, environment, process, folder / "head.log"
        )
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for entry in sockets:
            entry.bind(("127.0.0.1", 0))
        return [entry.getsockname()[1] for entry in sockets]


def _answers(url: str, token: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text(errors="replace")
    try:
        _fetch(f"{url}/api/version", token)
    except (urllib.error.URLError, ConnectionError):
        return False
    return True


def _fetch(url: str, token: str) -> Any:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


@pytest.fixture(scope="session")
def fetch_json(head: Head) -> Callable[..., Any]:
    """Ask the dashboard: the path of the question, and another token if wanted."""
    return lambda path, token=head.token: _fetch(f"{head.dashboard}{path}", token)


@pytest.fixture(scope="session")
def ray_job(head: Head, clone: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `ray job ...` in the clone, as a user with secrets in the environment does."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        head.check()
        return subprocess.run(
            [str(head.python.parent / "ray"), "job", *arguments],
            cwd=clone,
            env={**head.environment, **SECRETS, "RAY_API_SERVER_ADDRESS": head.dashboard},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def submit(
    ray_job: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Submit `python ...` from the clone under an id, and wait for its end; options go before."""

    def run(
        job_id: str, *command: str, options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        return ray_job(
            *("submit", "--working-dir", ".", "--submission-id", job_id, *options),
            *("--", "python", *command),
        )

    return run


@pytest.fixture(scope="session")
def read_result() -> Callable[[str], dict[str, Any]]:
    """The JSON line among the lines of a job's log."""

    def read(log: str) -> dict[str, Any]:
        lines = [line for line in log.splitlines() if line.startswith("{")]
        assert len(lines) == 1, log
        found: dict[str, Any] = json.loads(lines[0])
        return found

    return read


@pytest.fixture(scope="session")
def run_driver(head: Head, clone: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program in the clone as a driver of the cluster by RAY_ADDRESS, without submitting."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(head.python), *arguments],
            cwd=clone,
            env={**head.environment, "RAY_ADDRESS": head.address, **variables},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    return run
