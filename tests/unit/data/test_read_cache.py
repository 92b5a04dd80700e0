"""A kept file is used when its storage says that it is unchanged, and never otherwise."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from retinaray.data.cache_entry import Keepsake
from retinaray.data.cache_folder import CacheFolder
from retinaray.data.read_cache import CheckedCache, ReadCache, VersionedBytes
from retinaray.errors import StorageError

URI = "s3://bucket/a.jpg"


class FakeStorage:
    """Files in memory that notes what it was asked: `read` or `ask` (unchanged, nothing read)."""

    def __init__(self) -> None:
        self.files = {URI: VersionedBytes(b"first", "1")}
        self.asked: list[str] = []

    def __call__(self, uri: str, known: str | None) -> VersionedBytes | None:
        if uri not in self.files:
            raise StorageError(f"cannot read {uri}: no such file")
        file = self.files[uri]
        self.asked.append("ask" if known == file.version else "read")
        return None if known == file.version else file


@pytest.fixture
def storage() -> FakeStorage:
    return FakeStorage()


@pytest.fixture
def make_cache(tmp_path: Path, storage: FakeStorage) -> Callable[..., ReadCache]:
    """Caches over the same folder, as of several processes: make_cache(recheck_s=0)."""

    def make(*, recheck_s: float = 0.0) -> ReadCache:
        folder = CacheFolder(tmp_path, max_bytes=10**6)
        return ReadCache(CheckedCache(folder, storage, recheck_s))

    return make


def entry_of(tmp_path: Path) -> Path:
    (path,) = tmp_path.glob("*/entries/*")
    return path


def test_read_cache_reads_once_and_then_asks(
    make_cache: Callable[..., ReadCache], storage: FakeStorage
) -> None:
    assert [make_cache()(URI) for _ in range(3)] == [b"first"] * 3
    assert storage.asked == ["read", "ask", "ask"]
    assert isinstance(make_cache()(URI), bytes)


def test_read_cache_gives_the_new_file_when_it_has_changed(
    make_cache: Callable[..., ReadCache], storage: FakeStorage
) -> None:
    read = make_cache()
    read(URI)
    storage.files[URI] = VersionedBytes(b"second", "2")
    assert [read(URI), read(URI)] == [b"second"] * 2
    # Back to a state of before: that was replaced, and is read anew.
    storage.files[URI] = VersionedBytes(b"first", "1")
    assert [read(URI), read(URI)] == [b"first"] * 2
    assert storage.asked == ["read", "read", "ask", "read", "ask"]


def test_read_cache_asks_again_when_the_time_is_over(
    make_cache: Callable[..., ReadCache], storage: FakeStorage, tmp_path: Path
) -> None:
    read = make_cache(recheck_s=100.0)
    for _ in range(3):
        read(URI)
    assert storage.asked == ["read"]
    an_age_ago = time.time() - 101
    os.utime(entry_of(tmp_path), (an_age_ago, an_age_ago))
    for _ in range(3):
        assert read(URI) == b"first"
    assert storage.asked == ["read", "ask"], "the answer holds for another 100 s"
    in_future = time.time() + 1000
    os.utime(entry_of(tmp_path), (in_future, in_future))
    read(URI)
    assert storage.asked == ["read", "ask", "ask"], "a clock that was set back proves nothing"


def test_read_cache_keeps_nothing_when_the_state_is_not_sure(
    make_cache: Callable[..., ReadCache], storage: FakeStorage, tmp_path: Path
) -> None:
    storage.files[URI] = VersionedBytes(b"first", "")
    assert [make_cache()(URI) for _ in range(2)] == [b"first"] * 2
    assert storage.asked == ["read", "read"]
    assert list(tmp_path.glob("*/entries/*")) == []


def test_read_cache_passes_on_that_a_file_is_gone(
    make_cache: Callable[..., ReadCache], storage: FakeStorage
) -> None:
    read = make_cache()
    read(URI)
    del storage.files[URI]
    with pytest.raises(StorageError, match=r"cannot read s3://bucket/a\.jpg: no such file"):
        read(URI)


def test_read_cache_reads_again_when_an_entry_is_torn(
    make_cache: Callable[..., ReadCache],
    storage: FakeStorage,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    read = make_cache()
    read(URI)
    path = entry_of(tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"X")
    assert [read(URI), read(URI)] == [b"first"] * 2
    assert storage.asked == ["read", "read", "ask"]
    assert "its checksum does not fit its content; its source is read again" in caplog.text


def test_find_takes_the_first_key_that_is_there(tmp_path: Path, storage: FakeStorage) -> None:
    cache = CheckedCache(CacheFolder(tmp_path, max_bytes=10**6), storage)
    source = cache.read_now(URI)
    cache.keep("second", source, Keepsake("1", b"kept"))
    cache.keep("third", source, Keepsake("1", b"not this"))
    found = cache.find(URI, ["first", "second", "third"])
    assert found == Keepsake("1", b"kept")
    assert cache.find(URI, []) == VersionedBytes(b"first", "1")
