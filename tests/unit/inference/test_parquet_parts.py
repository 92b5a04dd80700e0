"""Parts as Parquet: the schema, what comes back, what other readers see."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retinaray.errors import StorageError
from retinaray.inference.parquet_parts import (
    decode_parquet,
    encode_parquet,
    make_schema,
    read_counts,
)
from retinaray.inference.part_codec import Compression

CATEGORIES = [{"id": 7, "name": "car"}, {"id": 17, "name": "bus"}]
SCHEMA = make_schema(has_integer_ids=True, categories=CATEGORIES)
ROWS: list[dict[str, Any]] = [
    {"image_id": 3, "uri": "s3://b/é\n.jpg", "height": 2, "width": 3, "detections": []},
    {
        "image_id": 2**62,
        "uri": "x.tar/a.jpg",
        "member": "./a.jpg",
        "height": 20,
        "width": 30,
        "columns": {"n": None, "t": "é"},
        "detections": [
            {"category_id": 17, "bbox": [1.5, 2.0, 10.25, 4.01], "score": 0.75},
            {"category_id": 7, "bbox": [0.0, 0.0, 30.0, 20.0], "score": 0.123457},
        ],
    },
]


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_decode_parquet_gives_back_what_was_encoded(compression: Compression) -> None:
    for rows in (ROWS, ROWS[:1], ROWS * 700, []):
        content = encode_parquet(rows, SCHEMA, compression)
        assert list(decode_parquet(content, "x")) == rows
        assert encode_parquet(rows, SCHEMA, compression) == content
        found = sum(len(row["detections"]) for row in rows)
        assert read_counts(io.BytesIO(content), "x") == (len(rows), found)


def test_encode_parquet_writes_columns_that_any_reader_unfolds() -> None:
    table = pq.read_table(pa.BufferReader(encode_parquet(ROWS, SCHEMA, "zstd")))
    assert table.schema.names == [
        *("image_id", "uri", "member", "height", "width", "columns", "detections")
    ]
    assert table["columns"].to_pylist() == [None, '{"n": null, "t": "\\u00e9"}']
    flat = table["detections"].combine_chunks().flatten()
    assert flat.field("category_id").to_pylist() == [17, 7]
    assert flat.field("height").to_pylist() == [4.01, 20.0]
    assert json.loads(table.schema.metadata[b"retinaray.categories"]) == CATEGORIES


def test_schema_is_the_same_for_every_part_of_a_run() -> None:
    schemas = [
        pq.read_schema(pa.BufferReader(encode_parquet(rows, SCHEMA, "none")))
        for rows in ([], ROWS[:1], ROWS)
    ]
    assert schemas[0].equals(schemas[1])
    assert schemas[0].equals(schemas[2])
    assert schemas[0].equals(SCHEMA)


def test_ids_become_text_when_not_all_are_integers() -> None:
    categories = [{"id": "car", "name": "car"}, {"id": 17, "name": "bus"}]
    schema = make_schema(has_integer_ids=False, categories=categories)
    rows = list(decode_parquet(encode_parquet(ROWS, schema, "none"), "x"))
    assert [row["image_id"] for row in rows] == ["3", str(2**62)]
    assert [found["category_id"] for found in rows[1]["detections"]] == ["17", "7"]


@pytest.mark.parametrize("damage", ["cut", "foreign", "text"])
def test_damaged_and_foreign_files_are_refused(damage: str) -> None:
    content = encode_parquet(ROWS, SCHEMA, "none")
    if damage == "cut":
        content = content[:-10]
    elif damage == "text":
        content = b"nonsense"
    else:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"uri": ["a"]}), sink)
        content = bytes(sink.getvalue())
    with pytest.raises(StorageError, match="part-3: expected a part that this run wrote"):
        list(decode_parquet(content, "part-3"))
    with pytest.raises(StorageError, match="part-3: expected a part that this run wrote"):
        read_counts(io.BytesIO(content), "part-3")
