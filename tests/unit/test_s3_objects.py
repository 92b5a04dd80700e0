from __future__ import annotations

import http.client
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from retinaray import s3_objects
from retinaray.errors import StorageError
from retinaray.storage import (
    MissingFileError,
    Storage,
    split_s3_uri,
)

MIB = 2**20


@pytest.fixture
def num_uploads(s3_bucket: str) -> Callable[[], int]:
    """Count the multipart uploads that were begun in the test bucket and not ended."""
    client = s3_objects.S3Objects(None, 5, 5, 1).client()
    bucket = split_s3_uri(s3_bucket)[0]
    return lambda: len(client.list_multipart_uploads(Bucket=bucket).get("Uploads", []))


class _FaultyProxy(BaseHTTPRequestHandler):
    """Passes requests on to the real server; answers go wrong as `faults` says, one per request."""

    protocol_version = "HTTP/1.1"
    target = ""
    faults: list[str] = []  # noqa: RUF012  (a new list is set per test)

    def _forward(self) -> None:
        fault = self.faults.pop(0) if self.faults else ""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.close_connection = True
        if fault.isdigit():
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        connection = http.client.HTTPConnection(self.target)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if fault == "lose the answer":
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            self.send_header(name, value)
        self.end_headers()
        half = len(content) // 2
        self.wfile.write(content[:half] if fault == "cut the body" else content)

    do_GET = do_PUT = do_HEAD = _forward  # noqa: N815

    def log_message(self, *args: object) -> None:
        """Keep the test output clean."""


@pytest.fixture
def faulty(s3_bucket: str) -> Iterator[tuple[Storage, list[str]]]:
    """A storage behind the faulty proxy, and the list of faults to come."""
    faults: list[str] = []
    target = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    handler = type("Handler", (_FaultyProxy,), {"target": target, "faults": faults})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield Storage(endpoint_url=f"http://127.0.0.1:{server.server_port}", max_attempts=3), faults
    server.shutdown()
    thread.join()
    server.server_close()


def fail_after_writing(storage: Storage, uri: str, num_bytes: int) -> None:
    with storage.open_writer(uri) as writer:
        writer.write(bytes(num_bytes))
        raise KeyboardInterrupt


def test_open_writer_leaves_no_upload_on_s3_when_the_block_fails(
    s3_bucket: str, num_uploads: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_objects, "PART_BYTES", 5 * MIB)
    with Storage().open_writer(f"{s3_bucket}/whole") as writer:
        writer.write(bytes(6 * MIB))
        assert num_uploads() == 1
    assert num_uploads() == 0
    with pytest.raises(KeyboardInterrupt):
        fail_after_writing(Storage(), f"{s3_bucket}/half", 6 * MIB)
    assert num_uploads() == 0


def test_s3_failure_names_the_secret_when_it_is_wrong(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, uri = Storage(), f"{s3_bucket}/x"
    storage.write_bytes(uri, b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=r"read s3://.*wrong secret.*AWS_SECRET_ACCESS_KEY"):
        storage.read_bytes(uri)
    with pytest.raises(StorageError, match=r"write s3://.*wrong secret"):
        storage.write_bytes(uri, b"y")
    with pytest.raises(StorageError, match=r"list s3://.*wrong secret"):
        list(storage.list_files(s3_bucket))
    with pytest.raises(StorageError, match="access denied, or a wrong key or secret"):
        storage.exists(uri)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(StorageError, match="unknown access key"):
        storage.read_bytes(uri)


@pytest.mark.parametrize("action", ["read", "write", "list", "exists", "stream", "delete"])
def test_s3_failure_names_the_bucket_when_it_is_unknown(s3_bucket: str, action: str) -> None:
    storage, uri = Storage(), "s3://no-such-bucket/x"
    actions: dict[str, Callable[[], object]] = {
        "read": lambda: storage.read_bytes(uri),
        "write": lambda: storage.write_bytes(uri, b"x", only_if_absent=True),
        "list": lambda: list(storage.list_files(uri)),
        "exists": lambda: storage.exists(uri),
        "stream": lambda: fail_after_writing(storage, uri, s3_objects.PART_BYTES),
        "delete": lambda: storage.delete(uri),
    }
    with pytest.raises(StorageError, match=r"no-such-bucket.*no such bucket.*create") as caught:
        actions[action]()
    assert not isinstance(caught.value, MissingFileError)
    assert caught.value.__suppress_context__


def test_s3_failure_comes_soon_when_the_endpoint_is_unreachable(s3_bucket: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(StorageError, match=f"Could not connect.*{endpoint}.*AWS_ENDPOINT_URL"):
            Storage(endpoint_url=endpoint, max_attempts=1).read_bytes("s3://bucket/x")
    assert time.monotonic() - start < 3


def test_s3_failure_shows_the_endpoint_when_it_is_no_url(s3_bucket: str) -> None:
    with pytest.raises(StorageError, match=r"nonsense.*expected endpoint_url like http://"):
        Storage(endpoint_url="nonsense").exists("s3://bucket/x")


def test_s3_failure_asks_for_credentials_when_there_are_none(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "absent"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "absent"))
    with pytest.raises(StorageError, match=r"Unable to locate credentials.*AWS_ACCESS_KEY_ID"):
        Storage().read_bytes(f"{s3_bucket}/x")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match=r"nobody.*the profile"):
        Storage().read_bytes(f"{s3_bucket}/x")


def test_read_bytes_asks_again_when_the_answer_breaks_off(
    s3_bucket: str, faulty: tuple[Storage, list[str]]
) -> None:
    storage, faults = faulty
    content = os.urandom(MIB)
    Storage().write_bytes(f"{s3_bucket}/x", content)
    faults[:] = ["cut the body", "cut the body"]
    assert storage.read_bytes(f"{s3_bucket}/x") == content
    faults[:] = ["cut the body"] * 3
    with pytest.raises(StorageError, match=r"cannot read s3://.*check that the server runs"):
        storage.read_bytes(f"{s3_bucket}/x")


def test_open_reader_goes_on_at_the_same_byte_when_the_connection_breaks(
    s3_bucket: str, faulty: tuple[Storage, list[str]]
) -> None:
    storage, faults = faulty
    content = os.urandom(6 * MIB)
    Storage().write_bytes(f"{s3_bucket}/x", content)
    faults[:] = ["cut the body"]
    with storage.open_reader(f"{s3_bucket}/x") as reader:
        assert b"".join(iter(lambda: reader.read(MIB // 2 + 1), b"")) == content
    assert faults == []


def test_read_range_asks_again_for_the_rest_when_the_answer_breaks_off(
    s3_bucket: str, faulty: tuple[Storage, list[str]]
) -> None:
    storage, faults = faulty
    content = os.urandom(MIB)
    Storage().write_bytes(f"{s3_bucket}/x", content)
    faults[:] = ["cut the body", "503", "cut the body"]
    assert storage.read_range(f"{s3_bucket}/x", 1000, MIB // 2) == content[1000:][: MIB // 2]
    assert faults == []
    faults[:] = ["cut the body"] * 30
    with pytest.raises(StorageError, match="cannot read s3://"):
        storage.read_range(f"{s3_bucket}/x", 5, MIB // 2)


def test_open_reader_refuses_to_mix_versions_when_the_object_changes(
    s3_bucket: str, faulty: tuple[Storage, list[str]]
) -> None:
    storage, faults = faulty
    Storage().write_bytes(f"{s3_bucket}/x", bytes(6 * MIB))
    faults[:] = ["cut the body"]
    with storage.open_reader(f"{s3_bucket}/x") as reader:
        reader.read(MIB)
        Storage().write_bytes(f"{s3_bucket}/x", b"1" * 6 * MIB)
        with pytest.raises(StorageError, match="the object changed meanwhile"):
            reader.read()


def test_write_bytes_knows_its_own_object_when_the_answer_was_lost(
    s3_bucket: str, faulty: tuple[Storage, list[str]]
) -> None:
    storage, faults = faulty
    faults[:] = ["lose the answer"]
    assert storage.write_bytes(f"{s3_bucket}/x", b"mine", only_if_absent=True)
    faults[:] = ["lose the answer"]
    assert not storage.write_bytes(f"{s3_bucket}/x", b"mine", only_if_absent=True)


def test_write_bytes_tries_again_when_another_writer_is_at_it(
    s3_bucket: str, faulty: tuple[Storage, list[str]]
) -> None:
    storage, faults = faulty
    faults[:] = ["409"]
    assert storage.write_bytes(f"{s3_bucket}/x", b"mine", only_if_absent=True)
    faults[:] = ["409"] * 3
    with pytest.raises(StorageError, match="3 times another writer was at it"):
        storage.write_bytes(f"{s3_bucket}/y", b"mine", only_if_absent=True)


def test_list_files_leaves_out_the_markers_of_empty_folders(s3_bucket: str) -> None:
    storage = Storage()
    storage.write_bytes(f"{s3_bucket}/empty/", b"")
    storage.write_bytes(f"{s3_bucket}/x", b"")
    assert list(storage.list_files(s3_bucket)) == [f"{s3_bucket}/x"]
