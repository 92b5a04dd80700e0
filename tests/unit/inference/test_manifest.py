"""Which images a run takes, under which ids, in which order, and how they are cut into parts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from retinaray.errors import DatasetError, StorageError
from retinaray.inference.manifest import count_images, cut_parts, list_sources
from retinaray.inference.pipeline import ImageSource
from retinaray.storage import Storage, join_uri

NAMES = ["b.JPG", "a.png", "sub/c.webp", "sub/#1 ?.jpeg", "notes.txt", "a.json", "jpg", "x.heic"]
IMAGES = ["a.png", "b.JPG", "sub/#1 ?.jpeg", "sub/c.webp"]  # by code point


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3_bucket"))
    return str(tmp_path)


def list_pairs(images: str, annotations: Any = None) -> list[tuple[int | str, str]]:
    sources = list_sources(images, annotations, Storage())
    return [(source.image_id, source.uri) for source in sources]


def number_sources(count: int) -> Iterator[ImageSource]:
    return (ImageSource(number, f"{number}.jpg") for number in range(count))


def test_list_sources_takes_the_images_of_a_folder_sorted_and_numbered_from_one(
    place: str,
) -> None:
    for name in NAMES:
        Storage().write_bytes(join_uri(place, "photos", name), b"x")
    expected = [
        (number, join_uri(place, "photos", name)) for number, name in enumerate(IMAGES, start=1)
    ]
    assert list_pairs(join_uri(place, "photos")) == expected
    assert list_pairs(join_uri(place, "photos") + "/") == expected


def test_list_sources_takes_a_single_file(place: str) -> None:
    uri = join_uri(place, "one.png")
    Storage().write_bytes(uri, b"x")
    assert list_pairs(uri) == [(1, uri)]


def test_list_sources_reads_a_list_of_uris_in_its_order(place: str) -> None:
    lines = [
        "\ufeffz.jpg",
        "  sub/#1 ?.jpeg\t",
        "",
        "s3://other/bucket key.png",
        "/abs/olute.jpg",
        "file:///else/where%20x.jpg",
        "z.jpg",
        "Zürich 日本.jpg",
    ]
    uri = join_uri(place, "lists", "all.txt")
    Storage().write_bytes(uri, "\r\n".join(lines).encode())
    folder = join_uri(place, "lists")
    assert list_pairs(uri) == [
        (1, f"{folder}/z.jpg"),
        (2, f"{folder}/sub/#1 ?.jpeg"),
        (3, "s3://other/bucket key.png"),
        (4, "/abs/olute.jpg"),
        (5, "file:///else/where%20x.jpg"),
        (6, f"{folder}/z.jpg"),
        (7, f"{folder}/Zürich 日本.jpg"),
    ]


def test_list_sources_finds_a_list_beside_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "all.lst").write_text("a.jpg\n")
    monkeypatch.chdir(tmp_path)
    assert list_pairs("all.lst") == [(1, "./a.jpg")]


def test_list_sources_refuses_a_list_that_is_no_text(place: str) -> None:
    uri = join_uri(place, "all.txt")
    Storage().write_bytes(uri, "a.jpg\nZürich.jpg\n".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"all.txt, line 2: expected UTF-8"):
        list_pairs(uri)


def test_list_sources_streams_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "all.txt"
    path.write_text("".join(f"image_{number:07}.jpg\n" for number in range(300_000)))

    def refuse(self: Storage, uri: str) -> bytes:
        raise AssertionError(f"read {uri} whole")

    monkeypatch.setattr(Storage, "read_bytes", refuse)
    sources = list_sources(str(path), None, Storage())
    assert next(sources) == ImageSource(1, str(tmp_path / "image_0000000.jpg"))
    assert sum(1 for _ in sources) == 299_999


def coco(*records: Any) -> dict[str, Any]:
    return {"images": list(records), "annotations": [], "categories": []}


def test_list_sources_takes_ids_names_and_order_of_a_coco_file(place: str) -> None:
    content = coco(
        {"id": 7, "file_name": "z.jpg"},
        {"id": 2**60, "file_name": "a/b c.png"},
        {"id": "seven", "file_name": "no_ending"},
    )
    expected = [(7, "z.jpg"), (2**60, "a/b c.png"), ("seven", "no_ending")]
    uri = join_uri(place, "set", "train.json")
    Storage().write_bytes(uri, json.dumps(content).encode())
    assert list_pairs(uri) == [(i, join_uri(place, "set", name)) for i, name in expected]
    root = join_uri(place, "images")
    assert list_pairs(root, content) == [(i, join_uri(root, name)) for i, name in expected]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([1, 2], "expected an object with a list 'images'"),
        ({"images": {}}, "expected an object with a list 'images'"),
        (coco(), "no images found"),
        (coco({"id": 1}), "1 images without a usable id or file_name"),
        (coco({"id": 1, "file_name": "a"}, {"file_name": "b"}), "without a usable id"),
        (coco({"id": None, "file_name": "b"}), "without a usable id"),
        (coco({"id": [1], "file_name": "b"}), "without a usable id"),
        (coco({"id": True, "file_name": "b"}), "without a usable id"),
        (coco({"id": 1, "file_name": None}), "without a usable id or file_name"),
        (coco(5, None), "2 images without a usable id"),
        (
            coco({"id": 3, "file_name": "a"}, {"id": 3, "file_name": "b"}),
            "image id 3 occurs twice.*doctor",
        ),
        (coco({"id": 3, "file_name": "../../etc/passwd"}), "leads out of the image folder"),
        (coco({"id": 3, "file_name": "/etc/passwd"}), "is absolute"),
    ],
)
def test_list_sources_refuses_a_coco_file_without_usable_images(content: Any, text: str) -> None:
    with pytest.raises(DatasetError, match=text):
        list_pairs("/data/images", content)


def test_list_sources_refuses_json_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text('{"images": [')
    with pytest.raises(DatasetError, match=r"train.json: expected COCO JSON"):
        list_pairs(str(path))


@pytest.mark.parametrize("kind", ["absent", "empty", "no images", "empty list"])
def test_list_sources_refuses_a_place_without_images(place: str, kind: str) -> None:
    images = join_uri(place, "photos")
    if kind == "no images":
        Storage().write_bytes(join_uri(images, "readme.md"), b"x")
    elif kind == "empty list":
        images = join_uri(images, "all.txt")
        Storage().write_bytes(images, b"\n \n")
    elif kind == "empty" and not place.startswith("s3"):
        Path(images).mkdir()
    with pytest.raises(DatasetError, match=r"photos.*: no images found; expected a folder"):
        list_pairs(images)


@pytest.mark.parametrize("name", ["all.txt", "train.json"])
def test_list_sources_passes_on_that_a_file_is_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError, match=f"{name}: no such file"):
        list_pairs(str(tmp_path / name))


@pytest.mark.parametrize("count", [1, 15, 16, 17, 1024, 1025, 5000])
@pytest.mark.parametrize("part_size", [None, 1, 7, 1000])
def test_cut_parts_holds_every_image_once_in_order(count: int, part_size: int | None) -> None:
    parts = list(cut_parts(number_sources(count), part_size))
    assert [part.number for part in parts] == list(range(len(parts)))
    assert [source.image_id for part in parts for source in part.sources] == list(range(count))
    assert all(part.sources for part in parts)
    if part_size:
        assert {len(part.sources) for part in parts[:-1]} <= {part_size}


def test_cut_parts_grows_from_16_to_1000_images() -> None:
    sizes = [len(part.sources) for part in cut_parts(number_sources(75_000))]
    # 64 * 16 = 1024, 64 * 64 = 4096, 256 * 256 = 65536: 70656 images, then 4 * 1000 + 344.
    assert Counter(sizes) == {16: 64, 64: 64, 256: 256, 1000: 4, 344: 1}
    assert sizes == [*sorted(sizes[:-1]), 344]


def test_cut_parts_is_the_same_whatever_comes_later() -> None:
    short = list(cut_parts(number_sources(2000)))
    long = list(islice(cut_parts(number_sources(9000)), len(short) - 1))
    assert long == short[:-1]


def test_cut_parts_draws_no_image_before_its_part_is_asked_for() -> None:
    drawn = 0

    def draw() -> Iterator[ImageSource]:
        nonlocal drawn
        for source in number_sources(10**9):
            drawn += 1
            yield source

    parts = cut_parts(draw(), 10)
    assert drawn == 0
    for number in range(1, 4):
        next(parts)
        assert drawn == 10 * number


def test_cut_parts_of_nothing_is_nothing() -> None:
    assert list(cut_parts([])) == []


@pytest.mark.parametrize("part_size", [None, 7])
@pytest.mark.parametrize("num_images", [1, 16, 17, 1024, 1025, 5120, 71_000, 90_500])
def test_count_images_agrees_with_the_cut(part_size: int | None, num_images: int) -> None:
    sizes = [len(part.sources) for part in cut_parts(number_sources(num_images), part_size)]

    def count(numbers: Iterable[int]) -> int:
        return count_images(
            numbers, part_size=part_size, num_parts=len(sizes), num_images=num_images
        )

    assert count(range(len(sizes))) == num_images
    assert count([]) == 0
    for chosen in ({0}, {len(sizes) - 1}, set(range(0, len(sizes), 3))):
        assert count(chosen) == sum(sizes[number] for number in chosen)
