"""A folder of entries with a limit in bytes, shared by all processes of one user on a machine.

A cache is a guest: whatever goes wrong with it costs time, never a result. Entries appear by a
rename, whole or not at all, and are checked when they are read. Space is taken under a lock before
it is used, so that several processes together keep the limit. What has not been used since this
cache was opened makes room, the longest unused first; when all has been used, nothing new is kept,
because images that come in a new random order each epoch would only push each other out.

Entries lie in a subfolder of each user, closed to others; their names are digests of their keys.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from retinaray.data.cache_entry import Keepsake, pack_head, read_keepsake, write_whole

logger = logging.getLogger(__name__)

_COUNT = struct.Struct("<Q")
_ROOM_MADE_SHARE = 0.1
"""Part of the limit that is freed at once: each time all entries are looked through."""
_FULL_PAUSE_S = 60.0
"""Nothing is offered for so long to a cache in which nothing could make room."""
_ORPHAN_S = 3600.0
"""An unfinished file of this age has lost its writer."""
_MIN_FREE_SHARE = 0.05
"""Part of the disk that stays free: Ray stops spilling below that."""
_CLOCK_STEP_S = 0.01
"""Times of files lag so far behind the clock at most: what is kept now counts as used now."""
_LOCK_TRIES, _LOCK_PAUSE_S = 20, 0.0005
"""Whoever counts holds the lock for microseconds; who looks through all entries, for longer."""


@dataclass(frozen=True)
class FoundEntry:
    """An entry as it was found.

    Attributes:
        keepsake: What was put.
        age_s: Seconds since the source was last known to be in this state; negative when the clock
            was set back.
    """

    keepsake: Keepsake
    age_s: float


class CacheFolder:
    """Keeps entries by key; safe to pickle and to share between threads and processes.

    Args:
        folder: Made if absent; its subfolder `retinaray-cache-<user id>` is used.
        max_bytes: Limit of that subfolder, unfinished files included.
        min_free_share: Part of the disk in [0, 1) that is left free.
    """

    def __init__(
        self, folder: Path, *, max_bytes: int, min_free_share: float = _MIN_FREE_SHARE
    ) -> None:
        self._root = folder / f"retinaray-cache-{os.geteuid()}"
        self._max_bytes = max_bytes
        self._min_free_share = min_free_share
        self._opened_s = time.time() - _CLOCK_STEP_S
        self._full_until_s = 0.0
        self._is_readable = True
        self._is_writable = True
        self._has_warned_of_damage = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for own in (self._root, self._root / "tmp", self._root / "entries"):
                _make_own_folder(own)
        except OSError as error:
            self._is_readable = False
            self._stop_writing(error)

    def get(self, key: str) -> FoundEntry | None:
        """The entry of a key, checked; None if there is none, or it was damaged and is gone."""
        if not self._is_readable:
            return None
        path = self._path(key)
        try:
            # A link in the place of an entry could lead anywhere.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                status = os.fstat(descriptor)
                keepsake = read_keepsake(descriptor, status.st_size, key)
                if status.st_atime < self._opened_s:
                    _set_times(descriptor, time.time_ns(), status.st_mtime_ns)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._drop(path, error)
            return None
        return FoundEntry(keepsake, time.time() - status.st_mtime)

    def confirm(self, key: str) -> None:
        """Note that the source of an entry is still in the state that the entry has."""
        _set_times(self._path(key), time.time_ns(), time.time_ns())

    def put(self, key: str, keepsake: Keepsake) -> bool:
        """Keep an entry, in the place of an older one of its key, if there is room for it.

        Returns:
            Whether it was kept.
        """
        if not self._is_writable or time.monotonic() < self._full_until_s:
            return False
        parts = (pack_head(key, keepsake), keepsake.content)
        temporary = self._root / "tmp" / os.urandom(16).hex()
        try:
            if not self._reserve(temporary, sum(map(len, parts))):
                return False
            try:
                write_whole(temporary, parts)
                temporary.replace(self._path(key))
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            self._stop_writing(error)
            return False
        return True

    def _path(self, key: str) -> Path:
        name = sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        return self._root / "entries" / name

    def _reserve(self, temporary: Path, num_bytes: int) -> bool:
        """Make an empty file of this length, if the limit allows it.

        Raises:
            OSError: If the disk has no room.
        """
        if num_bytes > self._max_bytes:
            return False
        self._expect_free_disk(num_bytes)
        with self._locked() as counter:
            if counter is None:
                return False
            used = _read_count(counter)
            if used is None or used + num_bytes > self._max_bytes:
                used = self._make_room(num_bytes)
            fits = used + num_bytes <= self._max_bytes
            if fits:
                # Its length counts from now on, for whoever looks through all files.
                _make_empty(temporary, num_bytes)
                used += num_bytes
            else:
                self._full_until_s = time.monotonic() + _FULL_PAUSE_S
            os.pwrite(counter, _COUNT.pack(used), 0)
        return fits

    def _expect_free_disk(self, num_bytes: int) -> None:
        disk = os.statvfs(self._root)
        reserve = self._min_free_share * disk.f_blocks
        if disk.f_bavail - num_bytes / disk.f_frsize < reserve:
            raise OSError(f"the last {self._min_free_share:.0%} of its disk stay free for others")

    @contextmanager
    def _locked(self) -> Iterator[int | None]:
        """Hold the folder's lock: gives the file that counts its bytes, or None if it is taken."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._root / "used_bytes", flags, 0o600)
        try:
            yield descriptor if _try_to_lock(descriptor) else None
        finally:
            os.close(descriptor)

    def _make_room(self, num_bytes: int) -> int:
        """Remove what has been unused for longest, if need be; gives the bytes that remain.

        Unfinished files are looked at first: one that is finished meanwhile counts twice, not
        never.
        """
        oldest_s = time.time() - _ORPHAN_S
        unfinished = list(_list_files(self._root / "tmp"))
        entries = sorted(_list_files(self._root / "entries"), key=lambda found: found[1].st_atime)
        used = sum(status.st_size for _, status in [*unfinished, *entries])
        doomed = [found for found in unfinished if found[1].st_mtime < oldest_s]
        if used + num_bytes > self._max_bytes:
            doomed += [found for found in entries if found[1].st_atime < self._opened_s]
        wanted = (1 - _ROOM_MADE_SHARE) * self._max_bytes - num_bytes
        for path, status in doomed:
            if used <= wanted:
                break
            path.unlink(missing_ok=True)
            used -= status.st_size
        return used

    def _drop(self, path: Path, reason: OSError | ValueError) -> None:
        """Remove an entry that cannot be used."""
        with suppress(OSError):
            path.unlink()
        if not self._has_warned_of_damage:
            self._has_warned_of_damage = True
            logger.warning(
                "cache entry %s cannot be used and is removed: %s; its source is read again "
                "(this process reports no further ones)",
                path,
                reason,
            )

    def _stop_writing(self, error: OSError) -> None:
        self._is_writable = False
        logger.warning(
            "cache %s keeps nothing new from here on: %s; nothing is lost, sources are read "
            "instead: give --cache a folder of this user on a local disk with room",
            self._root,
            error.strerror or error,
        )


def _make_own_folder(folder: Path) -> None:
    """Make a folder, or make sure that nobody else can have put anything into it.

    Raises:
        PermissionError: If it is a link, another user's, or open to others' writing.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not is_own or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"expected a folder that user {os.geteuid()} alone may write to")


def _make_empty(path: Path, num_bytes: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, num_bytes)
    finally:
        os.close(descriptor)


def _try_to_lock(descriptor: int) -> bool:
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE_S)
        else:
            return True
    return False


def _list_files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Files right in a folder, without those that go meanwhile."""
    with os.scandir(folder) as found:
        for item in found:
            with suppress(FileNotFoundError):
                yield Path(item.path), item.stat(follow_symlinks=False)


def _set_times(place: Path | int, used_ns: int, confirmed_ns: int) -> None:
    # A folder that may only be read serves what it holds.
    with suppress(OSError):
        os.utime(place, ns=(used_ns, confirmed_ns))


def _read_count(descriptor: int) -> int | None:
    data = os.pread(descriptor, _COUNT.size, 0)
    return int(_COUNT.unpack(data)[0]) if len(data) == _COUNT.size else None
