"""Parts as Parquet files, for runs that are too large for one merged file.

One row per image with its detections as a list; the schema is the same in every file of a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from retinaray.errors import StorageError
from retinaray.inference.part_codec import Compression, Row

FORMAT_VERSION = "retinaray-detections-1"
_VERSION_KEY, _CATEGORIES_KEY, _COUNT_KEY = (
    b"retinaray.format",
    b"retinaray.categories",
    b"retinaray.num_detections",
)


def make_schema(*, has_integer_ids: bool, categories: Sequence[Mapping[str, Any]]) -> pa.Schema:
    """The columns of every part of a run.

    Args:
        has_integer_ids: Image ids are int64, else text.
        categories: `[{"id": ..., "name": ...}, ...]`; whole numbers give int64 ids, else text. They
            are written into each file's metadata as `retinaray.categories`.
    """
    has_integer_categories = all(isinstance(category["id"], int) for category in categories)
    box_sides = [(side, pa.float64()) for side in ("x", "y", "width", "height")]
    detection = pa.struct(
        [
            pa.field("category_id", _id_type(has_integer_categories), nullable=False),
            *(pa.field(name, kind, nullable=False) for name, kind in box_sides),
            pa.field("score", pa.float64(), nullable=False),
        ]
    )
    return pa.schema(
        [
            pa.field("image_id", _id_type(has_integer_ids), nullable=False),
            pa.field("uri", pa.string(), nullable=False),
            # Name in its tar.
            pa.field("member", pa.string()),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            # A manifest's columns as a JSON object: they may differ from row to row.
            pa.field("columns", pa.string()),
            pa.field("detections", pa.list_(pa.field("element", detection, nullable=False)), False),
        ],
        metadata={
            _VERSION_KEY: FORMAT_VERSION,
            _CATEGORIES_KEY: json.dumps([dict(category) for category in categories]),
        },
    )


def _id_type(is_integer: bool) -> pa.DataType:
    return pa.int64() if is_integer else pa.string()


def encode_parquet(rows: Sequence[Row], schema: pa.Schema, compression: Compression) -> bytes:
    """The rows of one part.

    Args:
        rows: As `output_formats` describes them; may be empty.
        schema: Of `make_schema`.
        compression: Of the columns inside the file.
    """
    found = [detection for row in rows for detection in row["detections"]]
    element = schema.field("detections").type.value_type
    boxes = list(zip(*(detection["bbox"] for detection in found), strict=True)) or [()] * 4
    values = [
        [_to_id(detection["category_id"], element.field(0).type) for detection in found],
        *boxes,
        [detection["score"] for detection in found],
    ]
    structs = pa.StructArray.from_arrays(
        [pa.array(column, field.type) for column, field in zip(values, element, strict=True)],
        fields=list(element),
    )
    counts = accumulate((len(row["detections"]) for row in rows), initial=0)
    detections = pa.ListArray.from_arrays(
        pa.array(list(counts), pa.int32()), structs, schema.field("detections").type
    )
    id_type = schema.field("image_id").type
    columns = {
        "image_id": [_to_id(row["image_id"], id_type) for row in rows],
        "uri": [row["uri"] for row in rows],
        "member": [row.get("member") for row in rows],
        "height": [row["height"] for row in rows],
        "width": [row["width"] for row in rows],
        "columns": [json.dumps(row["columns"]) if "columns" in row else None for row in rows],
    }
    arrays = [pa.array(values, schema.field(name).type) for name, values in columns.items()]
    metadata = {**schema.metadata, _COUNT_KEY: str(len(found))}
    table = pa.Table.from_arrays([*arrays, detections], schema=schema.with_metadata(metadata))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression=compression)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _to_id(value: int | str, kind: pa.DataType) -> int | str:
    return value if pa.types.is_integer(kind) else str(value)


def list_extension_columns(schema: pa.Schema) -> list[str]:
    """Columns of types that are not Arrow's own, also inside lists and structs.

    A registered type chooses how its values become Python objects, Ray's by unpickling them; so no
    value of such a column may be looked at. Which types are registered depends on what else the
    process imported: one that is not counts just the same.

    Returns:
        Their names, each with its type's; empty if all are plain.
    """
    found = ((field.name, _find_extension(field)) for field in schema)
    return [f"{name!r} ({kind})" for name, kind in found if kind]


def _find_extension(field: pa.Field) -> str:
    kind = field.type
    if isinstance(kind, pa.BaseExtensionType):
        return str(kind.extension_name)
    unknown = (field.metadata or {}).get(b"ARROW:extension:name")
    if unknown is not None:
        return str(unknown.decode("utf-8", "backslashreplace"))
    if pa.types.is_dictionary(kind):
        return _find_extension(pa.field(field.name, kind.value_type))
    inner = (_find_extension(kind.field(index)) for index in range(kind.num_fields))
    return next(filter(None, inner), "")


def decode_parquet(content: bytes, name: str) -> Iterator[Row]:
    """The rows that `encode_parquet` wrote; ids that it wrote as text stay text.

    Raises:
        StorageError: If they are damaged, or of somebody else.
    """
    _, table = _read(pa.BufferReader(content), name, whole=True)
    for batch in table.to_batches(max_chunksize=1024):
        for values in batch.to_pylist():
            row = {key: value for key, value in values.items() if value is not None}
            if "columns" in row:
                row["columns"] = json.loads(row["columns"])
            row["detections"] = [
                {
                    "category_id": found["category_id"],
                    "bbox": [found["x"], found["y"], found["width"], found["height"]],
                    "score": found["score"],
                }
                for found in values["detections"]
            ]
            yield row


def read_counts(reader: BinaryIO, name: str) -> tuple[int, int]:
    """Images and detections of one file; only the end of it is read.

    Raises:
        StorageError: If it is damaged, or of somebody else.
    """
    counts, _ = _read(reader, name, whole=False)
    return counts


def _read(source: Any, name: str, *, whole: bool) -> tuple[tuple[int, int], Any]:
    try:
        file = pq.ParquetFile(source, pre_buffer=False)
        metadata = file.metadata.metadata or {}
        if metadata.get(_VERSION_KEY) != FORMAT_VERSION.encode():
            raise ValueError(f"it is no {FORMAT_VERSION}")
        if extended := list_extension_columns(file.schema_arrow):
            raise ValueError(f"extension types in {', '.join(extended)}")
        counts = (file.metadata.num_rows, int(metadata[_COUNT_KEY]))
        return counts, file.read() if whole else None
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise StorageError(
            f"{name}: expected a part that this run wrote, found something else ({error}): "
            "delete it and run the same command again"
        ) from error
