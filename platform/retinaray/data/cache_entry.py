"""An entry of a cache as a file: header, description, content, and a checksum over the last two.

A file that was cut off, overwritten, or written for another key or by another program is refused.
Knows nothing of folders, limits, images or storage.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Mark and version of the format, bytes of the description, bytes of the content, CRC-32.
_HEADER = struct.Struct("<8sIQI")
_MARK = b"RRCACHE1"


@dataclass(frozen=True)
class Keepsake:
    """What is put into a cache, and comes back.

    Attributes:
        version: Names the state of the source: another state has another name.
        content: The bytes; a bytearray, which may be written to, when it comes back.
        numbers: What else the owner of the content wants to know, such as its shape.
    """

    version: str
    content: bytes | bytearray | memoryview
    numbers: tuple[int, ...] = ()


def pack_head(key: str, keepsake: Keepsake) -> bytes:
    """What stands in an entry's file before the content.

    Args:
        key: Under which the entry will be asked for.
        keepsake: The entry.
    """
    fields = {"key": key, "version": keepsake.version, "numbers": keepsake.numbers}
    description = json.dumps(fields).encode()
    checksum = zlib.crc32(keepsake.content, zlib.crc32(description))
    return _HEADER.pack(_MARK, len(description), len(keepsake.content), checksum) + description


def read_keepsake(descriptor: int, num_bytes: int, key: str) -> Keepsake:
    """Read an entry back.

    Args:
        descriptor: Of its file, open at the beginning.
        num_bytes: The file's length.
        key: Under which the entry was written.

    Raises:
        ValueError: If the file is no whole entry of this key; the text says in what way.
        OSError: If it cannot be read.
    """
    head = os.read(descriptor, _HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MARK):
        raise ValueError(f"expected a header that starts with {_MARK!r}, got {head[:8]!r}")
    _, description_bytes, content_bytes, checksum = _HEADER.unpack(head)
    expected = _HEADER.size + description_bytes + content_bytes
    # Held against the true length before anything of that size is allocated.
    if num_bytes != expected:
        raise ValueError(f"expected {expected} bytes by its header, it has {num_bytes}")
    description, content = bytearray(description_bytes), bytearray(content_bytes)
    for room in (memoryview(description), memoryview(content)):
        _fill(descriptor, room)
    if zlib.crc32(content, zlib.crc32(description)) != checksum:
        raise ValueError("its checksum does not fit its content")
    fields = json.loads(description)
    if fields["key"] != key:
        raise ValueError(f"expected the entry of {key!r}, it is that of {fields['key']!r}")
    return Keepsake(fields["version"], content, tuple(fields["numbers"]))


def write_whole(path: Path, parts: Iterable[bytes | bytearray | memoryview]) -> None:
    """Write parts one after the other over the beginning of a file that is there.

    Raises:
        OSError: If the disk has no room for them, or the file is gone.
    """
    with path.open("r+b", buffering=0) as file:
        for part in parts:
            rest = memoryview(part)
            # One call writes 2 GiB at most, and less when the disk is nearly full.
            while rest:
                rest = rest[file.write(rest) :]


def _fill(descriptor: int, room: memoryview) -> None:
    """Read until there is no room left; one call gives 2 GiB at most."""
    while room:
        count = os.readv(descriptor, [room])
        if not count:
            raise ValueError(f"it ends {len(room)} bytes early")
        room = room[count:]
