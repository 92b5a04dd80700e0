"""A cache's limit, its order of eviction, and all that can happen to a folder."""

from __future__ import annotations

import fcntl
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from retinaray.data import cache_folder
from retinaray.data.cache_entry import Keepsake, pack_head
from retinaray.data.cache_folder import CacheFolder

ONE_KB = Keepsake("v", bytes(1000))
ENTRY_BYTES = len(pack_head("a", ONE_KB)) + 1000


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The subfolder of this user in which the caches of a test lie."""
    return tmp_path / f"retinaray-cache-{os.geteuid()}"


def count_bytes(own: Path) -> int:
    files = [*(own / "entries").iterdir(), *(own / "tmp").iterdir()]
    return sum(file.stat().st_size for file in files)


def count_bytes_at_once(own: Path) -> int:
    """Bytes of all files, while nobody begins or removes one; one that is renamed counts once."""
    with (own / "used_bytes").open("rb") as counter:
        fcntl.flock(counter, fcntl.LOCK_EX)
        unfinished = {item.inode(): item for item in os.scandir(own / "tmp")}
        entries = {item.inode(): item for item in os.scandir(own / "entries")}
        sizes = [item.stat().st_size for item in entries.values()]
        for inode in unfinished.keys() - entries.keys():
            # Gone: it has replaced an entry that was counted in its place.
            with suppress(FileNotFoundError):
                sizes.append(unfinished[inode].stat().st_size)
    return sum(sizes)


def make_old(own: Path, *, used_s: dict[str, float], cache: CacheFolder) -> None:
    """Let entries have been used last at these times."""
    for key, moment in used_s.items():
        os.utime(cache._path(key), (moment, moment))


def content_of(cache: CacheFolder, key: str) -> bytes | None:
    found = cache.get(key)
    return None if found is None else bytes(found.keepsake.content)


def test_get_gives_what_was_put_also_to_another_process(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path / "new" / "cache", max_bytes=10**6)
    assert cache.get("a") is None
    assert cache.put("a", Keepsake("v1", b"one", (1, 2)))
    assert cache.put("b", Keepsake("v1", b""))
    assert cache.put("a", Keepsake("v2", b"two", (3,)))
    for other in (cache, pickle.loads(pickle.dumps(cache))):
        found = other.get("a")
        assert found is not None
        assert found.keepsake == Keepsake("v2", b"two", (3,))
        assert -1 < found.age_s < 60
        assert content_of(other, "b") == b""


def test_cache_folder_is_closed_to_other_users(tmp_path: Path, own: Path) -> None:
    CacheFolder(tmp_path, max_bytes=10**6).put("a", ONE_KB)
    assert [path.name for path in tmp_path.iterdir()] == [own.name]
    modes = {path.stat().st_mode & 0o777 for path in own.rglob("*") if path.is_file()}
    assert (own.stat().st_mode & 0o777, modes) == (0o700, {0o600})
    names = [path.name for path in (own / "entries").iterdir()]
    # SHA-256 of the letter a: no key can lead out of the folder.
    assert names == ["ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"]


@pytest.mark.parametrize("kind", ["link", "open to others", "file"])
def test_cache_folder_is_not_used_when_others_could_have_filled_it(
    tmp_path: Path, own: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "link":
        own.symlink_to(elsewhere)
    elif kind == "file":
        own.write_bytes(b"")
    else:
        own.mkdir()
        own.chmod(0o777)
    cache = CacheFolder(tmp_path, max_bytes=10**6)
    assert not cache.put("a", ONE_KB)
    assert cache.get("a") is None
    assert len(caplog.records) == 1
    assert "keeps nothing new from here on" in caplog.text
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "changed", "foreign", "empty", "link", "folder"])
def test_get_drops_a_damaged_entry_with_one_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = CacheFolder(tmp_path / "cache", max_bytes=10**6)
    paths = []
    for key in ("a", "b"):
        cache.put(key, ONE_KB)
        paths.append(cache._path(key))
    whole = paths[0].read_bytes()
    secret = tmp_path / "secret"
    secret.write_bytes(whole)
    for path in paths:
        if damage in ("link", "folder"):
            path.unlink()
        if damage == "link":
            path.symlink_to(secret)
        elif damage == "folder":
            path.mkdir()
        else:
            changed = whole[:-1] + b"\1"
            cases = {"cut": whole[:-9], "changed": changed, "foreign": b"GIF89a", "empty": b""}
            path.write_bytes(cases[damage])
    assert cache.get("a") is None
    assert cache.get("b") is None
    assert len(caplog.records) == 1
    assert "cannot be used and is removed" in caplog.text
    if damage != "folder":
        assert not paths[0].exists()
        assert cache.put("a", ONE_KB)
        assert content_of(cache, "a") == bytes(1000)
    assert secret.read_bytes() == whole


def test_put_makes_room_among_the_longest_unused(tmp_path: Path, own: Path) -> None:
    before = CacheFolder(tmp_path, max_bytes=10 * ENTRY_BYTES)
    for key in "abcdefghij":
        assert before.put(key, ONE_KB)
    now = time.time()
    # e is the longest unused, then d, c, b, a; the others later.
    make_old(own, used_s={k: now - 1000 - 10 * i for i, k in enumerate("abcde")}, cache=before)
    make_old(own, used_s=dict.fromkeys("fghij", now - 500), cache=before)
    cache = CacheFolder(tmp_path, max_bytes=10 * ENTRY_BYTES)
    assert content_of(cache, "e") is not None  # used now
    assert cache.put("k", ONE_KB)
    # 10 are there, 11 would be one too many; with a tenth of the limit freed 9 remain in all.
    assert [key for key in "abcdefghijk" if cache.get(key) is None] == ["c", "d"]
    assert count_bytes(own) == 9 * ENTRY_BYTES


def test_put_keeps_what_is_in_use_when_the_cache_is_full(
    tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CacheFolder(tmp_path, max_bytes=3 * ENTRY_BYTES)
    now = [0.0]
    monkeypatch.setattr(cache_folder.time, "monotonic", lambda: now[0])
    kept = [cache.put(key, ONE_KB) for key in "abcdef"]
    assert kept == [True, True, True, False, False, False]
    assert all(content_of(cache, key) == bytes(1000) for key in "abc")
    # Room that appears is noticed when the pause of 60 s is over.
    cache._path("a").unlink()
    now[0] = 59.0
    assert not cache.put("d", ONE_KB)
    now[0] = 61.0
    assert cache.put("d", ONE_KB)
    assert count_bytes(own) == 3 * ENTRY_BYTES


def test_put_refuses_an_entry_above_the_limit_alone(tmp_path: Path, own: Path) -> None:
    cache = CacheFolder(tmp_path, max_bytes=ENTRY_BYTES)
    assert not cache.put("a", Keepsake("v", bytes(1001)))
    assert cache.put("a", ONE_KB)
    assert count_bytes(own) == ENTRY_BYTES


def test_put_counts_files_that_are_being_written_and_removes_lost_ones(
    tmp_path: Path, own: Path
) -> None:
    cache = CacheFolder(tmp_path, max_bytes=4 * ENTRY_BYTES)
    for name, age_s in (("lost", 4000.0), ("running", 10.0)):
        path = own / "tmp" / name
        path.write_bytes(bytes(2 * ENTRY_BYTES))
        os.utime(path, (time.time() - age_s,) * 2)
    assert cache.put("a", ONE_KB)
    assert [path.name for path in (own / "tmp").iterdir()] == ["running"]
    assert cache.put("b", ONE_KB)
    assert not cache.put("c", ONE_KB)
    assert count_bytes(own) == 4 * ENTRY_BYTES


@pytest.mark.parametrize("count", [b"", b"\1\2", (2**63).to_bytes(8, "little")])
def test_put_counts_again_when_the_count_is_damaged(
    tmp_path: Path, own: Path, count: bytes
) -> None:
    cache = CacheFolder(tmp_path, max_bytes=2 * ENTRY_BYTES)
    assert cache.put("a", ONE_KB)
    (own / "used_bytes").write_bytes(count)
    assert cache.put("b", ONE_KB)
    assert not cache.put("c", ONE_KB)


def test_put_lets_an_image_go_when_another_process_looks_through_the_folder(
    tmp_path: Path, own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = CacheFolder(tmp_path, max_bytes=10**6)
    with (own / "used_bytes").open("wb") as counter:
        fcntl.flock(counter, fcntl.LOCK_EX)
        assert not cache.put("a", ONE_KB)
    assert cache.put("a", ONE_KB)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("options", "num_bytes", "num_kept"),
    [
        # Six inodes are the folders, the count and an entry.
        ("nr_inodes=6", 100, 1),
        # Of 16 pages of 4 KiB the count takes one after the disk was asked.
        ("size=64k", 15 * 4096 + 100, 0),
    ],
    ids=["inodes", "pages"],
)
def test_put_stops_with_one_warning_when_the_disk_is_full(
    small_disk: Callable[[str], Path],
    options: str,
    num_bytes: int,
    num_kept: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk = small_disk(options)
    cache = CacheFolder(disk, max_bytes=10**6, min_free_share=0.0)
    kept = [cache.put(str(number), Keepsake("v", bytes(num_bytes))) for number in range(3)]
    assert kept == [number < num_kept for number in range(3)]
    assert len(caplog.records) == 1
    assert "keeps nothing new from here on: No space left on device" in caplog.text
    assert list(disk.glob("*/tmp/*")) == []
    found = [content_of(cache, str(number)) is not None for number in range(3)]
    assert found == kept


def test_put_leaves_part_of_the_disk_to_others(
    small_disk: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    disk = small_disk("size=64k")
    cache = CacheFolder(disk, max_bytes=10**6, min_free_share=0.5)
    while cache.put(str(len(list(disk.glob("*/entries/*")))), Keepsake("v", bytes(4000))):
        pass
    status = os.statvfs(disk)
    assert status.f_bavail >= status.f_blocks // 2
    assert "the last 50% of its disk stay free for others" in caplog.text
    assert len(caplog.records) == 1


def test_get_serves_a_folder_that_may_only_be_read(
    small_disk: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    disk = small_disk("rw")
    CacheFolder(disk, max_bytes=10**6, min_free_share=0.0).put("a", ONE_KB)
    cache = CacheFolder(small_disk("ro"), max_bytes=10**6, min_free_share=0.0)
    assert content_of(cache, "a") == bytes(1000)
    cache.confirm("a")
    assert not cache.put("b", ONE_KB)
    assert not cache.put("c", ONE_KB)
    assert content_of(cache, "a") == bytes(1000)
    assert len(caplog.records) == 1
    assert "Read-only file system" in caplog.text
    nowhere = CacheFolder(disk / "new", max_bytes=10**6)
    assert nowhere.get("a") is None
    assert not nowhere.put("a", ONE_KB)


WRITER = """
import sys
from pathlib import Path
from retinaray.data.cache_entry import Keepsake
from retinaray.data.cache_folder import CacheFolder

name, folder, max_bytes = sys.argv[1:]
cache = CacheFolder(Path(folder), max_bytes=int(max_bytes))
for number in range(60):
    cache.put(f"{name} {number}", Keepsake(name, bytes([number]) * 5000))
    cache.put("shared", Keepsake(name, name.encode() * 1000))
    found = cache.get("shared")
    if found is None:
        continue
    if bytes(found.keepsake.content) != found.keepsake.version.encode() * 1000:
        sys.exit("torn")
"""


def test_put_holds_the_limit_when_several_processes_write(tmp_path: Path, own: Path) -> None:
    max_bytes = 500_000
    earlier = CacheFolder(tmp_path, max_bytes=max_bytes)
    old = {f"old {number}": time.time() - 1000 for number in range(80)}
    for key in old:
        earlier.put(key, Keepsake("v", bytes(5000)))
    make_old(own, used_s=old, cache=earlier)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WRITER]
    writers = [
        subprocess.Popen([*command, str(name), str(tmp_path), str(max_bytes)], env=environment)
        for name in range(3)
    ]
    sizes = []
    while any(writer.poll() is None for writer in writers):
        sizes.append(count_bytes_at_once(own))
    assert [writer.returncode for writer in writers] == [0] * 3
    assert max(sizes) <= max_bytes
    # 180 entries do not fit: those of before have made room, and the cache is well used.
    assert 0.8 * max_bytes < count_bytes(own) <= max_bytes
    assert list((own / "tmp").iterdir()) == []
    reader = CacheFolder(tmp_path, max_bytes=max_bytes)
    own_entries = [reader.get(f"{name} {n}") for name in range(3) for n in range(60)]
    assert sum(found is not None for found in own_entries) > 60
