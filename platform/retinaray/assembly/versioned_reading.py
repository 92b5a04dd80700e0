"""Files together with a name of the state in which they are, for caches that must not be stale.

The state of an S3 object is its ETag and length; asking and reading are one request. That of a
local file is its length, times and inode.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import Any, cast

from retinaray.data.read_cache import VersionedBytes
from retinaray.local_files import explained_local, local_path
from retinaray.s3_failures import explain_s3_failures
from retinaray.s3_objects import S3Objects, split_s3_uri
from retinaray.storage import Storage, is_s3

logger = logging.getLogger(__name__)

_NOT_MODIFIED = 304
_SETTLED_S = 2.0
"""A file system's clock ticks in steps: two changes within one of them look alike. The coarsest, of
FAT, ticks every two seconds."""


@dataclass(frozen=True)
class VersionedReader:
    """Reads the file at a URI unless it is in a known state; a `data.read_cache.ReadVersion`.

    Attributes:
        storage: Where S3 is, and how it is asked.
    """

    storage: Storage

    def __call__(self, uri: str, known: str | None) -> VersionedBytes | None:
        """Read a file, or give None if it is still in the known state.

        Args:
            uri: The file.
            known: A version that this reader gave of it; none = read in any case.

        Raises:
            MissingFileError: If it is not there.
            StorageError: If it cannot be read.
        """
        if is_s3(uri):
            return self._read_object(uri, known)
        return _read_local(uri, known)

    def _read_object(self, uri: str, known: str | None) -> VersionedBytes | None:
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        answer = self._ask(uri, known)
        if answer is None:
            return None
        etag = answer.get("ETag", "")
        version = f"{etag} {answer['ContentLength']}" if etag else ""
        with answer["Body"] as body:
            if known is not None and version == known:
                # Not every server knows conditional requests.
                return None
            try:
                return VersionedBytes(body.read(), version)
            except (BotoCoreError, HTTPError, OSError) as error:
                logger.warning("reading %s broke off, it is read again: %s", uri, error)
        # The storage's own reader goes on where a connection was lost.
        return VersionedBytes(self.storage.read_bytes(uri), "")

    def _ask(self, uri: str, known: str | None) -> Any:
        """The answer to a request for an object; None if it is still in the known state."""
        from botocore.exceptions import ClientError

        own = self.storage
        objects = S3Objects(
            own.endpoint_url, own.connect_timeout_s, own.read_timeout_s, own.max_attempts
        )
        bucket, key = split_s3_uri(uri)
        condition = {} if known is None else {"IfNoneMatch": known.rpartition(" ")[0]}
        with explain_s3_failures(uri, "read"):
            try:
                return objects.client().get_object(Bucket=bucket, Key=key, **condition)
            except ClientError as error:
                answer = cast("dict[str, Any]", error.response["ResponseMetadata"])
                if answer["HTTPStatusCode"] != _NOT_MODIFIED:
                    raise
        return None


def _read_local(uri: str, known: str | None) -> VersionedBytes | None:
    with explained_local(uri, "read"):
        path = local_path(uri)
        if known is not None and _name_state(path.stat()) == known:
            return None
        with path.open("rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            content = file.readall()
            after = os.fstat(file.fileno())
    is_settled = time.time() - max(before.st_mtime, before.st_ctime) > _SETTLED_S
    is_sure = is_settled and _name_state(before) == _name_state(after)
    return VersionedBytes(content, _name_state(before) if is_sure else "")


def _name_state(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
