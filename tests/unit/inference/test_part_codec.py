"""Rows as bytes and back, plain and compressed, the same bytes each time."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
from typing import Any

import pyarrow as pa
import pytest

from retinaray.errors import StorageError
from retinaray.inference.part_codec import (
    SUFFIXES,
    Compression,
    compression_of,
    decode_rows,
    encode_rows,
    open_compressed,
)

ROWS: list[dict[str, Any]] = [
    {"image_id": n, "uri": f"é{n}\n", "found": [0.5] * n} for n in range(50)
]
PLAIN = encode_rows(ROWS)


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_decode_rows_gives_back_what_was_encoded(compression: Compression) -> None:
    for rows in (ROWS, ROWS[:1], []):
        content = encode_rows(rows, compression)
        assert list(decode_rows(content, f"s3://b/part.jsonl{SUFFIXES[compression]}")) == rows


def test_encode_rows_writes_what_other_programs_read() -> None:
    assert PLAIN.startswith(b'{"image_id": 0, "uri": "\\u00e90\\n", "found": []}\n{"image_id": 1, ')
    packed = encode_rows(ROWS, "gzip")
    assert gzip.decompress(packed) == PLAIN
    # Bytes 4 to 7 of a gzip header are the time.
    assert packed[4:8] == bytes(4)
    zstd = encode_rows(ROWS, "zstd")
    codec = pa.Codec("zstd")
    assert codec.decompress(zstd, decompressed_size=len(PLAIN)).to_pybytes() == PLAIN
    assert len(packed) < len(PLAIN) / 4
    assert len(zstd) < len(PLAIN) / 4


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_encode_rows_gives_the_same_bytes_in_another_process(compression: Compression) -> None:
    program = (
        "import sys; from retinaray.inference.part_codec import encode_rows\n"
        "rows = [{'image_id': n, 'uri': f'\\u00e9{n}\\n', 'found': [0.5] * n} for n in range(50)]\n"
        "sys.stdout.buffer.write(encode_rows(rows, sys.argv[1]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, compression], capture_output=True, check=True
    )
    assert answer.stdout == encode_rows(ROWS, compression)


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_open_compressed_gives_the_same_bytes_however_they_come_and_leaves_its_writer_open(
    compression: Compression,
) -> None:
    out = io.BytesIO()
    with open_compressed(out, compression) as writer:
        for start in range(0, len(PLAIN), 1000):
            writer.write(PLAIN[start : start + 1000])
    name = f"x.jsonl{SUFFIXES[compression]}"
    assert list(decode_rows(out.getvalue(), name)) == ROWS
    out.write(b"still open")


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
@pytest.mark.parametrize("damage", ["cut", "changed", "foreign"])
def test_decode_rows_refuses_a_damaged_file(compression: Compression, damage: str) -> None:
    content = bytearray(encode_rows(ROWS, compression))
    if damage == "cut":
        del content[-20:]
    elif damage == "changed":
        content[len(content) // 2] ^= 0xFF
    else:
        content[:] = PLAIN
    name = f"/run/part-000000001.jsonl{SUFFIXES[compression]}"
    with pytest.raises(StorageError, match=r"part-000000001\.jsonl\..*delete it and run"):
        list(decode_rows(bytes(content), name))


def test_decode_rows_refuses_lines_that_are_no_json() -> None:
    with pytest.raises(
        StorageError, match=r"x\.jsonl: expected the JSON lines that this run wrote"
    ):
        list(decode_rows(PLAIN[:-5], "x.jsonl"))


def test_compression_of_goes_by_the_end_of_the_name() -> None:
    names = ["a.jsonl", "a.jsonl.gz", "s3://b/A.JSON.ZST", "a.gz.json", "gz"]
    assert [compression_of(name) for name in names] == ["none", "gzip", "zstd", "none", "none"]
