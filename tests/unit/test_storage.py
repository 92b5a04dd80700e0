from __future__ import annotations

import io
import os
import pickle
import resource
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from retinaray import s3_objects
from retinaray.errors import StorageError, UnreadableFileError
from retinaray.storage import (
    MissingFileError,
    Storage,
    is_s3,
    join_uri,
    local_path,
    split_s3_uri,
)

MIB = 2**20
ODD_NAMES = [
    "line\nend\r.jpg",
    "a#b.jpg",
    "a?b=c&d.jpg",
    "100%25 done.jpg",
    "plus+and space.jpg",
    "Zürich/日本/emoji😀.jpg",
    "decomposed-e\u0301.jpg",
    "quote'\"<tag>;:@$,!*().jpg",
    "part=1/day=2/x",
]


@pytest.fixture(params=["local", "file-uri", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder of each kind that the one contract below holds for."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3_bucket"))
    return tmp_path.as_uri() if request.param == "file-uri" else str(tmp_path)


def write_all(storage: Storage, uris: list[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda uri: storage.write_bytes(uri, b"x"), uris))


def fail_after_writing(storage: Storage, uri: str, num_bytes: int) -> None:
    with storage.open_writer(uri) as writer:
        writer.write(bytes(num_bytes))
        raise KeyboardInterrupt


# The contract, the same for every place


@pytest.mark.parametrize("content", [b"", b"a", bytes(range(256)) * 4096], ids=["0", "1", "1MiB"])
def test_write_bytes_gives_back_what_was_written(place: str, content: bytes) -> None:
    storage, uri = Storage(), join_uri(place, "new/folder", "x.bin")
    assert storage.write_bytes(uri, content)
    assert storage.read_bytes(uri) == content
    assert storage.size(uri) == len(content)
    with storage.open_reader(uri) as reader:
        assert reader.read() == content


def test_write_bytes_replaces_an_older_file(place: str) -> None:
    storage, uri = Storage(), join_uri(place, "x")
    storage.write_bytes(uri, b"old and longer")
    assert storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"new"


def test_write_bytes_never_shows_a_part_when_read_meanwhile(place: str) -> None:
    storage, uri = Storage(), join_uri(place, "x")
    contents = [b"a" * 300_000, b"b" * 200_000]
    storage.write_bytes(uri, contents[0])
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(
            lambda: [storage.write_bytes(uri, contents[n % 2]) for n in range(40)]
        )
        while not writing.done():
            assert storage.read_bytes(uri) in contents
        assert writing.result() == [True] * 40


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_are_literal_when_odd(place: str, name: str) -> None:
    storage, uri = Storage(), join_uri(place, "odd", name)
    storage.write_bytes(uri, name.encode())
    assert storage.exists(uri)
    assert list(storage.list_files(join_uri(place, "odd"))) == [uri]
    assert storage.read_bytes(uri) == name.encode()
    storage.delete(uri)
    assert not storage.exists(uri)


def test_write_bytes_has_one_winner_when_sixteen_threads_claim_a_file(place: str) -> None:
    storage, uri = Storage(), join_uri(place, "claim")
    barrier = threading.Barrier(16)

    def claim(number: int) -> bool:
        barrier.wait()
        return storage.write_bytes(uri, b"%d" % number, only_if_absent=True)

    with ThreadPoolExecutor(16) as pool:
        wins = list(pool.map(claim, range(16)))
    assert wins.count(True) == 1
    assert storage.read_bytes(uri) == b"%d" % wins.index(True)
    assert list(storage.list_files(place)) == [uri]


def test_write_bytes_leaves_an_existing_file_when_only_if_absent(place: str) -> None:
    storage, uri = Storage(), join_uri(place, "claim")
    storage.write_bytes(uri, b"first")
    assert not storage.write_bytes(uri, b"second", only_if_absent=True)
    assert storage.read_bytes(uri) == b"first"


def test_open_writer_shows_the_file_only_at_the_end_when_larger_than_a_part(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_objects, "PART_BYTES", 5 * MIB)
    storage, uri = Storage(), join_uri(place, "deep", "big")
    block = bytes(range(256)) * (MIB // 256)
    with storage.open_writer(uri) as writer:
        for _ in range(11):
            assert writer.write(block) == MIB
        assert not storage.exists(uri)
        assert list(storage.list_files(place)) == []
    assert storage.size(uri) == 11 * MIB
    assert storage.read_bytes(uri) == block * 11


def test_open_writer_takes_text_when_wrapped(place: str) -> None:
    storage, uri = Storage(), join_uri(place, "text")
    with storage.open_writer(uri) as writer:
        text = io.TextIOWrapper(writer, encoding="utf-8")
        text.write("Zürich\n")
        text.close()
    assert storage.read_bytes(uri) == "Zürich\n".encode()


@pytest.mark.parametrize("num_mib", [1, 11])
def test_open_writer_keeps_the_older_file_when_the_block_fails(
    place: str, num_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_objects, "PART_BYTES", 5 * MIB)
    storage, old, new = Storage(), join_uri(place, "old"), join_uri(place, "new")
    storage.write_bytes(old, b"old content")
    for uri in (old, new):
        with pytest.raises(KeyboardInterrupt):
            fail_after_writing(storage, uri, num_mib * MIB)
    assert storage.read_bytes(old) == b"old content"
    assert list(storage.list_files(place)) == [old]


def test_list_files_is_recursive_and_in_key_order(place: str) -> None:
    storage = Storage()
    names = ["a/1.jpg", "a/b/2.jpg", "a/b/c/3.jpg", "b.jpg", "z/10.jpg", "z/9.jpg", "é.jpg"]
    uris = [join_uri(place, name) for name in names]
    write_all(storage, uris[::-1])
    assert list(storage.list_files(place)) == uris
    assert list(storage.list_files(place + "/")) == [join_uri(place + "/", n) for n in names]
    assert list(storage.list_files(join_uri(place, "a"))) == uris[:3]


def test_list_files_leaves_out_neighbours_of_the_prefix(place: str) -> None:
    storage = Storage()
    write_all(storage, [join_uri(place, n) for n in ("img/a", "img2/x", "img-3", "im")])
    assert list(storage.list_files(join_uri(place, "img"))) == [join_uri(place, "img/a")]
    assert list(storage.list_files(join_uri(place, "im"))) == [join_uri(place, "im")]


def test_list_files_gives_nothing_when_the_folder_is_absent(place: str) -> None:
    assert list(Storage().list_files(join_uri(place, "absent"))) == []


def test_list_files_gives_every_file_once_when_there_are_more_than_a_page(place: str) -> None:
    storage = Storage()
    uris = [join_uri(place, "many", f"{number:04}") for number in range(1003)]
    write_all(storage, uris)
    assert list(storage.list_files(place)) == uris


def test_list_entries_tells_lengths_and_dates(place: str) -> None:
    storage, start_s = Storage(), time.time()
    for name, content in (("b", b"12345"), ("a/1", b""), ("a/2", b"x")):
        storage.write_bytes(join_uri(place, name), content)
    entries = list(storage.list_entries(place))
    wanted = [("a/1", 0), ("a/2", 1), ("b", 5)]
    assert [(e.uri, e.num_bytes) for e in entries] == [(join_uri(place, n), s) for n, s in wanted]
    # S3 gives whole seconds.
    assert all(start_s - 2 < entry.modified_s < time.time() + 2 for entry in entries)
    assert list(storage.list_entries(join_uri(place, "b"))) == entries[2:]
    assert list(storage.list_entries(join_uri(place, "absent"))) == []


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 1000), (7, 0), (999, 1), (123, 456)])
def test_read_range_gives_these_bytes_and_no_others(place: str, start: int, length: int) -> None:
    storage, uri = Storage(), join_uri(place, "x")
    content = os.urandom(1000)
    storage.write_bytes(uri, content)
    assert storage.read_range(uri, start, length) == content[start : start + length]


@pytest.mark.parametrize(("start", "length"), [(990, 11), (1000, 1), (2000, 5)])
def test_read_range_says_so_when_the_file_ends_before(place: str, start: int, length: int) -> None:
    storage, uri = Storage(), join_uri(place, "x")
    storage.write_bytes(uri, bytes(1000))
    with pytest.raises(StorageError, match=r"cannot read .*x: .*(shorter|ends before).*list it"):
        storage.read_range(uri, start, length)


def test_read_range_refuses_what_is_no_range_or_no_file(place: str) -> None:
    storage = Storage()
    with pytest.raises(ValueError, match=r"expected a range from 0 on in .*, got 5 at -1"):
        storage.read_range(join_uri(place, "x"), -1, 5)
    with pytest.raises(MissingFileError, match="no such"):
        storage.read_range(join_uri(place, "x"), 0, 5)


def test_missing_file_is_told_apart_from_other_failures(place: str) -> None:
    storage, uri = Storage(), join_uri(place, "absent.jpg")
    with pytest.raises(MissingFileError, match=r"cannot read .*absent\.jpg: no such .*; check"):
        storage.read_bytes(uri)
    with pytest.raises(MissingFileError, match="no such"):
        storage.size(uri)
    with pytest.raises(MissingFileError, match="no such"), storage.open_reader(uri):
        pass
    assert not storage.exists(uri)
    storage.delete(uri)


def test_exists_is_false_when_the_name_is_a_folder(place: str) -> None:
    storage = Storage()
    storage.write_bytes(join_uri(place, "folder", "x"), b"x")
    assert not storage.exists(join_uri(place, "folder"))


def test_open_reader_seeks(place: str) -> None:
    storage, uri = Storage(), join_uri(place, "x")
    content = os.urandom(3 * MIB)
    storage.write_bytes(uri, content)
    with storage.open_reader(uri) as reader:
        assert reader.seek(-5, io.SEEK_END) == 3 * MIB - 5
        assert reader.read() == content[-5:]
        assert reader.read(1) == b""
        reader.seek(2 * MIB + 7)
        assert reader.read(10) == content[2 * MIB + 7 : 2 * MIB + 17]
        assert reader.tell() == 2 * MIB + 17
        reader.seek(0)
        assert reader.read() == content


def test_storage_pickles_when_its_client_is_in_use(place: str) -> None:
    storage, uri = Storage(), join_uri(place, "x")
    storage.write_bytes(uri, b"content")
    copy = pickle.loads(pickle.dumps(storage))
    assert copy == storage
    assert copy.read_bytes(uri) == b"content"


def test_storage_works_in_a_forked_process(place: str) -> None:
    storage, uri = Storage(), join_uri(place, "x")
    storage.write_bytes(uri, b"content")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork itself, from Python 3.12 on
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if storage.read_bytes(uri) == b"content" else 2
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


# The local disk alone


def test_list_files_sorts_whole_names_and_not_folder_by_folder(tmp_path: Path) -> None:
    # "-" (0x2d) < "." (0x2e) < "/" (0x2f) < "0" (0x30), as S3 would list the same keys.
    names = ["a-b/x", "a.jpg", "a/x", "a0"]
    write_all(Storage(), [str(tmp_path / name) for name in names])
    assert list(Storage().list_files(str(tmp_path))) == [str(tmp_path / name) for name in names]


def test_list_files_follows_links_once_when_they_lead_back(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(b"x")
    (tmp_path / "images" / "loop").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "images")
    found = [str(Path(uri).relative_to(tmp_path)) for uri in Storage().list_files(str(tmp_path))]
    assert found == ["images/1.jpg", "linked/1.jpg"]


def test_list_entries_describes_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "dead.jpg").symlink_to(tmp_path / "absent")
    (entry,) = Storage().list_entries(str(tmp_path))
    assert entry.uri == str(tmp_path / "dead.jpg")
    with pytest.raises(MissingFileError, match=r"dead\.jpg"):
        Storage().read_bytes(entry.uri)


def test_list_files_hides_what_a_killed_writer_left(tmp_path: Path) -> None:
    program = (
        "import os, sys; from retinaray.storage import Storage\n"
        "with Storage().open_writer(sys.argv[1]) as writer:\n"
        "    writer.write(b'half'); writer.flush(); os._exit(9)"
    )
    uri = str(tmp_path / "x.json")
    assert subprocess.run([sys.executable, "-c", program, uri], check=False).returncode == 9
    assert len(list(tmp_path.iterdir())) == 1
    assert list(Storage().list_files(str(tmp_path))) == []
    assert Storage().write_bytes(uri, b"whole", only_if_absent=True)


def test_open_writer_explains_and_leaves_nothing_when_the_disk_takes_no_more(
    tmp_path: Path,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        with (
            pytest.raises(StorageError, match=r"cannot write .*File too large; check the disk's"),
            Storage().open_writer(str(tmp_path / "x")) as writer,
        ):
            writer.write(bytes(2 * MIB))
        with pytest.raises(StorageError, match="File too large"):
            Storage().write_bytes(str(tmp_path / "x"), bytes(2 * MIB))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_local_failure_says_so_when_the_name_is_a_folder(tmp_path: Path) -> None:
    storage, uri = Storage(), str(tmp_path)
    with pytest.raises(StorageError, match=r"cannot read .*it is a folder; name a file"):
        storage.read_bytes(uri)
    with pytest.raises(StorageError, match="it is a folder"), storage.open_reader(uri):
        pass
    with pytest.raises(StorageError, match="it is a folder"):
        storage.write_bytes(uri, b"x")


def test_write_bytes_says_so_when_a_folder_of_the_path_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for name in ("file/x", "file/sub/x"):
        with pytest.raises(StorageError, match="cannot write") as caught:
            Storage().write_bytes(str(tmp_path / name), b"x")
        assert not isinstance(caught.value, MissingFileError)
    assert not Storage().exists(str(tmp_path / "file/x"))


# URIs


@pytest.mark.parametrize(
    ("base", "parts", "joined"),
    [
        ("s3://b", ("x",), "s3://b/x"),
        ("s3://b/p/", ("/q/", "a b.jpg"), "s3://b/p/q/a b.jpg"),
        ("s3://b/p#1", ("c?d",), "s3://b/p#1/c?d"),
        ("/data", ("a", "b"), "/data/a/b"),
        ("/", ("a",), "/a"),
        ("", ("/a", "b"), "/a/b"),
        ("", ("a",), "a"),
        ("file:///d", ("a b#1",), "file:///d/a%20b%231"),
        ("/data", (), "/data"),
    ],
)
def test_join_uri_puts_one_slash_between(base: str, parts: tuple[str, ...], joined: str) -> None:
    assert join_uri(base, *parts) == joined


def test_split_s3_uri_takes_the_key_literally() -> None:
    assert split_s3_uri("s3://b/k/a?b#c%20d//e") == ("b", "k/a?b#c%20d//e")
    assert split_s3_uri("s3://b") == ("b", "")
    for wrong in ("s3://", "s3:///k", "/b/k"):
        with pytest.raises(StorageError, match="expected s3://bucket/key, got"):
            split_s3_uri(wrong)


def test_local_path_reads_percent_signs_only_in_file_uris() -> None:
    assert local_path("file:///a%20b") == Path("/a b")
    assert local_path("file://localhost/a") == Path("/a")
    assert local_path("/a%20b") == Path("/a%20b")
    assert is_s3("s3://b/k")
    assert not is_s3("/s3://b/k")


@pytest.mark.parametrize("uri", ["gs://b/k", "https://x/y.jpg", "s3:/b/k", "S3://b/k", ""])
def test_storage_refuses_a_scheme_it_does_not_know(uri: str) -> None:
    with pytest.raises(StorageError, match=r"expected a local path.*copy the data"):
        Storage().read_bytes(uri)


def test_storage_refuses_a_uri_that_names_no_file() -> None:
    with pytest.raises(StorageError, match="expected file:///absolute/path, got 'file://x/y'"):
        Storage().write_bytes("file://x/y", b"")
    with pytest.raises(StorageError, match="name an object in the bucket"):
        Storage().read_bytes("s3://bucket")


def test_missing_file_error_pickles() -> None:
    copy = pickle.loads(pickle.dumps(MissingFileError("cannot read x")))
    assert isinstance(copy, MissingFileError)
    assert str(copy) == "cannot read x"


def test_import_of_storage_loads_no_s3_library() -> None:
    program = (
        "import sys, retinaray.storage; print({'boto3', 'botocore', 'urllib3'} & {*sys.modules})"
    )
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout
    assert output.strip() == b"set()"


def test_read_bytes_refuses_a_long_file_before_it_is_read(place: str) -> None:
    uri = f"{place}/file"
    Storage().write_bytes(uri, b"0123456789")
    assert Storage().read_bytes(uri, max_bytes=10) == b"0123456789"
    with pytest.raises(UnreadableFileError, match="has 10 bytes, expected at most 9"):
        Storage().read_bytes(uri, max_bytes=9)


def test_read_range_blames_the_file_when_it_became_shorter(place: str) -> None:
    uri = f"{place}/file"
    Storage().write_bytes(uri, b"0123456789")
    for start in (8, 100):
        with pytest.raises(UnreadableFileError, match="list it again"):
            Storage().read_range(uri, start, 5)
