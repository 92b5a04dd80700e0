"""Whole runs in every format and compression: the same bytes however they came about."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from retinaray.errors import StorageError
from retinaray.inference import run_files
from retinaray.inference.output_formats import OutputFormat, OutputSettings
from retinaray.inference.part_codec import SUFFIXES, Compression, decode_rows
from retinaray.inference.pipeline import ImageResult, ImageSource, TarMember
from retinaray.inference.run_files import RunFiles, RunTotals
from retinaray.storage import MissingFileError, Storage

CATEGORIES = ({"id": 7, "name": "car"}, {"id": 17, "name": "bus"})
FORMATS: list[OutputFormat] = ["coco-results", "coco-dataset", "jsonl", "parquet", "odtk"]
COMPRESSIONS: list[Compression] = ["none", "gzip", "zstd"]
NUM_PARTS = 5


def open_run(root: Path, **settings: Any) -> RunFiles:
    output = OutputSettings(categories=CATEGORIES, images_root="s3://b", **settings)
    return RunFiles(str(root), Storage(), output)


def make_results(part: int) -> list[ImageResult]:
    """Four images: an error, one in a tar, one with columns, one without detections."""
    first = 4 * part
    found = {"category_id": 17, "bbox": [1.0, 2.0, 3.0, 4.5], "score": 0.5 + part / 100}
    member = TarMember("s3://b/x.tar", "./a.jpg", 512, 9)
    return [
        ImageResult(ImageSource(first, f"s3://b/{first}.jpg"), error="broken", exception="E"),
        ImageResult(ImageSource(first + 1, "s3://b/x.tar/a.jpg", member), 10, 20, (found,) * 2),
        ImageResult(ImageSource(first + 2, "s3://b/é.jpg", columns={"t": "é"}), 10, 20, (found,)),
        ImageResult(ImageSource(first + 3, "s3://b/0.jpg"), 10, 20),
    ]


def read_all(files: RunFiles) -> dict[str, bytes]:
    uris = files.storage.list_files(files.root)
    return {uri.removeprefix(files.root): files.storage.read_bytes(uri) for uri in uris}


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_merge_gives_the_same_bytes_whatever_the_order_of_writing(
    tmp_path: Path, output_format: OutputFormat, compression: Compression
) -> None:
    outcomes = []
    for run, order in enumerate(([0, 1, 2, 3, 4], [4, 2, 2, 0, 3, 1], [1, 0, 4, 3, 2, 0])):
        files = open_run(
            tmp_path / str(run),
            format=output_format,
            compression=compression,
            merged_compression=compression,
        )
        for part in order:
            files.commit(part, make_results(part))
        assert files.list_committed() == set(range(NUM_PARTS))
        assert files.merge(NUM_PARTS) == RunTotals(
            5, num_images=15, num_errors=5, num_detections=15
        )
        outcomes.append(read_all(files))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert (
        len({uri.rpartition("/")[0] for uri in outcomes[0]}) <= 3
    )  # nothing but "", parts, errors


@pytest.mark.parametrize("output_format", FORMATS)
def test_read_results_gives_coco_results_whatever_the_format(
    tmp_path: Path, output_format: OutputFormat
) -> None:
    files = open_run(tmp_path, format=output_format, compression="zstd")
    for part in range(NUM_PARTS):
        files.commit(part, make_results(part))
    wanted = [
        {"image_id": result.source.image_id, **found}
        for part in range(NUM_PARTS)
        for result in make_results(part)
        for found in result.detections
    ]
    assert list(files.read_results(NUM_PARTS)) == wanted


def test_parts_and_errors_name_members_and_columns(tmp_path: Path) -> None:
    files = open_run(tmp_path)
    results = make_results(1)
    files.commit(0, [*results, ImageResult(results[1].source, error="gone", exception="E")])
    rows = list(files.read_rows(1))
    assert rows[0]["uri"] == "s3://b/x.tar/a.jpg"
    assert rows[0]["member"] == "./a.jpg"
    assert "columns" not in rows[0]
    assert rows[1]["columns"] == {"t": "é"}
    assert "member" not in rows[1]
    assert [error.get("member") for error in files.read_errors(9)] == [None, "./a.jpg"]


@pytest.mark.parametrize(("first", "second"), list(product(COMPRESSIONS, repeat=2)))
def test_a_run_goes_on_with_another_compression_of_its_parts(
    tmp_path: Path, first: Compression, second: Compression
) -> None:
    plain = open_run(tmp_path / "plain")
    for part in range(NUM_PARTS):
        plain.commit(part, make_results(part))
        open_run(tmp_path / "mixed", compression=first if part % 2 else second).commit(
            part, make_results(part)
        )
    mixed = open_run(tmp_path / "mixed", compression=second)
    assert mixed.list_committed() == set(range(NUM_PARTS))
    assert mixed.merge(NUM_PARTS) == plain.merge(NUM_PARTS)
    for name in ("/detections.json", "/images.json"):
        assert read_all(mixed)[name] == read_all(plain)[name]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_merged_files_are_compressed_when_asked(tmp_path: Path, compression: Compression) -> None:
    plain = open_run(tmp_path)
    plain.commit(0, make_results(0))
    plain.merge(1)
    files = open_run(tmp_path, merged_compression=compression)
    files.merge(1)
    suffix = SUFFIXES[compression]
    assert files.detections == f"{tmp_path}/detections.json{suffix}"
    assert files.images == f"{tmp_path}/images.json{suffix}"
    if compression == "gzip":
        assert gzip.decompress(Path(files.images).read_bytes()) == Path(plain.images).read_bytes()
    assert plain.has_results()
    files.remove_all()
    assert read_all(files) == {}


def test_json_lines_hold_whole_images(tmp_path: Path) -> None:
    files = open_run(tmp_path, format="jsonl", merged_compression="zstd")
    for part in range(2):
        files.commit(part, make_results(part))
    files.merge(2)
    assert files.detections.endswith("/detections.jsonl.zst")
    content = Path(files.detections).read_bytes()
    assert list(decode_rows(content, files.detections)) == list(files.read_rows(2))
    assert not Path(files.images).exists()


def test_parquet_parts_are_the_result_and_are_listed(tmp_path: Path) -> None:
    files = open_run(tmp_path, format="parquet", compression="zstd")
    for part in (2, 0, 1):
        files.commit(part, make_results(part))
    files.merge(3)
    assert files.detections == f"{tmp_path}/parts/_files.jsonl"
    assert [json.loads(line) for line in Path(files.detections).read_text().splitlines()] == [
        {"file": f"part-00000000{n}.parquet", "num_images": 3, "num_detections": 3}
        for n in range(3)
    ]
    # Readers of whole folders pass over names with an underscore.
    table = pyarrow.dataset.dataset(f"{tmp_path}/parts", format="parquet").to_table()
    assert table["image_id"].to_pylist() == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert pq.read_table(files.part(0))["uri"].to_pylist()[1] == "s3://b/é.jpg"


def test_merge_refuses_a_missing_part_in_every_format(tmp_path: Path) -> None:
    for output_format in FORMATS:
        files = open_run(tmp_path / output_format, format=output_format)
        files.commit(0, make_results(0))
        files.commit(2, make_results(2))
        with pytest.raises(MissingFileError, match=r"part-000000001\."):
            files.merge(3)
        assert not files.storage.exists(files.detections)


def test_merge_refuses_a_damaged_part_and_leaves_no_result(tmp_path: Path) -> None:
    for output_format, compression in product(FORMATS, COMPRESSIONS):
        files = open_run(
            tmp_path / output_format / compression, format=output_format, compression=compression
        )
        files.commit(0, make_results(0))
        content = Path(files.part(0)).read_bytes()
        Path(files.part(0)).write_bytes(content[: len(content) // 2])
        with pytest.raises(StorageError, match=r"part-000000000\..*delete it and run"):
            files.merge(1)
        assert not files.storage.exists(files.detections)


def test_list_committed_tells_parquet_from_lines(tmp_path: Path) -> None:
    lines, parquet = open_run(tmp_path), open_run(tmp_path, format="parquet")
    lines.commit(1, make_results(1))
    parquet.commit(2, make_results(2))
    assert lines.list_committed() == {1}
    assert parquet.list_committed() == {2}
    for name in ("part-1.parquet", "part-000000003.jsonl.bz2", "_files.jsonl"):
        (tmp_path / "parts" / name).touch()
    assert parquet.list_committed() == {2}


@pytest.mark.parametrize("output_format", FORMATS)
def test_has_results_and_remove_all_know_what_other_settings_left(
    tmp_path: Path, output_format: OutputFormat
) -> None:
    files = open_run(tmp_path, format=output_format, merged_compression="gzip")
    assert not files.has_results()
    files.commit(0, make_results(0))
    files.merge(1)
    for folder in (files.overlays, f"{files.crops}/car"):
        files.storage.write_bytes(f"{folder}/1.jpg", b"x")
    assert open_run(tmp_path).has_results()
    open_run(tmp_path).remove_all()
    assert read_all(files) == {}


@pytest.mark.parametrize("output_format", FORMATS)
def test_merge_takes_no_more_memory_for_more_parts(
    tmp_path: Path, output_format: OutputFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each of them holds a buffer of 1 MiB.
    monkeypatch.setattr(run_files, "_FOOTER_THREADS", 1)

    def measure(num_parts: int) -> int:
        files = open_run(tmp_path, format=output_format)
        for part in range(len(files.list_committed()), num_parts):
            files.commit(part, make_results(part) * 20)
        tracemalloc.start()
        try:
            files.merge(num_parts)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few = measure(8)
    size = Path(open_run(tmp_path, format=output_format).part(0)).stat().st_size
    # 32 parts more, and less than two parts' memory more.
    assert measure(40) < few + 2 * size + 50_000
