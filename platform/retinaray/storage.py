"""The one seam between a URI and its bytes: local paths, `file://` and `s3://bucket/key`.

Local paths and S3 keys are taken literally (`#`, `?`, `%20` are part of the name); `file://` URIs
are percent-encoded, as `Path.as_uri` writes them. Folders exist only as parts of names: writing
creates them, listing an absent one gives nothing. Credentials never enter an object: they come from
the standard AWS sources (environment, profile, instance role).
"""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote, unquote_to_bytes

from retinaray.errors import MissingFileError, StorageError, UnreadableFileError
from retinaray.local_listing import TEMP_PREFIX, TEMP_SUFFIX, walk_names
from retinaray.s3_objects import S3Objects, split_s3_uri

__all__ = [
    "FileEntry",
    "MissingFileError",
    "Storage",
    "is_s3",
    "join_uri",
    "local_path",
    "split_s3_uri",
]

_READ_BYTES = 2**20
# The name itself is the fault: no later attempt can succeed.
_NAME_FAULTS = frozenset([errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL])


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


def local_path(uri: str) -> Path:
    """Give the path behind a local URI.

    Raises:
        StorageError: If the URI has another scheme, or `file://` without an absolute path.
    """
    if uri.startswith("file://"):
        path = os.fsdecode(unquote_to_bytes(uri.removeprefix("file://").removeprefix("localhost")))
        if not path.startswith("/"):
            raise UnreadableFileError(
                f"expected file:///absolute/path, got {uri!r}; write three slashes"
            )
        return Path(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|s3:/", uri) or not uri:
        raise UnreadableFileError(
            f"expected a local path, file:///path or s3://bucket/key, got {uri!r}; "
            "copy the data to one of these, or correct the URI"
        )
    return Path(uri)


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
    """

    endpoint_url: str | None = None
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 60.0
    max_attempts: int = 5

    def read_bytes(self, uri: str) -> bytes:
        """Read a whole file.

        Raises:
            MissingFileError: If it is not there.
            StorageError: If it cannot be read.
        """
        if is_s3(uri):
            with self._s3.open_reader(uri) as reader:
                return reader.readall()
        with _explained_local(uri, "read"):
            return local_path(uri).read_bytes()

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
            with _explained_local(uri, "read"), local_path(uri).open("rb", buffering=0) as file:
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
        return _write_local(uri, data, only_if_absent=only_if_absent)

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
        with _explained_local(uri, "look at"):
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
            yield from (found for found, _, _ in self._s3.list_entries(uri))
            return
        with _explained_local(uri, "list"):
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
            yield from map(FileEntry._make, self._s3.list_entries(uri))
            return
        for found in self.list_files(uri):
            with _explained_local(found, "look at"):
                path = local_path(found)
                try:
                    status = path.stat()
                except FileNotFoundError:
                    # A link that leads nowhere is listed too; it fails when it is read.
                    status = path.lstat()
            yield FileEntry(found, status.st_size, status.st_mtime)

    def open_writer(self, uri: str) -> AbstractContextManager[BinaryIO]:
        """Open a file for streaming; it appears, whole, when the block ends without an exception.

        After an exception nothing is left and an older file keeps its content. On S3 it holds at
        most two parts of 32 MiB in memory; a writer killed outright leaves an unfinished upload
        there, which a lifecycle rule of the bucket removes.

        Raises:
            StorageError: If it cannot be written.
        """
        return self._s3.open_writer(uri) if is_s3(uri) else _open_local_writer(uri)

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
            with _explained_local(uri, "read"):
                raw = _LocalFile(local_path(uri), "rb", uri=uri)
        with io.BufferedReader(raw, _READ_BYTES) as reader:
            yield reader

    def delete(self, uri: str) -> None:
        """Remove a file; a missing one is fine.

        Raises:
            StorageError: If it cannot be removed.
        """
        if not is_s3(uri):
            with _explained_local(uri, "delete"):
                local_path(uri).unlink(missing_ok=True)
            return
        self._s3.delete(uri)

    @property
    def _s3(self) -> S3Objects:
        return S3Objects(
            self.endpoint_url, self.connect_timeout_s, self.read_timeout_s, self.max_attempts
        )


class _LocalFile(io.FileIO):
    """A plain file whose failures, such as a full disk, are StorageErrors."""

    def __init__(self, path: Path, mode: str, *, uri: str) -> None:
        super().__init__(path, mode)
        self._uri = uri

    def readinto(self, buffer: Any, /) -> int:
        with _explained_local(self._uri, "read"):
            return super().readinto(buffer)

    def write(self, data: Any, /) -> int:
        with _explained_local(self._uri, "write"):
            return super().write(data)


def _new_temporary(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent / f"{TEMP_PREFIX}{os.urandom(16).hex()}{TEMP_SUFFIX}"


def _write_local(uri: str, data: bytes, *, only_if_absent: bool) -> bool:
    target = local_path(uri)
    with _explained_local(uri, "write"):
        if only_if_absent and target.exists():
            return False
        temporary = _new_temporary(target)
        try:
            temporary.write_bytes(data)
            _sync(temporary)
            if only_if_absent:
                # Unlike a rename, a hard link never replaces what another writer put there.
                os.link(temporary, target)
            else:
                temporary.replace(target)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
    return True


@contextmanager
def _open_local_writer(uri: str) -> Iterator[BinaryIO]:
    with _explained_local(uri, "write"):
        target = local_path(uri)
        temporary = _new_temporary(target)
        raw = _LocalFile(temporary, "xb", uri=uri)
    try:
        with io.BufferedWriter(raw) as writer:
            yield writer
        with _explained_local(uri, "write"):
            _sync(temporary)
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Force a file's content to the disk, so that the rename that follows never beats it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained_local(uri: str, verb: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        if verb == "write":
            raise StorageError(
                f"cannot write {uri}: {error.strerror}; check that its folder can be a folder"
            ) from error
        raise MissingFileError(f"cannot {verb} {uri}: no such file; check the path") from error
    except PermissionError as error:
        raise UnreadableFileError(
            f"cannot {verb} {uri}: access denied; check owner and mode of the file and its folders"
        ) from error
    except IsADirectoryError as error:
        raise UnreadableFileError(f"cannot {verb} {uri}: it is a folder; name a file") from error
    except OSError as error:
        is_name = error.errno in _NAME_FAULTS
        raise (UnreadableFileError if is_name else StorageError)(
            f"cannot {verb} {uri}: {error.strerror}; check the disk's space and health, or choose "
            "another place"
        ) from error
