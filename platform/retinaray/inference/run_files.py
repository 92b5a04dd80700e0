"""The files of a batch-inference run: parts and errors first, one merged result at the end.

A part's file is its commitment: it is written whole or not at all, after the part's errors. Merging
reads the parts in their order and streams, so the result does not depend on who wrote them, or
when.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from typing import Any, BinaryIO

from retinaray.errors import MissingFileError, StorageError
from retinaray.inference.output_formats import (
    OutputSettings,
    Rows,
    write_coco_dataset,
    write_coco_results,
    write_json_lines,
    write_odtk,
)
from retinaray.inference.part_codec import (
    SUFFIXES,
    Row,
    decode_rows,
    encode_rows,
    open_compressed,
)
from retinaray.inference.pipeline import ImageResult
from retinaray.inference.read_ahead import chain_ahead
from retinaray.storage import Storage, join_uri

_PART_NAME = re.compile(r"/part-(\d{9})\.(jsonl|jsonl\.gz|jsonl\.zst|parquet)$")
_FOLDERS = ("manifest", "attempts", "parts", "errors", "overlays", "crops")
_MERGED_NAMES = ("detections.json", "detections.jsonl", "images.json")
# The part whose rows are read, and the one after it on its way.
_PARTS_AHEAD = 2
# Footers of Parquet parts that are read at once.
_FOOTER_THREADS = 16


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
        output: Format and compression.
    """

    root: str
    storage: Storage
    output: OutputSettings = field(default_factory=OutputSettings)

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
        """The merged result: detections.json or .jsonl; of Parquet the list of its files."""
        if self.output.format == "parquet":
            return join_uri(self.root, "parts", "_files.jsonl")
        lines = "l" if self.output.format == "jsonl" else ""
        return join_uri(self.root, f"detections.json{lines}{self._merged_suffix}")

    @property
    def images(self) -> str:
        """images.json, beside COCO results; other formats tell of images themselves."""
        return join_uri(self.root, f"images.json{self._merged_suffix}")

    @property
    def success(self) -> str:
        """_SUCCESS, written last."""
        return join_uri(self.root, "_SUCCESS")

    @property
    def overlays(self) -> str:
        """Folder of pictures with their detections."""
        return join_uri(self.root, "overlays")

    @property
    def crops(self) -> str:
        """Folder of cut-out detections."""
        return join_uri(self.root, "crops")

    @property
    def _merged_suffix(self) -> str:
        return SUFFIXES[self.output.merged_compression]

    def part(self, number: int) -> str:
        """File of a part's images."""
        return self._part_names(number)[0]

    def _part_names(self, number: int) -> list[str]:
        """Where a part may be: under the name of our compression, or of an earlier attempt's."""
        if self.output.format == "parquet":
            suffixes = [".parquet"]
        else:
            own = SUFFIXES[self.output.compression]
            suffixes = [f".jsonl{suffix}" for suffix in sorted(SUFFIXES.values(), key=own.__ne__)]
        return [join_uri(self.root, "parts", f"part-{number:09}{suffix}") for suffix in suffixes]

    def errors(self, number: int) -> str:
        """File of a part's errors; absent when there are none."""
        return join_uri(self.root, "errors", f"part-{number:09}.jsonl")

    def commit(
        self,
        number: int,
        results: Iterable[ImageResult],
        *,
        run_id: str | None = None,
        is_first: bool = False,
    ) -> PartReceipt:
        """Write a part: its errors first, then the file that makes it count.

        Args:
            number: Of the part.
            results: Its images, drawn to the end before anything is written.
            run_id: The run that the part belongs to; none = whichever is here.
            is_first: Nobody tried before, so that there are no errors of an earlier attempt.

        Raises:
            StorageError: If it cannot be written, or another run has begun here meanwhile: a
                worker outlives its driver by seconds, or by a minute when its node is cut off.
        """
        images: list[Row] = []
        errors: list[Row] = []
        num_detections = 0
        for result in results:
            if result.error:
                failure = {"reason": result.error, "exception": result.exception}
                errors.append(_describe_source(result) | failure)
                continue
            num_detections += len(result.detections)
            size = {"height": result.height, "width": result.width}
            found = {"detections": result.detections}
            images.append(_describe_source(result) | size | found)
        if run_id is not None and (self.read_record() or {}).get("run_id") != run_id:
            raise StorageError(
                f"{self.root}: part {number} belongs to run {run_id}, which is here no longer; "
                "another command has started over: nothing was written"
            )
        if errors:
            self.storage.write_bytes(self.errors(number), encode_rows(errors))
        elif not is_first:
            # An attempt that died before its commit may have left errors which this one did not
            # meet.
            self.storage.delete(self.errors(number))
        self.storage.write_bytes(self.part(number), self._encode(images))
        return PartReceipt(number, len(images), len(errors), num_detections)

    def _encode(self, rows: list[Row]) -> bytes:
        if self.output.format != "parquet":
            return encode_rows(rows, self.output.compression)
        from retinaray.inference.parquet_parts import encode_parquet, make_schema

        schema = make_schema(
            has_integer_ids=self.output.has_integer_ids, categories=self.output.categories
        )
        return encode_parquet(rows, schema, self.output.compression)

    def list_committed(self) -> set[int]:
        """Numbers of the parts that are complete, however they are compressed."""
        numbers = set()
        is_parquet = self.output.format == "parquet"
        for uri in self.storage.list_files(join_uri(self.root, "parts")):
            matched = _PART_NAME.search(uri)
            if matched and (matched.group(2) == "parquet") == is_parquet:
                numbers.add(int(matched.group(1)))
        return numbers

    def has_results(self) -> bool:
        """Whether there are files here that a run would replace."""
        parts = self.storage.list_files(join_uri(self.root, "parts"))
        return any(map(self.storage.exists, self._merged_files())) or any(
            map(_PART_NAME.search, parts)
        )

    def _merged_files(self) -> Iterator[str]:
        """What any format and compression may have left."""
        for name, suffix in product(_MERGED_NAMES, SUFFIXES.values()):
            yield join_uri(self.root, name + suffix)

    def remove_all(self) -> None:
        """Delete every file of the run, the record first: half a run is not to be taken for one."""
        self.storage.delete(self.record)
        for folder in _FOLDERS:
            for uri in list(self.storage.list_files(join_uri(self.root, folder))):
                self.storage.delete(uri)
        for uri in (*self._merged_files(), self.success):
            self.storage.delete(uri)

    def merge(self, num_parts: int) -> RunTotals:
        """Write the merged result from all parts; see `output_formats`.

        Args:
            num_parts: Parts of the run; all must be committed.

        Raises:
            StorageError: If a part is missing or cannot be read.
        """
        if self.output.format == "parquet":
            num_images, num_detections = self._list_parquet(num_parts)
        else:
            num_images, num_detections = self._write_merged(num_parts)
        num_errors = sum(1 for _ in self.list_errors())
        return RunTotals(num_parts, num_images, num_errors, num_detections)

    def _write_merged(self, num_parts: int) -> tuple[int, int]:
        tally = _Tally()

        def read() -> Iterator[Row]:
            return tally.count(self.read_rows(num_parts))

        with ExitStack() as stack:
            out = self._open_merged(self.detections, stack)
            if self.output.format == "coco-results":
                write_coco_results(out, self._open_merged(self.images, stack), read)
            else:
                self._write_one(out, read)
        return tally.num_images, tally.num_detections

    def _open_merged(self, uri: str, stack: ExitStack) -> BinaryIO:
        out = stack.enter_context(self.storage.open_writer(uri))
        return stack.enter_context(open_compressed(out, self.output.merged_compression))

    def _write_one(self, out: BinaryIO, rows: Rows) -> None:
        if self.output.format == "jsonl":
            write_json_lines(out, rows)
            return
        write = write_odtk if self.output.format == "odtk" else write_coco_dataset
        write(out, rows, categories=self.output.categories, images_root=self.output.images_root)

    def _list_parquet(self, num_parts: int) -> tuple[int, int]:
        """Write the list of the parts, which are the result themselves."""
        from retinaray.inference.parquet_parts import read_counts

        def read(number: int) -> Generator[tuple[str, int, int], None, None]:
            uri = self.part(number)
            with self.storage.open_reader(uri) as reader:
                yield (uri, *read_counts(reader, uri))

        num_images = num_detections = 0
        with self.storage.open_writer(self.detections) as out:
            for uri, images, found in chain_ahead(range(num_parts), read, threads=_FOOTER_THREADS):
                row = {"file": uri.rpartition("/")[2], "num_images": images}
                out.write(encode_rows([row | {"num_detections": found}]))
                num_images, num_detections = num_images + images, num_detections + found
        return num_images, num_detections

    def read_rows(self, num_parts: int) -> Iterator[Row]:
        """What the parts hold, image by image in the order of the run; two parts are in memory.

        Raises:
            StorageError: If a part is missing or cannot be read.
        """
        for content, uri in chain_ahead(range(num_parts), self._read_part, threads=_PARTS_AHEAD):
            if self.output.format == "parquet":
                from retinaray.inference.parquet_parts import decode_parquet

                yield from decode_parquet(content, uri)
            else:
                yield from decode_rows(content, uri)

    def _read_part(self, number: int) -> Generator[tuple[bytes, str], None, None]:
        """The one file of a part."""
        first, *others = self._part_names(number)
        try:
            content, uri = self.storage.read_bytes(first), first
        except MissingFileError:
            found = next(filter(self.storage.exists, others), None)
            if found is None:
                raise
            content, uri = self.storage.read_bytes(found), found
        yield content, uri

    def read_results(self, num_parts: int) -> Iterator[dict[str, Any]]:
        """All detections as COCO results, whatever the format of the run.

        Raises:
            StorageError: If a part is missing or cannot be read.
        """
        for row in self.read_rows(num_parts):
            for found in row["detections"]:
                yield {"image_id": row["image_id"], **found}

    def read_errors(self, limit: int) -> list[dict[str, Any]]:
        """The first errors of the run, in the order of its images."""
        found: list[dict[str, Any]] = []
        errors = self.list_errors()
        while len(found) < limit and (error := next(errors, None)) is not None:
            found.append(error)
        return found

    def list_errors(self) -> Iterator[Row]:
        """All errors of the run, in the order of its images.

        Raises:
            StorageError: If they cannot be read.
        """
        for uri in self.storage.list_files(join_uri(self.root, "errors")):
            yield from decode_rows(self.storage.read_bytes(uri), uri)

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


class _Tally:
    """Counts what passes, the first time."""

    def __init__(self) -> None:
        self.num_images = self.num_detections = 0
        self._is_counted = False

    def count(self, rows: Iterable[Row]) -> Iterator[Row]:
        is_first, self._is_counted = not self._is_counted, True
        for row in rows:
            if is_first:
                self.num_images += 1
                self.num_detections += len(row["detections"])
            yield row


def _describe_source(result: ImageResult) -> Row:
    source = result.source
    row: Row = {"image_id": source.image_id, "uri": source.uri}
    if source.member is not None:
        row["member"] = source.member.name
    if source.columns is not None:
        row["columns"] = dict(source.columns)
    return row
