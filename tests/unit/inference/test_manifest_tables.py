"""Lists of images as text and tables: what is read, what goes along, what is refused."""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retinaray.errors import DatasetError
from retinaray.inference.manifest_tables import folder_of, is_table, list_table
from retinaray.inference.source_filters import FoundImage
from retinaray.storage import Storage

Rows = list[dict[str, Any]]
Write = Callable[[str, bytes], str]
# `.txt` cannot hold the last three.
ODD_NAMES = [
    "a b#1?=50%25.jpg",
    "Zürich/日本 😀.png",
    "line\nend.jpg",
    " blanks .jpg",
    'a"b,c;d.jpg',
]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a list into a folder; gives its path."""

    def write(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write


def dump(kind: str, rows: Rows) -> bytes:
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def read(uri: str) -> list[FoundImage]:
    return list(list_table(uri, Storage()))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_list_table_reads_uris_and_columns_of_every_kind(write: Write, kind: str) -> None:
    rows = [{"uri": name, "camera": f"cam {n}", "note": None} for n, name in enumerate(ODD_NAMES)]
    if kind == "csv":
        rows = [{**row, "note": ""} for row in rows]
    uri = write(f"all.{kind}", dump(kind, rows))
    folder = uri.rpartition("/")[0]
    found = read(uri)
    assert [image.uri for image in found] == [f"{folder}/{name}" for name in ODD_NAMES]
    assert [image.name for image in found] == ODD_NAMES
    assert [image.image_id for image in found] == [None] * 5
    note = "" if kind == "csv" else None
    assert [image.columns for image in found] == [
        {"camera": f"cam {n}", "note": note} for n in range(5)
    ]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_list_table_keeps_absolute_uris_and_has_no_columns_without_any(
    write: Write, kind: str
) -> None:
    uris = ["s3://other/a b.jpg", "/abs/b.jpg", "file:///c%20d.jpg", "z.jpg"]
    uri = write(f"all.{kind}", dump(kind, [{"uri": value} for value in uris]))
    folder = uri.rpartition("/")[0]
    assert read(uri) == [
        *(FoundImage(value, value) for value in uris[:3]),
        FoundImage("z.jpg", f"{folder}/z.jpg"),
    ]


def test_list_table_keeps_types_of_json_and_parquet(write: Write) -> None:
    values = {"t": "x", "i": 2**60, "f": 0.5, "yes": True, "n": None}
    for kind in ("jsonl", "parquet"):
        (image,) = read(write(f"all.{kind}", dump(kind, [{"uri": "a.jpg", **values}])))
        assert image.columns == values
        assert [type(value) for value in image.columns.values()] == [
            *(str, int, float, bool, type(None))
        ]


def test_list_table_reads_ids(write: Write) -> None:
    rows: Rows = [{"image_id": value, "uri": "a"} for value in (7, "7", "x y", -3, 2**80)]
    assert [image.image_id for image in read(write("a.jsonl", dump("jsonl", rows)))] == [
        *(7, "7", "x y", -3, 2**80)
    ]
    for ids in ([3, 1], ["c", "a"]):
        content = dump("parquet", [{"uri": "a", "image_id": value} for value in ids])
        assert [image.image_id for image in read(write("a.parquet", content))] == ids
    # In a CSV only what could not be written otherwise is a number.
    texts = ["12", "007", "-4", "1e3", "0", "+1", "9" * 18, "9" * 19, "٣"]
    content = dump("csv", [{"uri": "a", "image_id": value} for value in texts])
    assert [image.image_id for image in read(write("a.csv", content))] == [
        *(12, "007", -4, "1e3", 0, "+1", int("9" * 18), "9" * 19, "٣")
    ]


def test_list_table_reads_csv_as_spreadsheets_write_it(write: Write) -> None:
    text = '\ufeffnote,uri\r\n"says ""hi"", twice",a.jpg\r\n\r\n"two\r\nlines","b,c.jpg"\r\n'
    found = read(write("a.csv", text.encode()))
    assert [(image.name, image.columns) for image in found] == [
        ("a.jpg", {"note": 'says "hi", twice'}),
        ("b,c.jpg", {"note": "two\r\nlines"}),
    ]


def test_list_table_reads_lines_of_json_with_blanks_between(write: Write) -> None:
    text = '\ufeff{"uri": "a"}\r\n\n  \n{"uri": "b", "x": 1}'
    assert [(i.name, i.columns) for i in read(write("a.ndjson", text.encode()))] == [
        ("a", None),
        ("b", {"x": 1}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.csv", b"file_name,x\na,1\n", r"a\.csv, line 1: .*'uri'.*columns 'file_name', 'x'; ren"),
        ("a.jsonl", b'{"path": "a"}\n', r"line 1: .*columns 'path'; rename"),
        ("a.jsonl", b'{"uri": "a"}\n{}\n', r"line 2: .*found the columns none"),
        ("a.jsonl", b'{"uri": 5}\n', r"line 1: expected a path or URI in 'uri', found 5"),
        ("a.jsonl", b'{"uri": ""}\n', r"expected a path or URI in 'uri', found ''"),
        ("a.jsonl", b'{"uri": null}\n', r"found None"),
        ("a.jsonl", b'{"uri": "a\\u0000b"}\n', r"line 1: uri 'a\\x00b' holds NUL"),
        ("a.jsonl", b'{"uri": "a\\ud800"}\n', r"is no valid Unicode"),
        ("a.jsonl", b'{"uri": "a", "x": "\\udcff"}\n', r"column 'x' holds NUL or no valid Unicode"),
        ("a.jsonl", b'["a"]\n', r"line 1: expected a JSON object, found list"),
        ("a.jsonl", b'{"uri": "a"}\n{"uri": \n', r"line 2: expected a JSON object: "),
        ("a.jsonl", b'{"uri": "a", "x": [1]}\n', r"column 'x' holds list '\[1\]'; expected text"),
        ("a.jsonl", b'{"uri": "a", "x": {}}\n', r"column 'x' holds dict"),
        ("a.jsonl", b'{"uri": "a", "x": NaN}\n', r"column 'x' holds nan, which JSON lacks"),
        ("a.jsonl", b'{"uri": "a", "x": 1e999}\n', r"column 'x' holds inf"),
        ("a.jsonl", b'{"uri": "a", "image_id": 1.5}\n', r"in 'image_id', found 1\.5"),
        ("a.jsonl", b'{"uri": "a", "image_id": true}\n', r"in 'image_id', found True"),
        ("a.jsonl", b'{"uri": "a", "image_id": null}\n', r"in 'image_id', found None"),
        (
            "a.jsonl",
            b'{"uri": "a", "image_id": 1}\n{"uri": "b"}\n',
            r"line 2: expected image_id in",
        ),
        ("a.jsonl", b'{"uri": "a"}\n{"uri": "b", "image_id": 1}\n', r"line 2: .*or in none"),
        ("a.jsonl", b'{"uri": "a.tar", "image_id": 1}\n', r"image_id 1 for a\.tar, which is a tar"),
        ("a.jsonl", b'{"uri": "a.tar.gz"}\n', r"members of a compressed tar cannot be read"),
        ("a.csv", b"uri,image_id\na,\n", r"in 'image_id', found ''"),
        ("a.csv", b"uri,x\na\n", r"a\.csv, line 2: expected 2 fields .* found 1"),
        ("a.csv", b"uri,x\na,b,c\n", r"line 2: expected 2 fields .* found 3; quote"),
        ("a.csv", b"uri,x,x\na,b,c\n", r"one column of each name, found more of \['x'\]"),
        ("a.csv", b'uri\n"a\n' + b"b\n" * 70_000, r"expected CSV: field larger than"),
        ("a.csv", b'uri\n"a"b\n', r"a\.csv, line 2: expected CSV"),
        ("a.csv", b'uri\n"a\n', r"expected CSV: unexpected end of data"),
        ("a.csv", b"uri\nZ\xfcrich\n", r"a\.csv, line 2: expected UTF-8 text"),
        ("a.txt", b"x" * 2**20, r"a\.txt, line 1: expected lines below 1048576 bytes"),
        ("a.txt", b"a\0b\n", r"a\.txt, line 1: uri 'a\\x00b' holds NUL"),
        ("a.parquet", b"PAR1 nonsense PAR1", r"a\.parquet: expected a Parquet file"),
        ("a.parquet", b"", r"a\.parquet: expected a Parquet file"),
    ],
)
def test_list_table_refuses_what_it_cannot_use(
    write: Write, name: str, content: bytes, text: str
) -> None:
    with pytest.raises(DatasetError, match=text):
        read(write(name, content))


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (pa.array([datetime.datetime(2026, 1, 1)]), r"row 1: column 'x' holds datetime"),
        (pa.array([b"x"]), r"column 'x' holds bytes"),
        (pa.array([[1, 2]]), r"column 'x' holds list"),
        (pa.array([float("nan")]), r"column 'x' holds nan"),
    ],
)
def test_list_table_refuses_values_of_parquet_that_json_lacks(
    write: Write, column: pa.Array, text: str
) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"uri": pa.array(["a"]), "x": column}), sink)
    with pytest.raises(DatasetError, match=text):
        read(write("a.parquet", bytes(sink.getvalue())))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_list_table_refuses_an_id_that_occurs_twice(write: Write, kind: str) -> None:
    rows: Rows = [{"uri": "a", "image_id": value} for value in (5, 6, 5)]
    with pytest.raises(DatasetError, match=f"a.{kind}: rows 1 and 3 have the same image_id"):
        read(write(f"a.{kind}", dump(kind, rows)))


class _EndlessFile(io.RawIOBase):
    """A header, and then the same line again and again."""

    def __init__(self, header: bytes, line: bytes) -> None:
        self._content, self._line = header, line

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = (self._content + self._line * (len(buffer) // len(self._line) + 1))[: len(buffer)]
        rest = (len(block) - len(self._content)) % len(self._line)
        self._content = self._line[rest:] if rest else b""
        buffer[:] = block
        return len(block)


@pytest.mark.parametrize(
    ("name", "header", "line"),
    [
        ("a.txt", b"", b"x.jpg\n"),
        ("a.csv", b"uri,note\n", b"x.jpg,1\n"),
        ("a.jsonl", b"", b'{"uri": "x.jpg"}\n'),
    ],
)
def test_list_table_never_waits_for_the_end_of_a_list(
    name: str, header: bytes, line: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_reader(self: Storage, uri: str) -> Any:
        return contextlib.closing(io.BufferedReader(_EndlessFile(header, line)))

    monkeypatch.setattr(Storage, "open_reader", open_reader)
    found = list_table(f"/lists/{name}", Storage())
    assert {next(found).uri for _ in range(10_000)} == {"/lists/x.jpg"}


def test_list_table_holds_a_part_of_a_large_row_group(write: Write) -> None:
    # One row group of 12 MB whose column is not compressed.
    names = [f"{number:0200}" for number in range(60_000)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"uri": names}), sink, compression="none", use_dictionary=False)
    uri = write("a.parquet", bytes(sink.getvalue()))
    del sink
    before = pa.total_allocated_bytes()
    peak = 0
    for _ in list_table(uri, Storage()):
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 6_000_000


def test_is_table_goes_by_the_end_of_the_name() -> None:
    tables = ["a.txt", "s3://b/x.CSV", "a.b.parquet", "x/.jsonl", "a.lst", "a.ndjson"]
    assert [name for name in tables if not is_table(name)] == []
    others = ["a.json", "a.txt/", "a.txt/b", "txt", "a.jpg", ""]
    assert [name for name in others if is_table(name)] == []


def test_folder_of_gives_the_folder_or_the_working_directory() -> None:
    assert [folder_of(uri) for uri in ("a.csv", "/a.csv", "x/a.csv", "s3://b/a.csv")] == [
        *(".", "/", "x", "s3://b")
    ]
