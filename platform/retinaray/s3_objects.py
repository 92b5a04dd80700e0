"""S3 objects by URI: reading with resume, atomic writing, listing.

Works with AWS and with any server that speaks S3 (MinIO, SeaweedFS, Ceph). boto3 is imported on
first use. Knows nothing about local files; `storage.py` is what callers use.
"""

from __future__ import annotations

import io
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from retinaray.errors import MissingFileError, StorageError, UnreadableFileError
from retinaray.s3_failures import (
    SERVER_ADVICE,
    expect_plain_endpoint,
    explain_s3_failures,
    find_secret,
    hide_secret,
)

logger = logging.getLogger(__name__)

# Parts of one size (some servers demand it); S3 allows 10,000 of them, so 312 GiB per object.
PART_BYTES = 32 * 2**20
_WRITER_TAG = "retinaray-writer"
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
_CLIENT_ENVIRONMENT = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"),
    *("AWS_REGION", "AWS_DEFAULT_REGION", *_ENDPOINT_VARIABLES),
    *("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"),
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_clients: dict[tuple[object, ...], Any] = {}
_client_locks: dict[int, threading.Lock] = {}


def split_s3_uri(uri: str) -> tuple[str, str]:
    """Take `s3://bucket/key` apart; the key is literal and may be empty.

    Raises:
        StorageError: If the scheme or the bucket is missing, the name is no text, or a secret
            stands in it.
    """
    secret = find_secret(uri)
    if secret:
        raise UnreadableFileError(
            f"expected s3://bucket/key, got {hide_secret(uri)!r} with {secret}; take it out: "
            "credentials come from AWS_ACCESS_KEY_ID, the profile or the instance role"
        )
    if not uri.isascii() and _SURROGATE.search(uri):
        raise UnreadableFileError(
            f"expected s3://bucket/key, got {uri!r}, which is no valid Unicode; correct the name"
        )
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket:
        raise UnreadableFileError(f"expected s3://bucket/key, got {uri!r}; write the bucket's name")
    return bucket, key


@dataclass(frozen=True)
class S3Objects:
    """All that is done with objects of one S3 server; see `storage.Storage` for the fields."""

    endpoint_url: str | None
    connect_timeout_s: float
    read_timeout_s: float
    max_attempts: int

    def client(self) -> Any:
        """Give this process's boto3 client, making it first if it or the AWS_* variables are new.

        Raises:
            StorageError: If the settings make no client.
        """
        pid = os.getpid()
        key = (pid, self, *(os.environ.get(name) for name in _CLIENT_ENVIRONMENT))
        if key not in _clients:
            # One lock per process: one held by another thread at a fork would never be released.
            with _client_locks.setdefault(pid, threading.Lock()):
                if key not in _clients:
                    _clients[key] = _new_client(self)
        return _clients[key]

    def open_reader(
        self, uri: str, *, start: int = 0, num_bytes: int | None = None
    ) -> _ObjectReader:
        """Open an object, or at most so many bytes of it; see `Storage.open_reader`."""
        return _ObjectReader(self, uri, start, num_bytes)

    def put(self, uri: str, data: bytes, *, only_if_absent: bool) -> bool:
        """Write an object with one request; see `Storage.write_bytes`."""
        if not only_if_absent:
            with explain_s3_failures(uri, "write"):
                self.client().put_object(**_address(uri), Body=data)
            return True
        # If the answer to a request that succeeded is lost, the repeated request finds the object
        # of the first; the tag tells that it is ours.
        tag = os.urandom(8).hex()
        for attempt in range(self.max_attempts):
            status, num_retries = self._put_if_absent(uri, data, tag)
            if status == 200:
                return True
            if status == 412:
                is_repeat = attempt + num_retries > 0
                return is_repeat and self._head(uri)["Metadata"].get(_WRITER_TAG) == tag
            time.sleep(0.1 * 2**attempt)
        raise StorageError(
            f"cannot write {uri}: {self.max_attempts} times another writer was at it; run again"
        )

    def _put_if_absent(self, uri: str, data: bytes, tag: str) -> tuple[int, int]:
        """Try once; gives HTTP status 200, 412 (exists) or 409 (undecided), and retries."""
        from botocore.exceptions import ClientError

        with explain_s3_failures(uri, "write"):
            try:
                self.client().put_object(
                    **_address(uri), Body=data, IfNoneMatch="*", Metadata={_WRITER_TAG: tag}
                )
            except ClientError as error:
                answer = cast("dict[str, Any]", error.response["ResponseMetadata"])
                if answer["HTTPStatusCode"] not in (409, 412):
                    raise
                return answer["HTTPStatusCode"], answer.get("RetryAttempts", 0)
        return 200, 0

    def size(self, uri: str) -> int:
        """Give an object's length in bytes; see `Storage.size`."""
        return cast("int", self._head(uri)["ContentLength"])

    def _head(self, uri: str) -> Any:
        try:
            with explain_s3_failures(uri, "look at"):
                return self.client().head_object(**_address(uri))
        except MissingFileError:
            # The answer to HEAD has no body: only GET tells a missing bucket from a missing object.
            with explain_s3_failures(uri, "look at"):
                answer = self.client().get_object(**_address(uri))
            answer["Body"].close()
            return answer

    @contextmanager
    def open_writer(self, uri: str) -> Iterator[BinaryIO]:
        """Open an object for streaming; see `Storage.open_writer`."""
        writer = _ObjectWriter(self, uri)
        try:
            yield cast("BinaryIO", writer)
            writer.commit()
        except BaseException:
            writer.abort()
            raise

    def delete(self, uri: str) -> None:
        """Remove an object if it is there; see `Storage.delete`."""
        with explain_s3_failures(uri, "delete"):
            self.client().delete_object(**_address(uri))


class _ObjectReader(io.RawIOBase):
    """An object's bytes; a connection lost midway is reopened at the same byte and version."""

    def __init__(
        self, objects: S3Objects, uri: str, start: int = 0, num_bytes: int | None = None
    ) -> None:
        self._objects, self._uri = objects, uri
        self._position = start
        self._last = "" if num_bytes is None else str(start + num_bytes - 1)
        self._etag: str | None = None
        self._body: Any = None
        self._request()

    def _request(self) -> None:
        options: dict[str, str] = {}
        if self._etag is not None:
            options["IfMatch"] = self._etag
        if self._etag is not None or self._position or self._last:
            options["Range"] = f"bytes={self._position}-{self._last}"
        with explain_s3_failures(self._uri, "read"):
            answer = self._objects.client().get_object(**_address(self._uri), **options)
        if self._etag is None:
            self._etag = answer["ETag"]
            # Of a range the answer holds as much as there is.
            self._size = self._position + answer["ContentLength"]
        self._body = answer["Body"]

    def _drop_body(self, reason: str = "") -> None:
        if reason:
            logger.warning("reading %s broke off at byte %d: %s", self._uri, self._position, reason)
        if self._body is not None:
            self._body.close()
            self._body = None

    def _read(self, num_bytes: int | None) -> bytes:
        """Read up to so many bytes, or, with None, to the end with the server's checksum."""
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        if self._position >= self._size:
            return b""
        reason = ""
        for _ in range(self._objects.max_attempts):
            if self._body is None:
                self._request()
            try:
                data = cast("bytes", self._body.read(num_bytes))
            except (BotoCoreError, HTTPError, OSError) as error:
                data, reason = b"", str(error)
            if data:
                self._position += len(data)
                return data
            self._drop_body(reason or "the server ended its answer early")
        raise StorageError(f"cannot read {self._uri}: {reason}; {SERVER_ADVICE}")

    @property
    def size(self) -> int:
        """Bytes from the object's start to the end of what is read."""
        return int(self._size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + (0, self._position, self._size)[whence]
        if position < 0:
            raise ValueError(f"expected a position of 0 or more in {self._uri}, got {position}")
        if position != self._position:
            self._drop_body()
            self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        data = self._read(min(len(buffer), max(0, self._size - self._position)))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._read(None)

    def close(self) -> None:
        self._drop_body()
        super().close()


class _ObjectWriter(io.RawIOBase):
    """Collects parts; small content becomes one request, larger content a multipart upload."""

    def __init__(self, objects: S3Objects, uri: str) -> None:
        self._objects, self._uri = objects, uri
        self._address = _address(uri)
        self._buffer = bytearray()
        self._upload_id: str | None = None
        self._parts: list[dict[str, object]] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.closed:
            raise ValueError(f"expected an open writer for {self._uri}, it is closed")
        view = memoryview(data).cast("B")
        self._buffer += view
        while len(self._buffer) >= PART_BYTES:
            self._send_part()
        return view.nbytes

    def _send_part(self) -> None:
        with explain_s3_failures(self._uri, "write"):
            client = self._objects.client()
            if self._upload_id is None:
                self._upload_id = client.create_multipart_upload(**self._address)["UploadId"]
            number = len(self._parts) + 1
            upload = {**self._address, "UploadId": self._upload_id}
            body = bytes(self._buffer[:PART_BYTES])
            answer = client.upload_part(**upload, PartNumber=number, Body=body)
        self._parts.append({"PartNumber": number, "ETag": answer["ETag"]})
        del self._buffer[:PART_BYTES]

    def commit(self) -> None:
        """Make the object appear."""
        if self._upload_id is None:
            self._objects.put(self._uri, bytes(self._buffer), only_if_absent=False)
        else:
            if self._buffer:
                self._send_part()
            with explain_s3_failures(self._uri, "write"):
                self._objects.client().complete_multipart_upload(
                    **self._address,
                    UploadId=self._upload_id,
                    MultipartUpload={"Parts": self._parts},
                )
        self.close()

    def abort(self) -> None:
        """Throw away what was sent; a failure here is logged, for the first one matters more."""
        if self._upload_id is not None:
            try:
                with explain_s3_failures(self._uri, "abort the upload of"):
                    self._objects.client().abort_multipart_upload(
                        **self._address, UploadId=self._upload_id
                    )
            except StorageError as error:
                logger.warning("%s", error)
        self.close()


def _address(uri: str) -> dict[str, str]:
    bucket, key = split_s3_uri(uri)
    if not key:
        raise UnreadableFileError(
            f"expected s3://bucket/key, got {uri!r}; name an object in the bucket"
        )
    return {"Bucket": bucket, "Key": key}


def _new_client(objects: S3Objects) -> Any:
    import boto3
    from botocore.config import Config

    options: dict[str, Any] = {}
    named = {name: os.environ.get(name, "") for name in _ENDPOINT_VARIABLES}
    for name, endpoint in named.items():
        expect_plain_endpoint(endpoint, name)
    if objects.endpoint_url or any(named.values()):
        # Servers other than AWS often have no DNS name per bucket and reject trailing checksums.
        options["s3"] = {"addressing_style": "path"}
        if "AWS_REQUEST_CHECKSUM_CALCULATION" not in os.environ:
            options["request_checksum_calculation"] = "when_required"
    config = Config(
        connect_timeout=objects.connect_timeout_s,
        read_timeout=objects.read_timeout_s,
        retries={"mode": "standard", "total_max_attempts": objects.max_attempts},
        max_pool_connections=32,
        **options,
    )
    # boto3 itself reads AWS_DEFAULT_REGION only.
    session = boto3.session.Session(region_name=os.environ.get("AWS_REGION") or None)
    try:
        return session.client("s3", endpoint_url=objects.endpoint_url, config=config)
    except ValueError as error:
        raise StorageError(
            f"cannot reach S3: {error}; expected endpoint_url like http://host:9000"
        ) from None
