"""Files and their states, on a local disk and on a real S3 server."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ReadTimeoutError

from retinaray.assembly import versioned_reading
from retinaray.assembly.versioned_reading import VersionedReader
from retinaray.data.read_cache import VersionedBytes
from retinaray.errors import MissingFileError, StorageError
from retinaray.storage import Storage

AN_AGE_AGO = 1_600_000_000


@pytest.fixture
def read() -> VersionedReader:
    return VersionedReader(Storage(max_attempts=1))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file counts as old enough: nobody waits two seconds."""
    monkeypatch.setattr(versioned_reading, "_SETTLED_S", -1.0)


def read_sure(read: VersionedReader, uri: str, known: str | None = None) -> VersionedBytes:
    found = read(uri, known)
    assert found is not None
    assert found.version
    return found


def test_read_local_gives_nothing_when_the_file_is_the_same(
    read: VersionedReader, tmp_path: Path, settled: None
) -> None:
    path = tmp_path / "a #1.jpg"
    path.write_bytes(b"first")
    found = read_sure(read, str(path))
    assert found.content == b"first"
    assert read(str(path), found.version) is None
    assert read(path.as_uri(), found.version) is None
    assert read_sure(read, str(path), "another state") == found


def change_in_place(path: Path) -> None:
    path.write_bytes(b"other")


def replace_by_another(path: Path) -> None:
    path.with_suffix(".new").write_bytes(b"other")
    path.with_suffix(".new").replace(path)


def append(path: Path) -> None:
    path.write_bytes(b"first and more")


@pytest.mark.parametrize("change", [change_in_place, replace_by_another, append])
def test_read_local_reads_again_when_a_change_hides_its_time(
    read: VersionedReader, tmp_path: Path, settled: None, change: Callable[[Path], None]
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"first")
    os.utime(path, (AN_AGE_AGO, AN_AGE_AGO))
    found = read_sure(read, str(path))
    # Until the clock of the file system has moved on.
    while read(str(path), found.version) is None:
        change(path)
        os.utime(path, (AN_AGE_AGO, AN_AGE_AGO))
    assert read_sure(read, str(path)).content == path.read_bytes() != b"first"


def test_read_local_is_not_sure_of_a_file_that_was_just_written(
    read: VersionedReader, tmp_path: Path
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"first")
    assert read(str(path), None) == VersionedBytes(b"first", "")


def test_read_local_is_not_sure_of_a_file_that_grows_meanwhile(
    read: VersionedReader, tmp_path: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"first")
    real_fstat = os.fstat

    def look_and_append(descriptor: int) -> os.stat_result:
        status = real_fstat(descriptor)
        with path.open("ab") as file:
            file.write(b"!")
        return status

    monkeypatch.setattr(versioned_reading.os, "fstat", look_and_append)
    found = read(str(path), None)
    assert found is not None
    assert found.version == ""


@pytest.mark.parametrize("known", [None, "5 1 1 1"])
def test_read_local_names_the_file_that_is_missing(
    read: VersionedReader, tmp_path: Path, known: str | None
) -> None:
    with pytest.raises(MissingFileError, match=r"cannot read .*gone\.jpg: no such file"):
        read(str(tmp_path / "gone.jpg"), known)


def test_read_object_gives_nothing_when_the_object_is_the_same(
    read: VersionedReader, s3_bucket: str
) -> None:
    uri = f"{s3_bucket}/a b.jpg"
    read.storage.write_bytes(uri, b"first")
    found = read_sure(read, uri)
    assert found.content == b"first"
    assert read(uri, found.version) is None
    read.storage.write_bytes(uri, b"other")
    changed = read_sure(read, uri, found.version)
    assert changed.content == b"other"
    assert read(uri, changed.version) is None
    # Back to what it was: an ETag tells of the content.
    read.storage.write_bytes(uri, b"first")
    assert read_sure(read, uri, changed.version).content == b"first"
    read.storage.delete(uri)
    for known in (None, found.version):
        with pytest.raises(MissingFileError, match=r"cannot read .*/a b\.jpg"):
            read(uri, known)


class FakeObjects:
    """Answers of a server: given as body, or as an exception while the body is read."""

    def __init__(self, body: bytes | Exception) -> None:
        self.body, self.is_closed = body, False

    def client(self) -> FakeObjects:
        return self

    def get_object(self, **_: Any) -> dict[str, Any]:
        return {"ETag": '"1"', "ContentLength": 5, "Body": self}

    def __enter__(self) -> FakeObjects:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True

    def read(self) -> bytes:
        if isinstance(self.body, Exception):
            raise self.body
        return self.body


def test_read_object_believes_the_etag_when_a_server_ignores_the_condition(
    read: VersionedReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = FakeObjects(b"first")
    monkeypatch.setattr(versioned_reading, "S3Objects", lambda *_: objects)
    found = read("s3://bucket/a", None)
    assert found == VersionedBytes(b"first", '"1" 5')
    objects.body = AssertionError("an unchanged body is not read")
    assert read("s3://bucket/a", found.version) is None
    assert objects.is_closed


def test_read_object_reads_on_by_the_storage_when_a_body_breaks_off(
    read: VersionedReader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = ReadTimeoutError(endpoint_url="http://x")
    monkeypatch.setattr(versioned_reading, "S3Objects", lambda *_: FakeObjects(broken))
    monkeypatch.setattr(Storage, "read_bytes", lambda _, uri: uri.encode())
    # Of which state these bytes are is not known: nothing may be kept.
    assert read("s3://bucket/a", None) == VersionedBytes(b"s3://bucket/a", "")
    assert "reading s3://bucket/a broke off, it is read again" in caplog.text


def test_read_object_refuses_a_bucket_without_a_key(read: VersionedReader, s3_bucket: str) -> None:
    bucket = "/".join(s3_bucket.split("/")[:3])
    with pytest.raises(StorageError, match=r"s3://retinaray-tests"):
        read(bucket, None)
