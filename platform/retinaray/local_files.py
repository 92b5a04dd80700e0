"""Files of this machine: their paths by URI, written whole or not at all, failures in words."""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes

from retinaray.errors import MissingFileError, StorageError, UnreadableFileError
from retinaray.local_listing import TEMP_PREFIX, TEMP_SUFFIX
from retinaray.s3_failures import hide_secret

# The name itself is the fault: no later attempt can succeed.
_NO_BYTE = re.compile("[\ud800-\udc7f\udd00-\udfff]")
_NAME_FAULTS = frozenset([errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL])


def local_path(uri: str) -> Path:
    """Give the path behind a local URI.

    Raises:
        StorageError: If the URI has another scheme or no absolute path, or no file is called so.
    """
    if uri.startswith("file://"):
        path = os.fsdecode(unquote_to_bytes(uri.removeprefix("file://").removeprefix("localhost")))
        if not path.startswith("/"):
            raise UnreadableFileError(
                f"expected file:///absolute/path, got {hide_secret(uri)!r}; write three slashes"
            )
        return _to_path(path, uri)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|s3:/", uri) or not uri:
        raise UnreadableFileError(
            f"expected a local path, file:///path or s3://bucket/key, got {hide_secret(uri)!r}; "
            "copy the data to one of these, or correct the URI"
        )
    return _to_path(uri, uri)


def _to_path(name: str, uri: str) -> Path:
    # pathlib raises ValueErrors for these. Other half characters stand for bytes that are no text.
    if "\0" in name or (not name.isascii() and _NO_BYTE.search(name)):
        raise UnreadableFileError(
            f"expected a file's name, got {uri!r} with NUL or invalid Unicode; correct the name"
        )
    return Path(name)


class LocalFile(io.FileIO):
    """A plain file whose failures, such as a full disk, are StorageErrors."""

    def __init__(self, path: Path, mode: str, *, uri: str) -> None:
        super().__init__(path, mode)
        self._uri = uri

    def readinto(self, buffer: Any, /) -> int:
        """See `io.FileIO`."""
        with explained_local(self._uri, "read"):
            return super().readinto(buffer)

    def write(self, data: Any, /) -> int:
        """See `io.FileIO`."""
        with explained_local(self._uri, "write"):
            return super().write(data)


def _new_temporary(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent / f"{TEMP_PREFIX}{os.urandom(16).hex()}{TEMP_SUFFIX}"


def write_local(uri: str, data: bytes, *, only_if_absent: bool) -> bool:
    """Write a file by a rename; see `Storage.write_bytes`."""
    target = local_path(uri)
    with explained_local(uri, "write"):
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
def open_local_writer(uri: str) -> Iterator[BinaryIO]:
    """A file that appears when it is closed; see `Storage.open_writer`."""
    with explained_local(uri, "write"):
        target = local_path(uri)
        temporary = _new_temporary(target)
        raw = LocalFile(temporary, "xb", uri=uri)
    try:
        with io.BufferedWriter(raw) as writer:
            yield writer
        with explained_local(uri, "write"):
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
def explained_local(uri: str, verb: str) -> Iterator[None]:
    """Turn what the operating system raises into a StorageError that says what to do."""
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
