"""The format of a cache entry, byte by byte, and every way in which a file is not one."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from retinaray.data.cache_entry import Keepsake, pack_head, read_keepsake, write_whole

KEY = "file s3://bucket/a b.jpg"
KEEPSAKE = Keepsake("v1", b"pixels", (2, 3))
DESCRIPTION = b'{"key": "file s3://bucket/a b.jpg", "version": "v1", "numbers": [2, 3]}'


@pytest.fixture
def read_back(tmp_path: Path) -> Callable[..., Keepsake]:
    """Read these bytes as the file of an entry: read_back(data, key)."""

    def read(data: bytes, key: str = KEY) -> Keepsake:
        path = tmp_path / "entry"
        path.write_bytes(data)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return read_keepsake(descriptor, len(data), key)
        finally:
            os.close(descriptor)

    return read


def test_pack_head_writes_mark_lengths_checksum_and_description() -> None:
    checksum = zlib.crc32(DESCRIPTION + b"pixels")
    lengths = (len(DESCRIPTION)).to_bytes(4, "little") + (6).to_bytes(8, "little")
    expected = b"RRCACHE1" + lengths + checksum.to_bytes(4, "little") + DESCRIPTION
    assert pack_head(KEY, KEEPSAKE) == expected


@pytest.mark.parametrize(
    "keepsake",
    [KEEPSAKE, Keepsake("", b""), Keepsake('"e-tag" 12', bytes(range(256)) * 999, (1, 2, 3, 4))],
    ids=["small", "empty", "large"],
)
def test_read_keepsake_gives_what_was_written(
    read_back: Callable[..., Keepsake], keepsake: Keepsake, tmp_path: Path
) -> None:
    found = read_back(pack_head(KEY, keepsake) + bytes(keepsake.content))
    assert found == keepsake
    assert isinstance(found.content, bytearray), "pixels may be written to"


def test_read_keepsake_keeps_keys_that_are_no_text(read_back: Callable[..., Keepsake]) -> None:
    key = os.fsdecode(b"file /data/\xff\xe9.jpg")
    assert read_back(pack_head(key, KEEPSAKE) + b"pixels", key) == KEEPSAKE


@pytest.mark.parametrize("position", range(0, 24 + len(DESCRIPTION) + 6, 5))
def test_read_keepsake_refuses_a_changed_byte(
    read_back: Callable[..., Keepsake], position: int
) -> None:
    data = bytearray(pack_head(KEY, KEEPSAKE) + b"pixels")
    data[position] ^= 0x10
    with pytest.raises(ValueError, match=r"header that starts|bytes by its header|checksum"):
        read_back(bytes(data))


@pytest.mark.parametrize("num_bytes", [0, 7, 23, 24, 60, 24 + len(DESCRIPTION) + 5])
def test_read_keepsake_refuses_a_file_that_was_cut_off(
    read_back: Callable[..., Keepsake], num_bytes: int
) -> None:
    data = pack_head(KEY, KEEPSAKE) + b"pixels"
    with pytest.raises(ValueError, match=r"expected (a header|101 bytes by its header)"):
        read_back(data[:num_bytes])


def test_read_keepsake_refuses_what_was_written_for_another_key(
    read_back: Callable[..., Keepsake],
) -> None:
    with pytest.raises(ValueError, match=r"entry of 'other', it is that of 'file s3://bucket/a b"):
        read_back(pack_head(KEY, KEEPSAKE) + b"pixels", "other")


def test_read_keepsake_refuses_a_length_before_it_takes_memory(
    read_back: Callable[..., Keepsake],
) -> None:
    huge = struct.pack("<8sIQI", b"RRCACHE1", 2, 1 << 62, 0) + b"{}"
    with pytest.raises(ValueError, match=r"expected 4611686018427387930 bytes by .*, it has 26"):
        read_back(huge)


def test_read_keepsake_refuses_a_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    data = pack_head(KEY, KEEPSAKE) + b"pixels"
    path = tmp_path / "entry"
    path.write_bytes(data[:-2])
    descriptor = os.open(path, os.O_RDONLY)
    with pytest.raises(ValueError, match="it ends 2 bytes early"):
        read_keepsake(descriptor, len(data), KEY)
    os.close(descriptor)


def test_write_whole_writes_the_parts_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "entry"
    path.write_bytes(bytes(5))
    write_whole(path, (b"ab", memoryview(b"cde")))
    assert path.read_bytes() == b"abcde"
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "gone", (b"ab",))
