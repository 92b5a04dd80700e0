"""Folders, prefixes and tars as they are listed, and odd names on their way through a whole run."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retinaray import s3_objects
from retinaray.errors import ConfigError, DatasetError, StorageError
from retinaray.inference.manifest import cut_parts, list_sources, source_root
from retinaray.inference.part_table import read_part, write_parts
from retinaray.inference.pipeline import ImageResult, ImageSource, ReadSettings, detect_images
from retinaray.inference.run_files import RunFiles
from retinaray.inference.source_filters import SourceChoice
from retinaray.inference.source_listing import expand_names, is_image, is_shard, name_below
from retinaray.inference.source_reading import make_source_reader
from retinaray.storage import FileEntry, Storage, join_uri

ODD_NAMES = [
    "line\nend.jpg",
    "100%25 100%.jpg",
    "a b.jpg",
    "a#b?c=d&e.jpg",
    "day=1/x.jpg",
    "quote'\",;.jpg",
    "Zürich/日本 😀.jpg",
]


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3_bucket"))
    return str(tmp_path)


@pytest.fixture
def run_through(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """List, cut, write the parts, read them as a worker does, commit, merge: images.json."""

    def run(images: str, **options: Any) -> list[dict[str, Any]]:
        storage, run_root = Storage(), str(tmp_path / "run")
        sources = list_sources(images, None, storage, **options)
        write_parts(cut_parts(sources, 3), f"{run_root}/manifest", storage)
        files = RunFiles(run_root, storage)
        rows = pq.read_table(f"{run_root}/manifest").to_pylist()
        for row in rows:
            part = read_part(row)
            read = make_source_reader(part, storage)
            # The content stands where the size would, to be compared later.
            sizes = [int(read(source.uri)) for source in part]
            results = [ImageResult(s, height=n, width=1) for s, n in zip(part, sizes, strict=True)]
            files.commit(row["part"], results)
        files.merge(len(rows))
        return list(json.loads(storage.read_bytes(files.images)))

    return run


def pack(names: list[str], start: int = 0) -> bytes:
    """A tar whose members hold their number as text."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number, name in enumerate(names, start=start):
            info, content = tarfile.TarInfo(name), b"%d" % number
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def list_uris(images: str, **settings: Any) -> list[str]:
    choice = SourceChoice(**settings)
    return [source.uri for source in list_sources(images, None, Storage(), choice=choice)]


# Names


def test_odd_names_survive_from_a_folder_to_the_merged_files(
    place: str, run_through: Callable[..., list[dict[str, Any]]]
) -> None:
    folder = join_uri(place, "odd = #1 %20")
    wanted = {}
    # The S3 server of these tests makes slashes of backslashes.
    names = ODD_NAMES if place.startswith("s3") else [*ODD_NAMES, "back\\slash.jpg"]
    for number, name in enumerate(names):
        wanted[join_uri(folder, name)] = number
        Storage().write_bytes(join_uri(folder, name), b"%d" % number)
    images = run_through(folder)
    assert {image["uri"]: image["height"] for image in images} == wanted
    assert [image["image_id"] for image in images] == list(range(1, len(names) + 1))
    assert [image["uri"] for image in images] == sorted(wanted)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_odd_names_survive_from_a_table_to_the_merged_files(
    place: str, kind: str, run_through: Callable[..., list[dict[str, Any]]]
) -> None:
    for number, name in enumerate(ODD_NAMES):
        Storage().write_bytes(join_uri(place, "x", name), b"%d" % number)
    rows = [{"uri": name, "image_id": f"id {name}", "from": name} for name in ODD_NAMES]
    if kind == "jsonl":
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    elif kind == "csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["uri", "image_id", "from"])
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode()
    else:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        content = bytes(sink.getvalue())
    Storage().write_bytes(join_uri(place, "x", f"all.{kind}"), content)
    assert run_through(join_uri(place, "x", f"all.{kind}")) == [
        {
            "image_id": f"id {name}",
            "uri": join_uri(place, "x", name),
            "columns": {"from": name},
            "height": number,
            "width": 1,
        }
        for number, name in enumerate(ODD_NAMES)
    ]


def test_local_names_that_are_no_text_become_file_uris(
    tmp_path: Path, run_through: Callable[..., list[dict[str, Any]]], monkeypatch: Any
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / os.fsdecode(b"Z\xfcrich 1.jpg")).write_bytes(b"7")
    uri = f"file://{tmp_path}/x/Z%FCrich%201.jpg"
    assert run_through(str(tmp_path / "x")) == [
        {"image_id": 1, "uri": uri, "height": 7, "width": 1}
    ]
    monkeypatch.chdir(tmp_path)
    assert list_uris("x") == [uri]


@pytest.mark.parametrize(
    ("place", "uri", "name"),
    [
        ("s3://b", "s3://b/x/y.jpg", "x/y.jpg"),
        ("s3://b/x/", "s3://b/x/y.jpg", "y.jpg"),
        ("/x", "/x2/y.jpg", "/x2/y.jpg"),
        ("/x/y.jpg", "/x/y.jpg", "y.jpg"),
        ("/x", "/x/a%20b.jpg", "a%20b.jpg"),
        ("file:///x", "file:///x/a%20b.jpg", "a b.jpg"),
    ],
)
def test_name_below_is_the_path_below_a_place(place: str, uri: str, name: str) -> None:
    assert name_below(place, uri) == name


def test_is_image_goes_by_the_end_of_the_name() -> None:
    images = ["a.jpg", "s3://b/x.y/a.JPEG", "a.tar.jpg", "a\n.png", "..jpg"]
    assert [name for name in images if not is_image(name)] == []
    others = [".jpg", "x/.jpg", "jpg", "a.jpg/x", "a.jpgx", "a.", "", "a.jpg "]
    assert [name for name in others if is_image(name)] == []


def test_is_shard_goes_by_the_end_of_the_name() -> None:
    assert [
        is_shard(name) for name in ("a.tar", "s3://b/A.TAR", "a.tar.jpg", "tar", "a.tar/b")
    ] == [*(True, True, False, False, False)]


# Folders


def test_list_sources_filters_by_names_sizes_and_dates(place: str) -> None:
    for name, size in [("a.jpg", 5), ("s/b.jpg", 10), ("s/c.png", 10), ("s/d.jpg", 20)]:
        Storage().write_bytes(join_uri(place, "x", name), bytes(size))
    folder = join_uri(place, "x")
    uris = {name: join_uri(folder, name) for name in ("a.jpg", "s/b.jpg", "s/c.png", "s/d.jpg")}
    assert list_uris(folder, include=("s/*.jpg",)) == [uris["s/b.jpg"], uris["s/d.jpg"]]
    assert list_uris(folder, exclude=("s/**",)) == [uris["a.jpg"]]
    assert list_uris(folder, min_bytes=6, max_bytes=10) == [uris["s/b.jpg"], uris["s/c.png"]]
    year_2000 = datetime(2000, 1, 1, tzinfo=UTC)
    assert len(list_uris(folder, modified_after=year_2000)) == 4
    with pytest.raises(DatasetError, match=r"of 4 .* modified_before=2000-01-01 .* removed 4"):
        list_uris(folder, modified_before=year_2000)


def test_list_sources_numbers_what_is_left(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jpg").touch()
    choice = SourceChoice(exclude=("1.jpg",), limit=3)
    sources = list(list_sources(str(tmp_path), None, Storage(), choice=choice))
    assert [(s.image_id, s.uri[-5:]) for s in sources] == [(1, "0.jpg"), (2, "2.jpg"), (3, "3.jpg")]


def test_list_sources_of_a_coco_file_takes_patterns_and_keeps_ids() -> None:
    names = ["a.jpg", "s/b.jpg", "s/c.jpg"]
    content = {"images": [{"id": n + 7, "file_name": name} for n, name in enumerate(names)]}
    choice = SourceChoice(include=("s/*",))
    sources = list_sources("s3://b/x", content, Storage(), choice=choice)
    assert [(s.image_id, s.uri) for s in sources] == [
        (8, "s3://b/x/s/b.jpg"),
        (9, "s3://b/x/s/c.jpg"),
    ]


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("x.json", {"min_bytes": 1}, r"min_bytes: .*x\.json is a COCO file, which does not tell"),
        ("x.csv", {"modified_after": datetime(2026, 1, 1)}, "modified_after: .* a list of images"),
        ("x.txt", {"max_bytes": 1, "min_bytes": 1}, "min_bytes, max_bytes: "),
        ("x.tar", {"modified_before": datetime(2026, 1, 1)}, r"x\.tar is a tar that is named"),
    ],
)
def test_list_sources_refuses_details_that_nothing_tells(
    tmp_path: Path, name: str, settings: dict[str, Any], text: str
) -> None:
    (tmp_path / name).write_bytes(b'{"images": [{"id": 1, "file_name": "a.jpg"}]}')
    with pytest.raises(ConfigError, match=text):
        list_uris(str(tmp_path / name), **settings)


class _ManyFiles(Storage):
    """A storage that lists very many names, and holds none of them."""

    def __init__(self, count: int) -> None:
        super().__init__()
        object.__setattr__(self, "count", count)

    def list_level(self, uri: str) -> list[FileEntry | str]:
        return [f"{uri}/day={day}/" for day in range(4)]

    def list_entries(self, uri: str) -> Iterator[FileEntry]:
        count: int = self.count // 4  # type: ignore[attr-defined]
        return (FileEntry(f"{uri}{n:09}.jpg", 1, 0.0) for n in range(count))


@pytest.mark.parametrize("settings", [{}, {"sample": 500}, {"sample": 0.5, "exclude": ("*.png",)}])
def test_list_sources_and_cut_parts_take_no_more_memory_for_more_images(
    settings: dict[str, Any],
) -> None:
    def measure(count: int) -> int:
        tracemalloc.start()
        try:
            sources = list_sources(
                "s3://b", None, _ManyFiles(count), choice=SourceChoice(**settings)
            )
            assert sum(len(part.sources) for part in cut_parts(sources, 100)) > 0
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # Each of the four prefixes is read up to 1,300 files ahead; 18,000 sources more would be 5 MB.
    assert measure(26_000) < measure(8_000) + 200_000


# Tars


def test_list_sources_takes_tars_in_order_and_reads_their_members(
    place: str, run_through: Callable[..., list[dict[str, Any]]]
) -> None:
    folder = join_uri(place, "shards #1")
    Storage().write_bytes(join_uri(folder, "b.tar"), pack(["0.jpg", "0.json", "0.seg.png"], 100))
    Storage().write_bytes(
        join_uri(folder, "a/x.TAR"), pack(["./z.jpg", "../../a.jpg", "/y.jpg"], 7)
    )
    Storage().write_bytes(join_uri(folder, "notes.txt"), b"x")
    shard = join_uri(folder, "a/x.TAR")
    wanted = [
        (1, f"{shard}/z.jpg", "./z.jpg", 7),
        (2, f"{shard}/../../a.jpg", "../../a.jpg", 8),
        (3, f"{shard}/y.jpg", "/y.jpg", 9),
        (4, join_uri(folder, "b.tar/0.jpg"), "0.jpg", 100),
        (5, join_uri(folder, "b.tar/0.seg.png"), "0.seg.png", 102),
    ]
    images = run_through(folder)
    assert [(i["image_id"], i["uri"], i["member"], i["height"]) for i in images] == wanted


def test_images_in_a_tar_are_detected_as_files_are(
    tmp_path: Path, script_predictor: Callable[..., Any], encode_png: Callable[..., bytes]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(6):
        content = encode_png(64, 96, 20 * number) if number != 3 else b"no image"
        (photos / f"{number}.png").write_bytes(content)
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, ".")

    def find_grey(canvas: Any) -> list[list[float]]:
        return [[1, 1, 2 + round(canvas.float().mean().item()), 9, 0.9, 0]]

    outcomes = []
    for images in (str(photos), str(tmp_path / "photos.tar")):
        sources = list(list_sources(images, None, Storage()))
        results = detect_images(
            script_predictor(find_grey),
            sources,
            read=make_source_reader(sources, Storage()),
            batch=2,
            settings=ReadSettings(threads=2),
        )
        found = [(r.source.uri[-5:], r.height, r.detections, r.exception) for r in results]
        outcomes.append(sorted(found))
    assert outcomes[0] == outcomes[1]
    assert [exception for _, _, _, exception in outcomes[0]] == [*[""] * 3, "ImageError", "", ""]


def test_list_sources_filters_members_of_tars(tmp_path: Path) -> None:
    for shard in ("x-0.tar", "x-1.tar"):
        (tmp_path / shard).write_bytes(pack(["a.jpg", "s/b.jpg", "c.png"], start=9))
    folder = str(tmp_path)
    assert list_uris(folder, include=("*.jpg",), exclude=("x-1.tar",)) == [
        f"{folder}/x-0.tar/a.jpg",
        f"{folder}/x-0.tar/s/b.jpg",
    ]
    assert list_uris(folder, include=("x-1.tar/s/**",)) == [f"{folder}/x-1.tar/s/b.jpg"]
    # 9 has one byte, 10 and 11 have two.
    assert list_uris(folder, max_bytes=1) == [f"{folder}/x-{n}.tar/a.jpg" for n in (0, 1)]
    assert list_uris(f"{folder}/x-0.tar", min_bytes=2, limit=1) == [f"{folder}/x-0.tar/s/b.jpg"]
    assert len(list_uris(folder, modified_after=datetime(2000, 1, 1))) == 6
    with pytest.raises(
        DatasetError, match=r"of 0 that were found: exclude \(whole tars\) removed 2"
    ):
        list_uris(folder, exclude=("*.tar",))


def test_list_sources_takes_tars_by_numbers_and_from_lists(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"x-{number:03}.tar").write_bytes(pack([f"{number}.jpg"]))
    (tmp_path / "lone.jpg").touch()
    folder = str(tmp_path)
    wanted = [f"{folder}/x-{number:03}.tar/{number}.jpg" for number in range(3)]
    assert list_uris(f"{folder}/x-{{000..002}}.tar") == wanted
    assert list_uris(f"{folder}/x-002.tar") == wanted[2:]
    with pytest.raises(StorageError, match=r"x-003\.tar: no such file"):
        list_uris(f"{folder}/x-{{002..003}}.tar")
    (tmp_path / "all.csv").write_text("uri,from\nx-002.tar,s\nlone.jpg,t\nx-000.tar,u\n")
    sources = list(list_sources(f"{folder}/all.csv", None, Storage()))
    assert [(s.uri, s.columns) for s in sources] == [
        (wanted[2], {"from": "s"}),
        (f"{folder}/lone.jpg", {"from": "t"}),
        (wanted[0], {"from": "u"}),
    ]


def test_expand_names_counts_as_webdataset_does() -> None:
    assert list(expand_names("s3://b/a-{08..11}.tar")) == [
        f"s3://b/a-{text}.tar" for text in ("08", "09", "10", "11")
    ]
    assert list(expand_names("{0..1}/{1..2}.tar")) == ["0/1.tar", "0/2.tar", "1/1.tar", "1/2.tar"]
    assert list(expand_names("a{b}{1.2}.tar")) == ["a{b}{1.2}.tar"]
    with pytest.raises(DatasetError, match=r"expected a range upwards, found \{3\.\.1\}"):
        list(expand_names("a-{3..1}.tar"))
    with pytest.raises(DatasetError, match="expected up to 1000000 tars, found 1001000"):
        list(expand_names("{0..1000}/{0000..0999}.tar"))


def test_list_sources_refuses_images_and_tars_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / "b.tar").write_bytes(pack(["c.jpg"]))
    with pytest.raises(
        DatasetError, match=r"a\.jpg\) and tars .*b\.tar\) lie side by side; .*\*\.tar"
    ):
        list_uris(str(tmp_path))
    assert list_uris(str(tmp_path), exclude=("*.tar",)) == [str(tmp_path / "a.jpg")]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.TGZ", "a.tar.zst"])
def test_list_sources_refuses_a_compressed_tar(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match="compressed tar cannot be read singly; unpack"):
        list_uris(str(tmp_path / name))


def test_list_sources_refuses_a_tar_with_two_members_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(pack(["x.jpg", "y.txt", "z.jpg", "./x.jpg"]))
    with pytest.raises(DatasetError, match=r"a\.tar: its images number 1 and 3 have one name"):
        list_uris(str(tmp_path))


def test_list_sources_refuses_a_damaged_tar_in_the_middle(place: str) -> None:
    for number in range(5):
        content = pack([f"{n}.jpg" for n in range(number + 1)])
        content = content[:1000] if number == 3 else content
        Storage().write_bytes(join_uri(place, f"{number}.tar"), content)
    with pytest.raises(DatasetError, match=r"3\.tar: expected a whole tar"):
        list_uris(place)


def test_source_reader_says_so_when_a_tar_became_shorter(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(pack(["x.jpg"]))
    (source,) = list_sources(str(path), None, Storage())
    read = make_source_reader([source], Storage())
    assert read(source.uri) == b"0"
    path.write_bytes(b"")
    with pytest.raises(StorageError, match=r"a\.tar: expected 1 bytes from byte 512 on, found 0"):
        read(source.uri)


def test_source_reader_reads_files_that_it_was_not_told_of(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"content")
    assert make_source_reader([ImageSource(1, "y")], Storage())(str(tmp_path / "x")) == b"content"


@pytest.mark.parametrize(
    ("images", "annotations", "root"),
    [
        ("s3://b/photos/", None, "s3://b/photos"),
        ("s3://b/x/all.csv", None, "s3://b/x"),
        ("/data/train.json", None, "/data"),
        ("/data/train.json", {}, "/data/train.json"),
        ("/data/a-{0..9}.tar", None, "/data"),
        ("all.txt", None, "."),
    ],
)
def test_source_root_is_what_names_are_relative_to(
    images: str, annotations: dict[str, Any] | None, root: str
) -> None:
    assert source_root(images, annotations) == root


def test_list_sources_lists_prefixes_at_once_in_the_order_of_one_listing(s3_bucket: str) -> None:
    storage = Storage()
    names = [
        f"{folder}/{number}.jpg" for folder in ("a", "b b", "a.d", "Z", "é") for number in "21"
    ]
    names += ["a.jpg", "a-.jpg", "b.jpg", "b b/deep/er/x.jpg", "b b/notes.txt"]
    for name in names:
        storage.write_bytes(f"{s3_bucket}/one/level/{name}", b"x")
    # By code point, as AWS sorts; this server's own listing of all sorts folder by folder.
    wanted = sorted(f"{s3_bucket}/one/level/{name}" for name in names if name.endswith(".jpg"))
    # The single prefixes on the way are walked down.
    for place in (f"{s3_bucket}/one/level", f"{s3_bucket}/one/level/", f"{s3_bucket}/one"):
        for threads in (1, 8):
            found = [image.uri for image in list_sources(place, None, storage, threads=threads)]
            assert found == wanted
    level = storage.list_level(f"{s3_bucket}/one/level")
    assert level is not None
    assert [item if isinstance(item, str) else item.uri for item in level] == [
        f"{s3_bucket}/one/level/{name}"
        for name in ("Z/", "a-.jpg", "a.d/", "a.jpg", "a/", "b b/", "b.jpg", "é/")
    ]


def test_list_level_leaves_thousands_of_prefixes_to_one_listing(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage()
    storage.write_bytes(f"{s3_bucket}/x/1.jpg", b"x")
    asked = []

    class Client:
        def list_objects_v2(self, **options: Any) -> dict[str, Any]:
            asked.append(options)
            return {"IsTruncated": True, "CommonPrefixes": [{"Prefix": "x/"}]}

    monkeypatch.setattr(s3_objects.S3Objects, "client", lambda _: Client())
    assert storage.list_level(f"{s3_bucket}/x") is None
    assert [options["Delimiter"] for options in asked] == ["/"]


def test_list_level_knows_nothing_of_local_folders(tmp_path: Path) -> None:
    assert Storage().list_level(str(tmp_path)) is None
