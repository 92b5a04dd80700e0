"""The files of a batch-inference run: parts and errors first, one merged result at the end.

A part's file is its commitment: it is written whole or not at all, after the part's errors. Merging
reads the parts in their order and streams, so the result does not depend on who wrote them, or
when.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from retinaray.errors import MissingFileError, StorageError
from retinaray.inference.pipeline import ImageResult
from retinaray.storage import Storage, join_uri

_PART_NAME = re.compile(r"/part-(\d{9})\.jsonl$")


@dataclass(frozen=True)
class PartReceipt:
    """What a committed part holds; images and errors together are its inputs."""

    part: int
    num_images: int
    num_errors: int
    num_detections: int


@dataclass(frozen=True)
class RunTotals:
    """What a merged run holds."""

    num_parts: int
    num_images: int
    num_errors: int
    num_detections: int


@dataclass(frozen=True)
class RunFiles:
    """The layout under one output URI.

    Attributes:
        root: Folder or S3 prefix of the run.
        storage: Where it is.
    """

    root: str
    storage: Storage

    @property
    def manifest(self) -> str:
        """Folder of the cut manifest."""
        return join_uri(self.root, "manifest")

    @property
    def record(self) -> str:
        """run.json."""
        return join_uri(self.root, "run.json")

    @property
    def detections(self) -> str:
        """detections.json."""
        return join_uri(self.root, "detections.json")

    @property
    def images(self) -> str:
        """images.json."""
        return join_uri(self.root, "images.json")

    @property
    def success(self) -> str:
        """_SUCCESS, written last."""
        return join_uri(self.root, "_SUCCESS")

    def part(self, number: int) -> str:
        """File of a part's images."""
        return join_uri(self.root, "parts", f"part-{number:09}.jsonl")

    def errors(self, number: int) -> str:
        """File of a part's errors; absent when there are none."""
        return join_uri(self.root, "errors", f"part-{number:09}.jsonl")

    def commit(self, number: int, results: Iterable[ImageResult]) -> PartReceipt:
        """Write a part: its errors first, then the file that makes it count."""
        images: list[str] = []
        errors: list[str] = []
        num_detections = 0
        for result in results:
            source = {"image_id": result.source.image_id, "uri": result.source.uri}
            if result.error:
                failure = {"reason": result.error, "exception": result.exception}
                errors.append(json.dumps(source | failure))
                continue
            num_detections += len(result.detections)
            size = {"height": result.height, "width": result.width}
            images.append(json.dumps(source | size | {"detections": result.detections}))
        if errors:
            self.storage.write_bytes(self.errors(number), _join_lines(errors))
        else:
            # An attempt that died before its commit may have left errors which this one did not
            # meet.
            self.storage.delete(self.errors(number))
        self.storage.write_bytes(self.part(number), _join_lines(images))
        return PartReceipt(number, len(images), len(errors), num_detections)

    def list_committed(self) -> set[int]:
        """Numbers of the parts that are complete."""
        numbers = set()
        for uri in self.storage.list_files(join_uri(self.root, "parts")):
            matched = _PART_NAME.search(uri)
            if matched:
                numbers.add(int(matched.group(1)))
        return numbers

    def has_results(self) -> bool:
        """Whether there are files here that a run would replace."""
        named = (self.detections, self.images)
        return any(map(self.storage.exists, named)) or bool(self.list_committed())

    def remove_all(self) -> None:
        """Delete every file of the run, the record first: half a run is not to be taken for one."""
        self.storage.delete(self.record)
        for folder in ("manifest", "attempts", "parts", "errors"):
            for uri in list(self.storage.list_files(join_uri(self.root, folder))):
                self.storage.delete(uri)
        for uri in (self.detections, self.images, self.success):
            self.storage.delete(uri)

    def merge(self, num_parts: int) -> RunTotals:
        """Write detections.json and images.json from all parts.

        Args:
            num_parts: Parts of the run; all must be committed.

        Raises:
            StorageError: If a part is missing or cannot be read.
        """
        num_images = num_errors = num_detections = 0
        with (
            self.storage.open_writer(self.detections) as detections,
            self.storage.open_writer(self.images) as images,
        ):
            detections.write(b"[")
            images.write(b"[")
            for number in range(num_parts):
                for row in _read_lines(self.storage.read_bytes(self.part(number))):
                    found = row.pop("detections")
                    images.write((",\n" if num_images else "\n").encode())
                    images.write(json.dumps(row).encode())
                    num_images += 1
                    for detection in found:
                        line = json.dumps({"image_id": row["image_id"], **detection})
                        detections.write((",\n" if num_detections else "\n").encode())
                        detections.write(line.encode())
                        num_detections += 1
            detections.write(b"\n]\n")
            images.write(b"\n]\n")
        for uri in self.storage.list_files(join_uri(self.root, "errors")):
            num_errors += sum(1 for _ in _read_lines(self.storage.read_bytes(uri)))
        return RunTotals(num_parts, num_images, num_errors, num_detections)

    def read_errors(self, limit: int) -> list[dict[str, Any]]:
        """The first errors of the run, in the order of its images."""
        found: list[dict[str, Any]] = []
        for uri in self.storage.list_files(join_uri(self.root, "errors")):
            found.extend(_read_lines(self.storage.read_bytes(uri)))
            if len(found) >= limit:
                break
        return found[:limit]

    def read_record(self) -> dict[str, Any] | None:
        """The run's record, or none when there is no run here.

        Raises:
            StorageError: If it cannot be read, or is not one of ours.
        """
        try:
            record = json.loads(self.storage.read_bytes(self.record))
        except MissingFileError:
            return None
        except ValueError as error:
            raise StorageError(f"{self.record}: expected a run's record: {error}") from error
        if not isinstance(record, dict):
            raise StorageError(
                f"{self.record}: expected a run's record, found {type(record).__name__}; "
                "choose another output"
            )
        return record

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write run.json."""
        self.storage.write_bytes(self.record, json.dumps(record, indent=1).encode())


def _join_lines(lines: Iterable[str]) -> bytes:
    return "".join(line + "\n" for line in lines).encode()


def _read_lines(content: bytes) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in content.splitlines())
