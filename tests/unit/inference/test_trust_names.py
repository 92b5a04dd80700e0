"""Names are names: none leads out of a run or a tar, none is lost, none ends a run."""

from __future__ import annotations

import io
import json
import os
import tarfile
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from retinaray.assembly.run_pictures import PictureSettings, RunPictures
from retinaray.errors import DatasetError, StorageError, UnreadableFileError
from retinaray.inference.hash_choice import NUM_HASHES
from retinaray.inference.manifest import cut_parts, list_sources
from retinaray.inference.output_formats import OutputFormat, OutputSettings
from retinaray.inference.part_table import decode_source, encode_source, read_part, write_parts
from retinaray.inference.pipeline import ImageResult, ImageSource
from retinaray.inference.run_files import RunFiles
from retinaray.inference.source_reading import make_source_reader
from retinaray.storage import Storage, join_uri

# Beside what the tests of listings hold: the two spellings of one letter, writing from right to
# left with its marks, what programs take for options, hidden files, blanks at the ends.
NAMES = [
    "caf\u00e9.jpg",
    "cafe\u0301.jpg",
    "\u05e9\u05dc\u05d5\u05dd \u202etxt.jpg",
    "-rf.jpg",
    ".hidden.jpg",
    "plus+and space.jpg",
    "tab\there.jpg",
    "return\rhere.jpg",
    " blanks .jpg",
    "%2e%2e%2fx.jpg",
    "~.jpg",
    "$HOME `x` ;|.jpg",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467.jpg",
    "{1..3} [ab] *.jpg",
    "x" * 200 + ".jpg",
]
HOSTILE = [
    "../../x",
    "..",
    ".",
    "a/b",
    "/etc/passwd",
    "a\0b",
    "",
    "x" * 5000,
    "line\nend",
    "a\\b",
    "CON",
    "\u202ex",
    "~",
    "s3://b/k",
    "file:///x",
    "\ud800",
]
BOX = {"bbox": [1.0, 1.0, 20.0, 20.0], "score": 0.9}


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3_bucket"))
    return str(tmp_path / "place")


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(str(tmp_path / "outer" / "run"), Storage())


def pack(*members: tuple[str, bytes, bytes]) -> bytes:
    """A tar of members: name, content, kind."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def paint() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((40, 60, 3), 99, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def run_through(images: str, root: str, output: OutputFormat) -> tuple[RunFiles, list[str]]:
    """List, cut, write the parts, read and commit them, merge: the run, and what was read."""
    storage = Storage()
    categories = ({"id": 1, "name": "a"},)
    files = RunFiles(root, storage, OutputSettings(output, categories=categories))
    totals = write_parts(cut_parts(list_sources(images, None, storage), 4), files.manifest, storage)
    contents = []
    for uri in storage.list_files(files.manifest):
        for row in pq.read_table(io.BytesIO(storage.read_bytes(uri))).to_pylist():
            part = read_part(row)
            read = make_source_reader(part, storage)
            contents += [read(source.uri).decode() for source in part]
            results = [ImageResult(source, height=1, width=1) for source in part]
            files.commit(row["part"], results)
    files.merge(totals.num_parts)
    return files, contents


def read_uris(files: RunFiles, output: OutputFormat) -> list[str]:
    if output == "coco-results":
        return [row["uri"] for row in json.loads(files.storage.read_bytes(files.images))]
    if output == "coco-dataset":
        content = json.loads(files.storage.read_bytes(files.detections))
        return [row["coco_url"] for row in content["images"]]
    return [row["uri"] for row in files.read_rows(len(files.list_committed()))]


@pytest.mark.parametrize("output", ["coco-results", "coco-dataset", "jsonl", "parquet"])
def test_list_sources_keeps_every_name_from_a_folder_to_the_results(
    place: str, output: OutputFormat
) -> None:
    folder = join_uri(place, "in")
    for name in NAMES:
        Storage().write_bytes(join_uri(folder, name), name.encode())
    files, contents = run_through(folder, join_uri(place, "run"), output)
    assert contents == sorted(NAMES)
    assert read_uris(files, output) == [join_uri(folder, name) for name in sorted(NAMES)]
    # Neither spelling was taken for the other.
    assert len({unicodedata.normalize("NFC", name) for name in NAMES}) == len(NAMES) - 1


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_list_sources_keeps_every_name_from_a_list_to_the_results(place: str, kind: str) -> None:
    # Text has no way to write blanks at the ends of a name.
    names = [name for name in NAMES if kind != "txt" or name == name.strip()]
    for name in names:
        Storage().write_bytes(join_uri(place, name), name.encode())
    lines = {
        "jsonl": "".join(json.dumps({"uri": name}) + "\n" for name in names),
        "csv": "uri\n" + "".join(f'"{name}"\n' for name in names),
        "txt": "".join(f"{name}\n" for name in names),
    }
    Storage().write_bytes(join_uri(place, f"all.{kind}"), lines[kind].encode())
    files, contents = run_through(join_uri(place, f"all.{kind}"), join_uri(place, "run"), "jsonl")
    assert contents == names
    assert read_uris(files, "jsonl") == [join_uri(place, name) for name in names]


def test_list_sources_reads_a_name_with_a_line_end_as_two_when_the_list_is_text(
    tmp_path: Path,
) -> None:
    (tmp_path / "all.txt").write_bytes(b"two\nlines.jpg\n")
    (tmp_path / "all.jsonl").write_bytes(b'{"uri": "two\\nlines.jpg"}\n')
    uris = {
        kind: [found.uri for found in list_sources(str(tmp_path / f"all.{kind}"), None, Storage())]
        for kind in ("txt", "jsonl")
    }
    assert uris["txt"] == [str(tmp_path / "two"), str(tmp_path / "lines.jpg")]
    assert uris["jsonl"] == [str(tmp_path / "two\nlines.jpg")]


# Tars


def test_source_reader_never_leaves_the_tar_for_the_file_that_a_member_names(
    tmp_path: Path,
) -> None:
    (tmp_path / "in").mkdir()
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"outside")
    names = ["../../secret.jpg", str(secret), "../secret.jpg", "./a/../../../secret.jpg", *NAMES]
    members = [
        (name, f"member {index}".encode(), tarfile.REGTYPE) for index, name in enumerate(names)
    ]
    (tmp_path / "in" / "a.tar").write_bytes(pack(*members))
    sources = list(list_sources(str(tmp_path / "in"), None, Storage()))
    # As they come to a worker.
    received = [decode_source(encode_source(source)) for source in sources]
    read = make_source_reader(received, Storage())
    assert [read(source.uri).decode() for source in received] == [
        f"member {index}" for index in range(len(names))
    ]
    assert [source.member.name for source in received if source.member] == names
    prefix = f"{tmp_path}/in/a.tar/"
    assert all(source.uri.startswith(prefix) for source in received)


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE],
)
def test_list_sources_passes_over_links_and_devices_called_like_images(
    tmp_path: Path, kind: bytes
) -> None:
    content = pack(("x.jpg", b"", kind), ("y.jpg", b"y", tarfile.REGTYPE))
    (tmp_path / "a.tar").write_bytes(content)
    found = list(list_sources(str(tmp_path / "a.tar"), None, Storage()))
    assert [source.uri for source in found] == [f"{tmp_path}/a.tar/y.jpg"]


# COCO


@pytest.mark.parametrize(
    "name", ["../x.jpg", "/etc/x.jpg", "a/../../x.jpg", "s3://b/x.jpg", "file:///x.jpg", "a\0.jpg"]
)
def test_list_sources_refuses_names_of_coco_that_lead_out(tmp_path: Path, name: str) -> None:
    truth: Mapping[str, Any] = {"images": [{"id": 1, "file_name": name}]}
    with pytest.raises(DatasetError, match=r"file_name '.*; expected a name relative to"):
        list(list_sources(str(tmp_path), truth, Storage()))


# Names that no file has


@pytest.mark.parametrize("uri", ["a\0b.jpg", "file:///a%00b.jpg", "a\ud800.jpg", "\udc7f"])
@pytest.mark.parametrize("action", ["read", "write", "list", "size", "stream", "delete"])
def test_storage_explains_local_names_that_no_file_has(
    action: str, uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_unreadable(action, uri)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("action", ["read", "write", "list", "size", "stream", "delete"])
def test_storage_explains_keys_that_are_no_text(s3_bucket: str, action: str) -> None:
    assert_unreadable(action, f"{s3_bucket}/a\ud800.jpg")


def assert_unreadable(action: str, uri: str) -> None:
    storage = Storage()
    actions: dict[str, Callable[[], object]] = {
        "read": lambda: storage.read_bytes(uri),
        "write": lambda: storage.write_bytes(uri, b""),
        "list": lambda: list(storage.list_files(uri)),
        "size": lambda: storage.size(uri),
        "stream": lambda: storage.open_writer(uri).__enter__(),
        "delete": lambda: storage.delete(uri),
    }
    with pytest.raises(UnreadableFileError, match=r"invalid Unicode|no valid Unicode") as caught:
        actions[action]()
    # The text can be written to a log and to JSON in any case.
    assert str(caught.value).encode()


def test_storage_reads_names_that_are_no_text_when_they_are_bytes_of_a_file(
    tmp_path: Path,
) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    Storage().write_bytes(join_uri(str(tmp_path), name), b"x")
    assert [os.fsencode(path.name) for path in tmp_path.iterdir()] == [b"caf\xe9.jpg"]
    assert Storage().read_bytes(join_uri(str(tmp_path), name)) == b"x"
    assert Storage().read_bytes(tmp_path.as_uri() + "/caf%E9.jpg") == b"x"
    with pytest.raises(StorageError, match="no such file"):
        Storage().read_bytes(tmp_path.as_uri() + "/caf%EA.jpg")


# Pictures


def test_follow_writes_pictures_below_the_run_whatever_ids_and_categories_are_called(
    files: RunFiles, tmp_path: Path
) -> None:
    names: dict[int | str, str] = dict(enumerate(HOSTILE))
    detections = tuple({**BOX, "category_id": index} for index in names)
    results = [
        ImageResult(ImageSource(name, "x"), height=40, width=60, detections=detections)
        for name in HOSTILE
    ]
    settings = PictureSettings(limit=NUM_HASHES, has_crops=True)
    pictures = RunPictures(files, settings, names=names, read=lambda _: paint())
    assert list(pictures.follow(results)) == results
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    run = Path("outer", "run")
    overlays = [path for path in written if path.parent == run / "overlays"]
    crops = [path for path in written if path.parent.parent == run / "crops"]
    # One overlay of each id, one folder of each category, one cut-out of each detection: no two
    # shared a name, and nothing else was written anywhere.
    assert len(overlays) == len(HOSTILE)
    assert len({path.parent for path in crops}) == len(HOSTILE)
    assert len(crops) == len(HOSTILE) ** 2
    assert len(written) == len(overlays) + len(crops)


def test_list_sources_refuses_a_coco_name_with_a_secret(tmp_path: Path) -> None:
    name = "x.jpg?X-Amz-Signature=0123abc"
    with pytest.raises(DatasetError, match="query of a presigned URL") as caught:
        list(list_sources(str(tmp_path), {"images": [{"id": 1, "file_name": name}]}, Storage()))
    assert "0123abc" not in str(caught.value)
    url = f"https://host/{name}"
    with pytest.raises(DatasetError, match="URL scheme") as caught:
        list(list_sources(str(tmp_path), {"images": [{"id": 1, "file_name": url}]}, Storage()))
    assert "0123abc" not in str(caught.value)


def test_list_sources_can_write_a_coco_name_that_is_no_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.jpg")).write_bytes(b"content")
    coco = {"images": [{"id": 1, "file_name": os.fsdecode(b"\xff.jpg")}]}
    (source,) = list_sources(str(tmp_path), coco, Storage())
    assert source.uri.encode("utf-8") == f"file://{tmp_path}/%FF.jpg".encode()
    assert Storage().read_bytes(source.uri) == b"content"
