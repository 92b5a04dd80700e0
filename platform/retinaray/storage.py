"""The one seam between a URI and its bytes: local paths, `file://` and `s3://bucket/key`.

Local paths and S3 keys are taken literally (`#`, `?`, `%20` are part of the name); `file://` URIs
are percent-encoded, as `Path.as_uri` writes them. Folders exist only as parts of names: writing
creates them, listing an absent one gives nothing. Credentials never enter an object: they come from
the standard AWS sources (environment, profile, instance role).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple
from urllib.parse import quote

from retinaray.errors import MissingFileError, UnreadableFileError
from retinaray.local_files import (
    LocalFile,
    explained_local,
    local_path,
    open_local_writer,
    write_local,
)
from retinaray.local_listing import walk_names
from retinaray.s3_failures import expect_plain_endpoint, find_secret, hide_secret
from retinaray.s3_listing import list_entries, list_level
from retinaray.s3_objects import S3Objects, split_s3_uri

__all__ = [
    "FileEntry",
    "MissingFileError",
    "Storage",
    "find_secret",
    "hide_secret",
    "is_s3",
    "join_uri",
    "local_path",
    "split_s3_uri",
]

_READ_BYTES = 2**20


class FileEntry(NamedTuple):
    """A file as a listing tells of it.

    Attributes:
        uri: Full URI.
        num_bytes: Its length.
        modified_s: When it was last written, in seconds since 1970 UTC.
    """

    uri: str
    num_bytes: int
    modified_s: float


def is_s3(uri: str) -> bool:
    """Say whether a URI names an S3 object or prefix."""
    return uri.startswith("s3://")


def join_uri(base: str, *parts: str) -> str:
    """Append names to a folder URI with one `/` between them; an empty base gives the parts alone.

    Parts are plain names, also below a `file://` base, where they are percent-encoded.
    """
    for part in parts:
        name = quote(os.fsencode(part)) if base.startswith("file://") else part
        separator = "/" if base and not base.endswith("/") else ""
        base = f"{base}{separator}{name.lstrip('/') if base else name}"
    return base


@dataclass(frozen=True)
class Storage:
    """Reads and writes whole files by URI; safe to pickle and to share between threads.

    The S3 client is made on first use in each process and again when the AWS_* variables change.
    Every failure is a `StorageError` that names the URI, the cause and the remedy.

    Args:
        endpoint_url: S3 server; None leaves it to AWS_ENDPOINT_URL, else AWS itself.
        connect_timeout_s: Limit for opening one connection.
        read_timeout_s: Longest silence of the server during one answer.
        max_attempts: Tries per request, with growing pauses between them; at least 1.

    Raises:
        ConfigError: If a secret stands in the endpoint: runs record it.
    """

    endpoint_url: str | None = None
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 60.0
    max_attempts: int = 5

    def __post_init__(self) -> None:
        expect_plain_endpoint(self.endpoint_url or "", "endpoint_url")

    def read_bytes(self, uri: str, *, max_bytes: int | None = None) -> bytes:
        """Read a whole file.

        Args:
            uri: The file.
            max_bytes: A longer one is refused before its content is read; none = of any length.

        Raises:
            MissingFileError: If it is not there.
            UnreadableFileError: If it is longer than that.
            StorageError: If it cannot be read.
        """
        if is_s3(uri):
            with self._s3.open_reader(uri) as reader:
                _refuse_long(uri, reader.size, max_bytes)
                return reader.readall()
        with explained_local(uri, "read"):
            path = local_path(uri)
            if max_bytes is not None:
                _refuse_long(uri, path.stat().st_size, max_bytes)
            return path.read_bytes()

    def read_range(self, uri: str, start: int, num_bytes: int) -> bytes:
        """Read some bytes of a file, without the rest of it.

        Args:
            uri: The file.
            start: Position of the first byte, from 0.
            num_bytes: How many; 0 gives nothing, and asks nobody.

        Raises:
            MissingFileError: If it is not there.
            StorageError: If it cannot be read, or ends before these bytes do.
            ValueError: If a number is negative.
        """
        if start < 0 or num_bytes < 0:
            raise ValueError(f"expected a range from 0 on in {uri}, got {num_bytes} at {start}")
        if num_bytes == 0:
            return b""
        if is_s3(uri):
            with self._s3.open_reader(uri, start=start, num_bytes=num_bytes) as reader:
                data = reader.readall()
        else:
            with explained_local(uri, "read"), local_path(uri).open("rb", buffering=0) as file:
                file.seek(start)
                data = file.read(num_bytes)
        if len(data) < num_bytes:
            raise UnreadableFileError(
                f"cannot read {uri}: expected {num_bytes} bytes from byte {start} on, found "
                f"{len(data)}; the file is shorter than it was when it was listed: list it again"
            )
        return data

    def write_bytes(self, uri: str, data: bytes, *, only_if_absent: bool = False) -> bool:
        """Write a whole file at once: a reader sees the old content or the new, never a part.

        Args:
            uri: Where to; missing folders are made.
            data: The content, at most 5 GB on S3.
            only_if_absent: Leave an existing file alone; of several concurrent writers one wins.

        Returns:
            True if this call wrote the file, False if `only_if_absent` found it there.

        Raises:
            StorageError: If it cannot be written.
        """
        if is_s3(uri):
            return self._s3.put(uri, data, only_if_absent=only_if_absent)
        return write_local(uri, data, only_if_absent=only_if_absent)

    def exists(self, uri: str) -> bool:
        """Say whether a file is there; False for a folder.

        Raises:
            StorageError: If that cannot be found out, for one because the bucket is missing.
        """
        try:
            self.size(uri)
        except MissingFileError:
            return False
        return True

    def size(self, uri: str) -> int:
        """Give a file's length in bytes.

        Raises:
            MissingFileError: If it is not there, or is a local folder.
            StorageError: If it cannot be looked at.
        """
        if is_s3(uri):
            return self._s3.size(uri)
        with explained_local(uri, "look at"):
            path = local_path(uri)
            size = path.stat().st_size
            if not path.is_file():
                raise MissingFileError(f"expected a file at {uri}, found a folder; name a file")
            return size

    def list_files(self, uri: str) -> Iterator[str]:
        """Walk all files below a folder or prefix, as full URIs, one S3 page or folder at a time.

        The order is that of the keys' code points (an S3 server other than AWS may have its own).
        A file's URI gives that file; `s3://b/img` never gives `s3://b/img2/x.jpg`; an absent folder
        gives nothing. Files still being written are not seen. Memory does not grow with the number
        of files, not even in one local folder.

        Raises:
            StorageError: If a folder cannot be read, or the bucket is missing.
        """
        if is_s3(uri):
            yield from (found for found, _, _ in list_entries(self._s3, uri))
            return
        with explained_local(uri, "list"):
            path = local_path(uri)
            if path.is_file():
                yield uri
            elif path.is_dir():
                for name in walk_names(path):
                    yield join_uri(uri, name)

    def list_entries(self, uri: str) -> Iterator[FileEntry]:
        """Walk as `list_files` does, and tell length and age of each file.

        On S3 the listing holds both; of a local file they are looked up one by one.

        Raises:
            StorageError: If a folder cannot be read, or the bucket is missing.
        """
        if is_s3(uri):
            yield from map(FileEntry._make, list_entries(self._s3, uri))
            return
        for found in self.list_files(uri):
            with explained_local(found, "look at"):
                path = local_path(found)
                try:
                    status = path.stat()
                except FileNotFoundError:
                    # A link that leads nowhere is listed too; it fails when it is read.
                    status = path.lstat()
            yield FileEntry(found, status.st_size, status.st_mtime)

    def list_level(self, uri: str) -> list[FileEntry | str] | None:
        """What lies right below an S3 prefix, so that several threads can list what is below that.

        Returns:
            Files, and URIs of prefixes that end in a slash, in the order in which `list_entries`
            gives what they hold; none where there are more than a thousand, and of local folders.

        Raises:
            StorageError: If it cannot be listed.
        """
        level = list_level(self._s3, uri) if is_s3(uri) else None
        if level is None:
            return None
        return [item if isinstance(item, str) else FileEntry._make(item) for item in level]

    def open_writer(self, uri: str) -> AbstractContextManager[BinaryIO]:
        """Open a file for streaming; it appears, whole, when the block ends without an exception.

        After an exception nothing is left and an older file keeps its content. On S3 it holds at
        most two parts of 32 MiB in memory; a writer killed outright leaves an unfinished upload
        there, which a lifecycle rule of the bucket removes.

        Raises:
            StorageError: If it cannot be written.
        """
        return self._s3.open_writer(uri) if is_s3(uri) else open_local_writer(uri)

    @contextmanager
    def open_reader(self, uri: str) -> Iterator[BinaryIO]:
        """Open a file for streaming; the handle can seek.

        Raises:
            MissingFileError: If it is not there.
            StorageError: If it cannot be read, or changed meanwhile on S3.
        """
        raw: io.RawIOBase
        if is_s3(uri):
            raw = self._s3.open_reader(uri)
        else:
            with explained_local(uri, "read"):
                raw = LocalFile(local_path(uri), "rb", uri=uri)
        with io.BufferedReader(raw, _READ_BYTES) as reader:
            yield reader

    def delete(self, uri: str) -> None:
        """Remove a file; a missing one is fine.

        Raises:
            StorageError: If it cannot be removed.
        """
        if not is_s3(uri):
            with explained_local(uri, "delete"):
                local_path(uri).unlink(missing_ok=True)
            return
        self._s3.delete(uri)

    @property
    def _s3(self) -> S3Objects:
        return S3Objects(
            self.endpoint_url, self.connect_timeout_s, self.read_timeout_s, self.max_attempts
        )


def _refuse_long(uri: str, num_bytes: int, max_bytes: int | None) -> None:
    if max_bytes is not None and num_bytes > max_bytes:
        raise UnreadableFileError(
            f"{uri} has {num_bytes} bytes, expected at most {max_bytes}; raise the limit if it is "
            "what it should be"
        )
