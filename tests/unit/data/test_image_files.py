from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from retinaray.data.coco_columns import annotation_columns, tables_of
from retinaray.data.image_files import (
    HEAD_BYTES,
    FileHeader,
    FileState,
    folder_is_plausible,
    judge_sizes,
    read_headers,
)
from retinaray.errors import DatasetError


def encoded(width: int, height: int, file_format: str, orientation: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = random.Random(0).randbytes(width * height * 3)
    stream = io.BytesIO()
    Image.frombytes("RGB", (width, height), noise).save(stream, file_format, exif=exif, **options)
    return stream.getvalue()


def read_one(folder: Path, data: bytes) -> FileHeader:
    (folder / "a").write_bytes(data)
    return read_headers([{"file_name": "a"}], str(folder))[0]


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WebP"])
@pytest.mark.parametrize(
    ("orientation", "height", "width", "is_turned"), [(1, 40, 60, False), (6, 60, 40, True)]
)
def test_read_headers_gives_the_upright_size(
    tmp_path: Path, file_format: str, orientation: int, height: int, width: int, is_turned: bool
) -> None:
    header = read_one(tmp_path, encoded(60, 40, file_format, orientation))
    assert header == FileHeader(FileState.READ, height, width, is_turned)


def test_read_headers_reads_on_when_metadata_fills_the_head(tmp_path: Path) -> None:
    data = encoded(60, 40, "JPEG", 6, icc_profile=bytes(200_000))
    assert data.index(b"\xff\xc0") > HEAD_BYTES  # the frame header, which has the size
    assert read_one(tmp_path, data) == FileHeader(FileState.READ, 60, 40, True)


def test_read_headers_finds_exif_behind_the_pixels(tmp_path: Path) -> None:
    data = encoded(200, 300, "PNG", 8)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]  # before IEND
    assert moved.index(b"eXIf") > HEAD_BYTES
    assert read_one(tmp_path, moved) == FileHeader(FileState.READ, 200, 300, True)


def test_read_headers_says_why_there_is_no_size(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_bytes(b"hello")
    (tmp_path / "folder.jpg").mkdir()
    names = ["none.jpg", "text.jpg/x.jpg", "text.jpg", "folder.jpg", "../x.jpg", None, ""]
    headers = read_headers([{"file_name": name} for name in names], str(tmp_path))
    states = [header.state for header in headers]
    assert states[:2] == [FileState.MISSING] * 2
    assert states[2:4] == [FileState.UNREADABLE] * 2
    assert states[4:] == [FileState.NOT_TRIED] * 3
    assert "hello" in headers[2].problem
    assert "folder.jpg" in headers[3].problem


def test_read_headers_keeps_the_order_of_many_images(tmp_path: Path) -> None:
    for number in range(1, 201):
        Image.new("1", (number, 1)).save(tmp_path / f"{number}.png")
    images = [{"file_name": f"{number}.png"} for number in range(200, 0, -1)]
    headers = read_headers(images, str(tmp_path), num_threads=3)
    assert [header.width for header in headers] == list(range(200, 0, -1))


@pytest.mark.parametrize(
    ("images_root", "message"),
    [
        ("nowhere", "image folder nowhere does not exist"),
        ("s3://bucket/x", "expected a local image folder, got s3://bucket/x"),
    ],
)
def test_read_headers_refuses_a_folder_it_cannot_look_into(images_root: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_headers([], images_root)


def test_read_headers_agrees_with_pillow_on_the_odd_images(shared_data: Path) -> None:
    folder = shared_data / "odd_images"
    known = {entry["file"]: entry for entry in json.loads((folder / "index.json").read_text())}
    names = sorted(known)
    headers = read_headers([{"file_name": name} for name in names], str(folder / "images"))
    states = {name: header.state for name, header in zip(names, headers, strict=True)}
    assert FileState.MISSING not in states.values()
    for name in ("broken.png", "empty.jpg", "text.jpg", "huge_30000x30000.png"):
        assert states[name] is FileState.UNREADABLE
    compared = 0
    for name, header in zip(names, headers, strict=True):
        size, orientation = known[name].get("size"), known[name].get("exif_orientation") or 1
        if header.state is FileState.READ and size is not None:
            upright = size if orientation >= 5 else size[::-1]
            assert [header.height, header.width] == list(upright), name
            assert header.is_turned == (orientation >= 5 and size[0] != size[1]), name
            compared += 1
    assert compared >= 25


@pytest.mark.parametrize(
    ("states", "plausible"),
    [
        ([], True),
        (["read"], True),
        (["missing"], False),
        (["read", "missing"], True),
        (["read", "missing", "unreadable"], False),
        (["read", "not tried", "not tried"], True),
    ],
)
def test_folder_is_plausible_when_half_of_the_files_are_there(
    states: list[str], plausible: bool
) -> None:
    headers = [FileHeader(FileState(state), 1, 1) for state in states]
    assert folder_is_plausible(headers) is plausible


# JSON (height, width), file (height, width), turned by EXIF, box end (bottom, right), code
SAME = ((60, 80), (60, 80), False, (60, 80), "")
SIZE_CASES = [
    pytest.param([SAME], id="equal"),
    pytest.param([((60, 80), (61, 90), False, (60, 80), "size_mismatch")], id="fits both"),
    pytest.param([((60, 80), (61, 90), False, (60, 85), "size_mismatch")], id="fits the file"),
    pytest.param([((60, 80), (61, 90), False, None, "size_mismatch")], id="no boxes"),
    pytest.param([((60, 80), (30, 90), False, (50, 50), "size_unclear")], id="fits the JSON"),
    pytest.param([((60, 80), (30, 90), False, (70, 95), "size_unclear")], id="fits neither"),
    pytest.param([((60, 80), (120, 160), False, (9, 9), "size_unclear")], id="rescaled"),
    pytest.param([((60, 80), (30, 40), False, (30, 40), "size_unclear")], id="scaled down"),
    pytest.param([((60, 80), (120, 160), False, (9, 99), "size_mismatch")], id="labelled rescaled"),
    pytest.param([((60, 80), (120, 160), False, None, "size_mismatch")], id="rescaled, no boxes"),
    pytest.param([((60, 80), (80, 60), False, (50, 50), "size_swapped")], id="swapped"),
    pytest.param([((60, 80), (80, 60), False, (50, 70), "size_unclear")], id="swapped, fits JSON"),
    pytest.param([((60, 80), (80, 60), True, (50, 50), "exif_size_unclear")], id="EXIF, fits both"),
    pytest.param([((60, 80), (80, 60), True, (70, 50), "exif_unrotated_size")], id="EXIF, upright"),
    pytest.param([((60, 80), (80, 60), True, None, "exif_unrotated_size")], id="EXIF, no boxes"),
    pytest.param([((60, 80), (80, 60), True, (50, 70), "exif_size_unclear")], id="EXIF, unrotated"),
    pytest.param([((None, 80), (80, 60), True, (50, 70), "")], id="no size in the JSON"),
    pytest.param([((60, 80), None, False, (50, 70), "")], id="no size in the file"),
    pytest.param(
        [
            SAME,
            ((60, 80), (61, 90), False, (9, 9), "size_unclear"),
            ((60, 80), (30, 90), False, (50, 50), "size_unclear"),
            ((60, 80), (61, 90), False, (60, 85), "size_mismatch"),
        ],
        id="one image speaks against",
    ),
]


@pytest.mark.parametrize("cases", SIZE_CASES)
def test_judge_sizes_trusts_the_file_only_if_the_boxes_do(cases: list[Any]) -> None:
    images, annotations, headers = [], [], []
    for number, ((height, width), file_size, is_turned, end, _) in enumerate(cases):
        images.append({"id": number, "file_name": "x", "height": height, "width": width})
        if end is not None:
            bbox = [1, 1, end[1] - 1, end[0] - 1]
            annotations.append({"image_id": number, "category_id": 1, "bbox": bbox})
        state = FileState.READ if file_size else FileState.UNREADABLE
        headers.append(FileHeader(state, *(file_size or (0, 0)), is_turned))
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1}]}
    tables = tables_of(document, "train.json")
    codes = judge_sizes(tables, annotation_columns(tables), headers)
    assert codes == [case[-1] for case in cases]
