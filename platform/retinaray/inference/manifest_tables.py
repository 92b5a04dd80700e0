"""Lists of images: text with one URI per line, and tables (CSV, JSON lines, Parquet) with `uri`.

A table's column `uri` is needed and `image_id` is understood; what else stands there goes along
with its image into the results. Rows are read one after another, never the whole file.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NoReturn

from retinaray.errors import DatasetError
from retinaray.inference.pipeline import Scalar
from retinaray.inference.repeat_check import RepeatCheck
from retinaray.inference.source_filters import FoundImage
from retinaray.inference.source_listing import is_shard, name_below
from retinaray.storage import Storage, find_secret, hide_secret, is_s3, join_uri

_URI, _IMAGE_ID = "uri", "image_id"
_LONGEST_LINE = 2**20
_ROWS_PER_BATCH = 1024
_READ_BYTES = 2**20
_UNUSABLE = re.compile("[\0\ud800-\udfff]")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")

# Where a row stands, for messages, and its values by column.
_Row = tuple[str, Mapping[str, Any]]


def is_table(uri: str) -> bool:
    """Whether a file's name is that of a list of images."""
    return _suffix(uri) in _READERS


def list_table(uri: str, storage: Storage) -> Iterator[FoundImage]:
    """The images, or tars of images, of a list in its order.

    Args:
        uri: .txt or .lst, .csv, .jsonl or .ndjson, .parquet. Relative URIs in it are relative to
            its folder. A name with a line end, or with blanks at its ends, needs a table.
        storage: Where it is.

    Raises:
        DatasetError: If it is malformed, lacks the column `uri`, has values that JSON cannot hold,
            gives an image id twice, or names images by URLs or with secrets in their URIs.
        StorageError: If it cannot be read.
    """
    root = folder_of(uri)
    repeats = RepeatCheck()
    has_ids: bool | None = None
    with storage.open_reader(uri) as reader:
        for where, values in _READERS[_suffix(uri)](reader, uri):
            found = _make_found(root, values, where)
            if has_ids is None:
                has_ids = found.image_id is not None
            if has_ids != (found.image_id is not None):
                raise DatasetError(f"{where}: expected {_IMAGE_ID} in every row, or in none")
            if has_ids:
                repeats.add(json.dumps(found.image_id).encode())
            yield found
    pair = repeats.find()
    if pair is not None:
        raise DatasetError(
            f"{uri}: rows {pair[0] + 1} and {pair[1] + 1} have the same {_IMAGE_ID}; "
            "give each image its own, or drop the column"
        )


def folder_of(uri: str) -> str:
    """The folder that a file lies in, "." for a bare name."""
    folder, slash, _ = uri.rpartition("/")
    return folder or slash or "."


def _suffix(uri: str) -> str:
    _, dot, ending = uri.rpartition("/")[2].rpartition(".")
    return (dot + ending).lower()


def _make_found(root: str, values: Mapping[str, Any], where: str) -> FoundImage:
    entry = values.get(_URI)
    if not isinstance(entry, str) or not entry:
        _refuse_uri(values, where)
    if _UNUSABLE.search(entry):
        raise DatasetError(f"{where}: uri {entry!r} holds NUL or is no valid Unicode; correct it")
    _check_scheme(entry, where)
    is_absolute = is_s3(entry) or entry.startswith(("/", "file://"))
    uri = entry if is_absolute else join_uri(root, entry)
    image_id = values.get(_IMAGE_ID)
    if _IMAGE_ID in values:
        _check_id(image_id, where)
    if is_shard(uri) and image_id is not None:
        raise DatasetError(
            f"{where}: {_IMAGE_ID} {image_id!r} for {entry}, which is a tar of many images; "
            "drop the column"
        )
    columns = {key: _check_scalar(values[key], key, where) for key in values if key not in _OWN}
    return FoundImage(
        name_below(root, uri), uri, image_id=image_id, columns=columns if columns else None
    )


_OWN = frozenset([_URI, _IMAGE_ID])


def _check_scheme(entry: str, where: str) -> None:
    """Refuse what the results must not repeat, and URLs, which would be taken for local names."""
    secret = find_secret(entry)
    if secret:
        raise DatasetError(
            f"{where}: uri {hide_secret(entry)!r} holds {secret}, which the results would repeat; "
            "write s3://bucket/key, and give credentials in the environment"
        )
    if _URL.match(entry) and not entry.startswith(("s3://", "file://")):
        raise DatasetError(
            f"{where}: uri {entry!r} is no path, file:/// or s3:// URI; copy the images to one of "
            "these"
        )


def _refuse_uri(values: Mapping[str, Any], where: str) -> NoReturn:
    if _URI in values:
        raise DatasetError(f"{where}: expected a path or URI in {_URI!r}, found {values[_URI]!r}")
    _refuse_columns(values, where)


def _refuse_columns(names: Any, where: str) -> NoReturn:
    listed = ", ".join(map(repr, names)) or "none"
    raise DatasetError(
        f"{where}: expected a column {_URI!r} with the path or URI of each image, found the "
        f"columns {listed}; rename the one that holds it"
    )


def _check_id(value: object, where: str) -> None:
    is_text = isinstance(value, str) and value != "" and not _UNUSABLE.search(value)
    if type(value) is not int and not is_text:
        raise DatasetError(
            f"{where}: expected a whole number or text in {_IMAGE_ID!r}, found {value!r}"
        )


def _check_scalar(value: object, key: str, where: str) -> Scalar:
    """A value that JSON can hold without brackets.

    Raises:
        DatasetError: If it is anything else.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise DatasetError(
            f"{where}: column {key!r} holds {value}, which JSON lacks; write null, or drop it"
        )
    if isinstance(value, str) and _UNUSABLE.search(value):
        raise DatasetError(f"{where}: column {key!r} holds NUL or no valid Unicode: {value!r}")
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise DatasetError(
        f"{where}: column {key!r} holds {type(value).__name__} {str(value)[:60]!r}; expected text, "
        "a number, true, false or null: convert or drop the column"
    )


def _read_lines(reader: BinaryIO, uri: str) -> Iterator[tuple[str, str]]:
    """Lines with their ends and their places; a file is never held whole for want of line ends."""
    number = 0
    while line := reader.readline(_LONGEST_LINE):
        number += 1
        where = f"{uri}, line {number}"
        if len(line) == _LONGEST_LINE:
            raise DatasetError(f"{where}: expected lines below {_LONGEST_LINE} bytes")
        try:
            yield where, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DatasetError(f"{where}: expected UTF-8 text: {error}") from error


def _read_text(reader: BinaryIO, uri: str) -> Iterator[_Row]:
    """One URI per line; blanks around it and empty lines do not count, `#` is part of a name."""
    for where, line in _read_lines(reader, uri):
        if entry := line.strip():
            yield where, {_URI: entry}


def _read_json_lines(reader: BinaryIO, uri: str) -> Iterator[_Row]:
    for where, line in _read_lines(reader, uri):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DatasetError(f"{where}: expected a JSON object: {error}") from error
        if not isinstance(values, dict):
            raise DatasetError(f"{where}: expected a JSON object, found {type(values).__name__}")
        yield where, values


def _read_csv(reader: BinaryIO, uri: str) -> Iterator[_Row]:
    """Comma-separated, the first row names the columns; quoted fields may hold line ends."""
    rows = csv.reader((line for _, line in _read_lines(reader, uri)), strict=True)
    header: list[str] | None = None
    try:
        for values in rows:
            where = f"{uri}, line {rows.line_num}"
            if not values:
                continue
            if header is None:
                header = values
                _check_header(header, where)
                continue
            if len(values) != len(header):
                raise DatasetError(
                    f"{where}: expected {len(header)} fields as in the first row, "
                    f"found {len(values)}; quote fields that hold commas"
                )
            row: dict[str, Any] = dict(zip(header, values, strict=True))
            # Numbers in a CSV have no other way to say that they are.
            if _WHOLE_NUMBER.fullmatch(row.get(_IMAGE_ID, "")):
                row[_IMAGE_ID] = int(row[_IMAGE_ID])
            yield where, row
    except csv.Error as error:
        raise DatasetError(f"{uri}, line {rows.line_num}: expected CSV: {error}") from error


def _read_parquet(reader: BinaryIO, uri: str) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from retinaray.inference.parquet_parts import list_extension_columns

    try:
        # With a buffer, columns of a large row group are streamed too.
        file = pq.ParquetFile(reader, buffer_size=_READ_BYTES, pre_buffer=False)
        _check_header(file.schema_arrow.names, uri)
        extended = list_extension_columns(file.schema_arrow)
        if extended:
            raise DatasetError(
                f"{uri}: expected plain columns, found extension types in {', '.join(extended)}, "
                "which may run code when they are read; convert or drop the columns"
            )
        number = 0
        for batch in file.iter_batches(_ROWS_PER_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield f"{uri}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{uri}: expected a Parquet file: {error}") from error


def _check_header(names: list[str], where: str) -> None:
    if _URI not in names:
        _refuse_columns(names, where)
    if len(set(names)) < len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise DatasetError(f"{where}: expected one column of each name, found more of {repeated}")


_READERS: dict[str, Callable[[BinaryIO, str], Iterator[_Row]]] = {
    ".txt": _read_text,
    ".lst": _read_text,
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
}
