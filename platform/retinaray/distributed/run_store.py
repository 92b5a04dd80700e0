"""Where a training keeps its checkpoints: beside its run folder, or below a prefix of S3."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from retinaray.errors import ConfigError, MissingFileError
from retinaray.storage import Storage, is_s3, join_uri

logger = logging.getLogger(__name__)

RAY_RUN_NAME = "ray_train"
_RECORD_FILE = "run.json"
_KEPT_FOLDER = "kept"
# With growing pauses this is about two minutes: a store that is away for longer is a failure.
_ATTEMPTS = 8


@dataclass(frozen=True)
class RunStore:
    """A place for the checkpoints of one run.

    Attributes:
        root: Folder or `s3://bucket/prefix`, of this run alone.
        endpoint_url: S3 server; None leaves it to AWS_ENDPOINT_URL, else AWS itself.
    """

    root: str
    endpoint_url: str | None = None

    @property
    def files(self) -> Storage:
        """What reads and writes its files; asks a server that refuses more often than others do."""
        return Storage(endpoint_url=self.endpoint_url, max_attempts=_ATTEMPTS)

    @property
    def checkpoints(self) -> str:
        """Folder with one folder for each checkpoint."""
        return join_uri(self.root, RAY_RUN_NAME)

    @property
    def kept(self) -> str:
        """Folder of weights that are kept for good."""
        return join_uri(self.root, _KEPT_FOLDER)

    def locate_for_ray(self) -> tuple[str, Any]:
        """Path and file system as `ray.train.RunConfig` takes them; None = Ray finds it by itself.

        The server's address is handed on, because nodes need not have it in their environment;
        credentials are not.
        """
        if not is_s3(self.root):
            return self.root, None
        endpoint = (
            self.endpoint_url
            or os.environ.get("AWS_ENDPOINT_URL_S3")
            or os.environ.get("AWS_ENDPOINT_URL")
        )
        if not endpoint:
            return self.root, None
        import pyarrow.fs

        parts = urlsplit(endpoint)
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        files = pyarrow.fs.S3FileSystem(
            endpoint_override=parts.netloc, scheme=parts.scheme, region=region or "us-east-1"
        )
        return self.root.removeprefix("s3://"), files

    def read_record(self) -> dict[str, Any] | None:
        """The record of the run whose checkpoints are there; None = no run.

        Raises:
            ConfigError: If something else is called like a record.
            StorageError: If it cannot be read.
        """
        uri = join_uri(self.root, _RECORD_FILE)
        try:
            content = self.files.read_bytes(uri)
        except MissingFileError:
            return None
        try:
            record: dict[str, Any] = json.loads(content)
            record["run_id"], record["job"], record["annotations_sha256"]
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{uri} is no training's record: give --checkpoints a place of its own, or "
                "--override to replace it"
            ) from error
        return record

    def write_record(self, record: dict[str, Any]) -> None:
        """Keep the record beside the checkpoints: they are of no use without it.

        Raises:
            StorageError: If it cannot be written.
        """
        uri = join_uri(self.root, _RECORD_FILE)
        self.files.write_bytes(uri, json.dumps(record, indent=1).encode())

    def clear(self) -> None:
        """Remove the run that is there, the record first; other files stay.

        Raises:
            StorageError: If something cannot be removed.
        """
        files = self.files
        files.delete(join_uri(self.root, _RECORD_FILE))
        for folder in (self.checkpoints, self.kept):
            for uri in list(files.list_files(folder)):
                files.delete(uri)

    def set_damaged_snapshot_aside(self) -> None:
        """Move Ray's list of checkpoints away if a killed process left half of it.

        Ray would refuse to start. The checkpoints themselves tell what they are; see `resuming`.

        Raises:
            StorageError: If it cannot be read or moved.
        """
        uri = join_uri(self.checkpoints, "checkpoint_manager_snapshot.json")
        files = self.files
        try:
            content = files.read_bytes(uri)
        except MissingFileError:
            return
        try:
            names = [
                entry["checkpoint_dir_name"] for entry in json.loads(content)["checkpoint_results"]
            ]
        except (ValueError, TypeError, KeyError):
            names = None
        if names is not None and all(self._is_there(name) for name in names):
            return
        logger.warning("%s is damaged or names missing checkpoints: it is set aside", uri)
        files.write_bytes(f"{uri}.damaged", content)
        files.delete(uri)

    def _is_there(self, name: str) -> bool:
        folder = join_uri(self.checkpoints, name)
        if is_s3(folder):
            return next(iter(self.files.list_files(folder)), None) is not None
        return Path(folder).is_dir()
