"""Where members lie in tars of every kind, and that no damaged tar passes as a shorter one."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retinaray.errors import DatasetError
from retinaray.inference.pipeline import TarMember
from retinaray.inference.tar_shards import TarIndex

BLOCK = 512
LONG = "a/" * 60 + "b" * 140 + ".jpg"
NAMES = [
    "a.jpg",
    "./b c#1 ?.png",
    "é/日本.webp",
    LONG,
    "../../etc/passwd.jpg",
    "/abs.jpg",
    "x\ny.jpg",
]
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def pack(names: list[str], tar_format: int = tarfile.PAX_FORMAT, **options: Any) -> bytes:
    """A tar whose members hold 0, 300, 600, ... bytes of their own."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format, **options) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 300 * number
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
    return stream.getvalue()


def list_members(content: bytes) -> list[TarMember]:
    return list(TarIndex(io.BytesIO(content), len(content), "s3://b/x.tar").members())


@pytest.mark.parametrize("tar_format", FORMATS, ids=["ustar", "gnu", "pax"])
def test_members_agree_with_tarfile(tar_format: int) -> None:
    # ustar has no room for names of which the last part is over 100 bytes.
    names = [name for name in NAMES if tar_format != tarfile.USTAR_FORMAT or name != LONG]
    names += ["a/" * 60 + "c.jpg"]
    content = pack(names, tar_format)
    members = list_members(content)
    assert [member.name for member in members] == names
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        wanted = [(m.name, m.offset_data, m.size) for m in tar.getmembers()]
    assert [(m.name, m.offset, m.num_bytes) for m in members] == wanted
    for number, member in enumerate(members):
        data = content[member.offset : member.offset + member.num_bytes]
        assert data == bytes([number]) * (300 * number)
        assert member.shard == "s3://b/x.tar"


def test_members_passes_over_folders_and_links() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for kind, name in [
            (tarfile.DIRTYPE, "folder"),
            (tarfile.SYMTYPE, "link.jpg"),
            (tarfile.LNKTYPE, "hard.jpg"),
            (tarfile.FIFOTYPE, "pipe.jpg"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("last.jpg"))
    assert [member.name for member in list_members(stream.getvalue())] == ["last.jpg"]


def test_members_takes_the_size_from_a_pax_header_and_names_from_a_global_one() -> None:
    content = pack(["a.jpg", "b.jpg"], pax_headers={"comment": "made by hand"})
    assert [member.num_bytes for member in list_members(content)] == [0, 300]
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = 5
        info.pax_headers = {"size": "5", "mtime": "1.5"}
        tar.addfile(info, io.BytesIO(b"12345"))
    (member,) = list_members(stream.getvalue())
    assert (member.name, member.num_bytes) == ("a.jpg", 5)


def test_members_reads_lengths_in_base_256() -> None:
    content = bytearray(pack(["a.jpg", "b.jpg"], tarfile.GNU_FORMAT))
    # The header of b.jpg follows the empty a.jpg; 300 = 0x012c behind GNU's mark.
    header = content[BLOCK : 2 * BLOCK]
    header[124:136] = b"\x80" + (300).to_bytes(11, "big")
    content[BLOCK : 2 * BLOCK] = with_sum(header)
    assert [member.num_bytes for member in list_members(bytes(content))] == [0, 300]


def with_sum(header: bytearray) -> bytearray:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header


def test_members_accepts_sums_of_signed_bytes() -> None:
    content = bytearray(pack(["é.jpg"], tarfile.GNU_FORMAT))
    header = content[:BLOCK]
    header[148:156] = b" " * 8
    # "é" has two bytes above 127.
    header[148:156] = b"%06o\0 " % (sum(header) - 2 * 256)
    content[:BLOCK] = header
    assert [member.name for member in list_members(bytes(content))] == ["é.jpg"]


def test_members_writes_names_that_are_no_text_as_text() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo(os.fsdecode(b"Z\xfcrich.jpg")))
    assert [member.name for member in list_members(stream.getvalue())] == ["Z\\xfcrich.jpg"]


def test_members_passes_over_long_members_without_reading_them() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in ("a.jpg", "b.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 6 * 2**20
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    num_read = 0

    class Counting(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            nonlocal num_read
            data = super().read(size)
            num_read += len(data)
            return data

    content = stream.getvalue()
    index = TarIndex(Counting(content), len(content), "x.tar")
    assert [member.name for member in index.members()] == ["a.jpg", "b.jpg"]
    assert num_read < 20_000


def cut(num_bytes: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:num_bytes]


def change(position: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:position] + value + content[position + len(value) :]


# Three members of 0, 300 and 600 bytes: headers at 0, 512, 1536; content to 3072; then zeros.
@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (cut(0), r"end of the file instead of a header.*\(byte 0\)"),
        (cut(100), r"end of the file instead of a header"),
        (cut(700), r"end of the file instead of a header.*\(byte 512\)"),
        (cut(1030), r"'b\.jpg' with 300 bytes, but the file ends at byte 1030: it was cut short"),
        (cut(1500), r"instead of a header"),  # b.jpg is whole, its padding is not
        (cut(1536), r"instead of a header or the mark of the end: it was cut short"),
        (cut(2500), r"'c\.jpg' with 600 bytes, but the file ends at byte 2500"),
        (cut(3072), r"instead of a header or the mark of the end"),
        (change(0, b"\x89PNG"), r"no tar header, or a damaged one.*\(byte 0\)"),
        (change(512, b"B"), r"no tar header, or a damaged one.*\(byte 512\)"),
        (change(1536 + 148, b"xxxxxx"), r"no tar header.*\(byte 1536\)"),
        (lambda content: content + pack(["d.jpg"]), r"tars that were joined must be listed singly"),
        (lambda _: b"\x1f\x8b" + bytes(600), r"no tar header"),
    ],
)
def test_members_refuses_a_damaged_tar(damage: Callable[[bytes], bytes], text: str) -> None:
    content = pack(["a.jpg", "b.jpg", "c.jpg"], tarfile.USTAR_FORMAT)
    assert len(list_members(content)) == 3
    with pytest.raises(DatasetError, match=rf"s3://b/x\.tar: expected a whole tar, found .*{text}"):
        list_members(damage(content))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (b"\xff" * 12, "a header without a valid length"),  # minus one
        (b"99999999999\0", "a header without a valid length"),
        (b"\x80" + b"\x7f" * 11, "but the file ends at byte"),
    ],
)
def test_members_refuses_an_impossible_length(size: bytes, text: str) -> None:
    content = bytearray(pack(["a.jpg"], tarfile.USTAR_FORMAT))
    content[124:136] = size
    content[:BLOCK] = with_sum(content[:BLOCK])
    with pytest.raises(DatasetError, match=text):
        list_members(bytes(content))


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (b"30 path=a.jpg\n", "a damaged extended header"),
        (b"3 path=a.jpg\n", "a damaged extended header"),
        (b"nonsense", "a damaged extended header"),
        (b"9" * 5000 + b" path=a.jpg\n", "a damaged extended header"),
        (b"16 size=1234567", "a damaged extended header"),  # no line end
        (b"11 size=-1\n", "a member of '-1' bytes"),
        (b"12 size=1e9\n", "a member of '1e9' bytes"),
        (b"19 size=9999999999\n", "but the file ends at byte"),
        (b"22 GNU.sparse.major=1\n", "the sparse file"),
    ],
)
def test_members_refuses_a_damaged_pax_header(record: bytes, text: str) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("pax")
        info.type, info.size = tarfile.XHDTYPE, len(record)
        tar.addfile(info, io.BytesIO(record))
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(DatasetError, match=text):
        list_members(stream.getvalue())


def test_members_refuses_an_extended_header_that_would_fill_the_memory() -> None:
    content = bytearray(pack(["x" * 120 + ".jpg"], tarfile.GNU_FORMAT))
    content[124:136] = b"\x80" + (2**60).to_bytes(11, "big")
    content[:BLOCK] = with_sum(content[:BLOCK])
    with pytest.raises(DatasetError, match=f"an extended header of {2**60} bytes"):
        list_members(bytes(content))


def test_members_reads_what_gnu_tar_writes(tmp_path: Path, shared_data: Path) -> None:
    """A real tool of which this machine has some version; Python's writer is only one."""
    import shutil
    import subprocess

    program = shutil.which("tar")
    if program is None:
        pytest.skip("needs the program tar, which is not installed")
    images = shared_data / "odd_images" / "images"
    subprocess.run([program, "-cf", tmp_path / "x.tar", "-C", images, "."], check=True)
    content = (tmp_path / "x.tar").read_bytes()
    found = {m.name.removeprefix("./"): m for m in list_members(content)}
    assert set(found) == {path.name for path in images.iterdir() if path.is_file()}
    for name, member in found.items():
        data = content[member.offset : member.offset + member.num_bytes]
        assert data == (images / name).read_bytes()
