"""The one seam between a URI and its bytes: local paths, `file://` and `s3://bucket/key`.

Local paths and S3 keys are taken literally (`#`, `?`, `%20` are part of the name); `file://` URIs
are percent-encoded, as `Path.as_uri` writes them. Folders exist only as parts of names: writing
creates them, listing an absent one gives nothing. Credentials never enter an object: they come from
the standard AWS sources (environment, profile, instance role).
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote_to_bytes

from retinaray.errors import MissingFileError, StorageError
from retinaray.s3_objects import S3Objects, split_s3_uri

__all__ = [
    "MissingFileError",
    "Storage",
    "is_s3",
    "join_uri",
    "local_path",
    "split_s3_uri",
]

_READ_BYTES = 2**20
# Names that a killed writer can leave behind; no listing shows them.
_TEMP_PREFIX, _TEMP_SUFFIX = ".retinaray-", ".tmp"


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
            raise StorageError(f"expected file:///absolute/path, got {uri!r}; write three slashes")
        return Path(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|s3:/", uri) or not uri:
        raise StorageError(
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
        gives nothing. Files still being written are not seen.

        Raises:
            StorageError: If a folder cannot be read, or the bucket is missing.
        """
        if is_s3(uri):
            yield from self._s3.list_files(uri)
            return
        with _explained_local(uri, "list"):
            path = local_path(uri)
            if path.is_file():
                yield uri
            elif path.is_dir():
                for name in _walk(path, frozenset()):
                    yield join_uri(uri, name)

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
    return target.parent / f"{_TEMP_PREFIX}{os.urandom(16).hex()}{_TEMP_SUFFIX}"


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


def _walk(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Yield the names of files below a folder, relative to it, in the order of whole names."""
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a symbolic link back to a folder that holds it
        return
    with os.scandir(folder) as entries:
        # With its slash a folder sorts where its files sort among the other whole names.
        names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in entries)
    for name in names:
        if name.endswith("/"):
            yield from (name + inner for inner in _walk(folder / name, above | {identity}))
        elif not (name.startswith(_TEMP_PREFIX) and name.endswith(_TEMP_SUFFIX)):
            yield name


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
        raise StorageError(
            f"cannot {verb} {uri}: access denied; check owner and mode of the file and its folders"
        ) from error
    except IsADirectoryError as error:
        raise StorageError(f"cannot {verb} {uri}: it is a folder; name a file") from error
    except OSError as error:
        raise StorageError(
            f"cannot {verb} {uri}: {error.strerror}; check the disk's space and health, or choose "
            "another place"
        ) from error
