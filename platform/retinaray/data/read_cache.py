"""Files of slow storage, kept on a local disk and held against the storage before they are used.

Knows no storage: what reads is handed in, and tells the state of a file by a name, its version.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from retinaray.data.cache_entry import Keepsake
from retinaray.data.cache_folder import CacheFolder


class VersionedBytes(NamedTuple):
    """A file as it was read.

    Attributes:
        content: All of it.
        version: Names the state in which it was; empty when that is not sure, and nothing may be
            kept.
    """

    content: bytes
    version: str


ReadVersion = Callable[[str, str | None], VersionedBytes | None]
"""Reads the file at a URI; None, without reading, if it is in the state of the version given.

Raises StorageError.
"""


@dataclass(frozen=True)
class CheckedCache:
    """A cache of what was made of files, whose entries are dropped when their file has changed.

    Attributes:
        folder: Where entries are kept.
        read: Reads the files.
        recheck_s: For so many seconds after the storage has last said so, a file counts as
            unchanged without asking; 0 = always ask.
    """

    folder: CacheFolder
    read: ReadVersion
    recheck_s: float = 0.0

    def find(self, uri: str, keys: Sequence[str]) -> Keepsake | VersionedBytes:
        """What is kept of a file, if it still has that state; else the file as it is now.

        Args:
            uri: The file.
            keys: Of entries, each of which would do; the first one that is there counts.

        Raises:
            StorageError: If the file cannot be read, or nobody can say whether it has changed.
        """
        for key in keys:
            found = self.folder.get(key)
            if found is None:
                continue
            if 0 <= found.age_s < self.recheck_s:
                return found.keepsake
            fresh = self.read(uri, found.keepsake.version)
            if fresh is not None:
                return fresh
            if self.recheck_s:
                self.folder.confirm(key)
            return found.keepsake
        return self.read_now(uri)

    def read_now(self, uri: str) -> VersionedBytes:
        """The file as it is now, whatever is kept of it.

        Raises:
            StorageError: If it cannot be read.
        """
        fresh = self.read(uri, None)
        assert fresh is not None, "a reader that knows no version has to read"
        return fresh

    def keep(self, key: str, source: VersionedBytes, keepsake: Keepsake) -> None:
        """Keep what was made of a file, unless the file's state is not sure."""
        if source.version:
            self.folder.put(key, keepsake)


class ReadCache:
    """Reads files through a cache; called with a URI it gives the bytes that are there now.

    Args:
        cache: Where copies are kept, and what reads.
    """

    def __init__(self, cache: CheckedCache) -> None:
        self._cache = cache

    def __call__(self, uri: str) -> bytes:
        """The bytes at a URI.

        Raises:
            StorageError: If the file cannot be read, or nobody can say whether it has changed.
        """
        key = f"file {uri}"
        found = self._cache.find(uri, [key])
        if isinstance(found, Keepsake):
            return bytes(found.content)
        self._cache.keep(key, found, Keepsake(found.version, found.content))
        return found.content
