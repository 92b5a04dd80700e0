"""One driver per run: a lock that needs nothing of a store but "write if absent".

Parts are committed under their numbers, so that two drivers on one output would do no harm to its
content; they would do all work twice, and one would finish under the other's feet. Locks are
numbered. Whoever creates the next number owns the run; an owner shows that it lives by rewriting
its beat, and one that sees a higher number than its own has lost the run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from retinaray.errors import ClusterError, ConfigError, MissingFileError, StorageError
from retinaray.storage import Storage, join_uri

logger = logging.getLogger(__name__)

BEAT_S = 10.0
"""Seconds between two signs of life."""
STALE_S = 60.0
"""An owner without a sign for so long is taken for dead."""

# Locks that this process holds: what it has given up but could not delete is nobody's.
_held: set[str] = set()

_LOCK_NAME = re.compile(r"/driver-(\d{6})\.json$")


class RunLock:
    """The right to drive one run.

    Args:
        root: Folder or S3 prefix of the run.
        storage: Where it is.
        now: Clock in seconds; the same kind of clock everywhere, to a few seconds.
        sleep: Waits; only while another owner may be dead.
    """

    def __init__(
        self,
        root: str,
        storage: Storage,
        *,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._folder = join_uri(root, "lock")
        self._root = root
        self._storage = storage
        self._now = now
        self._sleep = sleep
        self._number = 0
        self._stopped = threading.Event()
        self._lost = ""

    @contextlib.contextmanager
    def held(self) -> Iterator[RunLock]:
        """Own the run inside the block, and show signs of life.

        Raises:
            ConfigError: If another driver is at work on the run.
            StorageError: If the lock cannot be read or written.
        """
        self.acquire()
        beating = threading.Thread(target=self._keep_beating, name="run-lock", daemon=True)
        beating.start()
        try:
            yield self
        finally:
            self._stopped.set()
            beating.join()
            try:
                self.release()
            except StorageError as error:
                # What ended the run matters more; the next driver sees that nobody is there.
                logger.warning("the lock of the run could not be removed: %s", error)

    def acquire(self) -> None:
        """Take the run, after at most `STALE_S` seconds for an owner that shows no sign of life.

        Raises:
            ConfigError: If another driver is at work on the run.
        """
        while True:
            newest = max(self._list_numbers(), default=0)
            if newest and not self._is_dead(newest):
                raise ConfigError(self._describe_owner(newest))
            self._number = newest + 1
            self._beat()
            if self._storage.write_bytes(
                self._lock(self._number), json.dumps(_myself()).encode(), only_if_absent=True
            ):
                _held.add(self._lock(self._number))
                self._remove_before(self._number)
                return
            # Another driver was faster: it is judged like any owner.

    def release(self) -> None:
        """Give the run back; a lock that was lost to another driver stays that driver's."""
        number, self._number = self._number, 0
        if number:
            _held.discard(self._lock(number))
            self._storage.delete(self._lock(number))
            self._storage.delete(self._beat_file(number))

    def check(self) -> None:
        """Refuse to go on when another driver has taken the run.

        Raises:
            ClusterError: If it has.
        """
        if self._lost:
            raise ClusterError(self._lost)

    def look(self) -> None:
        """Show a sign of life, and see whether the run is still ours."""
        self._beat()
        newest = max(self._list_numbers(), default=0)
        if newest > self._number:
            self._lost = (
                f"{self._root}: another driver took over this run ({self._read_owner(newest)}), "
                f"because this one had shown no sign of life for {STALE_S:.0f} s; its parts are "
                "kept, and the other driver goes on with them"
            )

    def _keep_beating(self) -> None:
        while not self._stopped.wait(BEAT_S):
            try:
                self.look()
            except StorageError as error:
                # The store may be away for a while; the next beat tells.
                logger.warning("the lock of the run could not be renewed: %s", error)

    def _is_dead(self, number: int) -> bool:
        """Whether an owner is known to be dead, or shows no sign of life while we watch."""
        owner = self._read_owner(number)
        if owner is None or _has_ended_here(owner):
            return True
        if owner == _myself() and self._lock(number) not in _held:
            return True
        first = self._read_beat(number)
        wait_until = (first or 0.0) + STALE_S
        if self._now() < wait_until:
            logger.info("%s; waiting whether it lives", self._describe_owner(number))
        while self._now() < wait_until:
            self._sleep(1.0)
            if self._read_beat(number) != first:
                return self._read_owner(number) is None
        return True

    def _describe_owner(self, number: int) -> str:
        owner = self._read_owner(number) or {}
        return (
            f"{self._root}: another driver is at work on this run (host {owner.get('host')}, "
            f"process {owner.get('pid')}): wait for it, or give another --output"
        )

    def _list_numbers(self) -> list[int]:
        found = (_LOCK_NAME.search(uri) for uri in self._storage.list_files(self._folder))
        return [int(match.group(1)) for match in found if match]

    def _remove_before(self, number: int) -> None:
        for older in self._list_numbers():
            if older < number:
                self._storage.delete(self._lock(older))
                self._storage.delete(self._beat_file(older))

    def _read_owner(self, number: int) -> dict[str, Any] | None:
        try:
            owner = json.loads(self._storage.read_bytes(self._lock(number)))
        except MissingFileError:
            return None
        return owner if isinstance(owner, dict) else {}

    def _read_beat(self, number: int) -> float | None:
        try:
            return float(self._storage.read_bytes(self._beat_file(number)))
        except MissingFileError:
            return None

    def _beat(self) -> None:
        self._storage.write_bytes(self._beat_file(self._number), f"{self._now()}".encode())

    def _lock(self, number: int) -> str:
        return join_uri(self._folder, f"driver-{number:06}.json")

    def _beat_file(self, number: int) -> str:
        return join_uri(self._folder, f"driver-{number:06}.beat")


def _myself() -> dict[str, Any]:
    return {"host": _host(), "pid": os.getpid(), "started": _start_of(os.getpid())}


def _host() -> str:
    """This machine, or this container of it: process numbers mean nothing beyond."""
    try:
        namespace = Path("/proc/self/ns/pid").readlink().name
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {namespace}".strip()


def _has_ended_here(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that is gone."""
    if owner.get("host") != _host() or not isinstance(owner.get("pid"), int):
        return False
    return _start_of(owner["pid"]) != owner.get("started")


def _start_of(pid: int) -> str:
    """When a process of this machine began, as text; empty when there is none or no way to tell.

    Two processes may have one pid after each other; their starts differ.
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    # The name in parentheses may hold spaces; the start is the 22nd field of all.
    return status.rpartition(")")[2].split()[19]
