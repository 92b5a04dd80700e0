"""The cut manifest: what goes in comes out, one row group per part, memory of one part."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from retinaray.inference import part_table
from retinaray.inference.hash_choice import NUM_HASHES, is_chosen
from retinaray.inference.manifest import Part, cut_parts
from retinaray.inference.part_table import (
    PartTotals,
    decode_source,
    encode_source,
    read_part,
    write_parts,
)
from retinaray.inference.pipeline import ImageSource, TarMember
from retinaray.storage import Storage

SOURCES = [
    ImageSource(7, "s3://b/line\nend é.jpg"),
    ImageSource("7", "/x/a.jpg", columns={"t": "é", "i": 2**70, "f": 0.1, "b": False, "n": None}),
    ImageSource(2**63, "s3://b/x.tar/a.jpg", TarMember("s3://b/x.tar", "./a.jpg", 512, 2**40)),
]


def make_sources(count: int) -> Iterator[ImageSource]:
    return (ImageSource(number, f"s3://b/{number}.jpg") for number in range(count))


@pytest.mark.parametrize("source", SOURCES, ids=["plain", "columns", "member"])
def test_decode_source_gives_back_what_was_encoded(source: ImageSource) -> None:
    assert decode_source(encode_source(source)) == source
    assert encode_source(source).isascii()


def test_write_parts_gives_one_row_group_per_part(tmp_path: Path) -> None:
    parts = list(cut_parts([*SOURCES, *make_sources(7)], 4))
    totals = write_parts(parts, str(tmp_path), Storage())
    assert totals == PartTotals(3, 10, has_integer_ids=False, draw_limit=0)
    (path,) = tmp_path.iterdir()
    file = pq.ParquetFile(path)
    assert file.num_row_groups == 3
    for number, part in enumerate(parts):
        (row,) = file.read_row_group(number).to_pylist()
        assert row["part"] == number
        assert tuple(read_part(row)) == part.sources


def test_write_parts_begins_another_file_when_one_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_table, "_PARTS_PER_FILE", 3)
    monkeypatch.setattr(part_table, "_IMAGES_PER_FILE", 20)
    # 5 parts of 2 images and one of 25: by number after 3, by images after part 5.
    sizes = [2, 2, 2, 2, 2, 25, 1]
    remaining = make_sources(100)
    parts = [Part(n, tuple(next(remaining) for _ in range(size))) for n, size in enumerate(sizes)]
    write_parts(parts, str(tmp_path), Storage())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "parts-000000000.parquet",
        "parts-000000003.parquet",
        "parts-000000006.parquet",
    ]
    rows = pq.read_table(tmp_path).to_pylist()
    found = {row["part"]: tuple(read_part(row)) for row in rows}
    assert found == {part.number: part.sources for part in parts}


@pytest.mark.parametrize(
    ("ids", "has_integer_ids"),
    [([1, -5, 2**63 - 1], True), ([1, 2**63], False), ([1, "1"], False), (["a"], False)],
)
def test_write_parts_tells_whether_all_ids_are_integers(
    tmp_path: Path, ids: list[int | str], has_integer_ids: bool
) -> None:
    parts = cut_parts([ImageSource(image_id, "x") for image_id in ids], 2)
    assert write_parts(parts, str(tmp_path), Storage()).has_integer_ids is has_integer_ids


def test_write_parts_finds_the_limit_that_draws_so_many(tmp_path: Path) -> None:
    sources = list(make_sources(500))
    totals = write_parts(cut_parts(sources, 7), str(tmp_path), Storage(), num_drawn=20, draw_seed=4)
    chosen = [source for source in sources if is_chosen(source, limit=totals.draw_limit, seed=4)]
    assert len(chosen) == 20
    few = write_parts(cut_parts(sources[:5], 7), str(tmp_path), Storage(), num_drawn=20)
    assert few.draw_limit == NUM_HASHES


def test_write_parts_of_nothing_writes_nothing(tmp_path: Path) -> None:
    assert write_parts([], str(tmp_path / "x"), Storage()) == PartTotals(0, 0, True, 0)
    assert not (tmp_path / "x").exists()


def test_write_parts_takes_no_more_memory_for_more_parts(tmp_path: Path) -> None:
    def measure(count: int) -> int:
        tracemalloc.start()
        try:
            write_parts(cut_parts(make_sources(count), 100), str(tmp_path), Storage())
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # 9,000 sources more would be 2 MB.
    assert measure(10_000) < measure(1000) + 100_000
