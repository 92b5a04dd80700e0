"""Where the members of a tar lie, so that each can be read without the others (WebDataset shards).

Reads headers only, strictly: what `tar` passes over (a broken header, an archive without its end)
would mean images that are lost without a word. ustar, GNU and pax headers are understood. Names are
names: nothing is ever extracted.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import BinaryIO

from retinaray.errors import DatasetError
from retinaray.inference.pipeline import TarMember

_BLOCK = 512
_READ_BYTES = 2**20
# Up to here reading on is sooner than asking the server for another range.
_LARGEST_READ_OVER = 4 * 2**20
# Longer extended headers are no file names.
_LARGEST_EXTENSION = 2**20
_MOST_DIGITS = 32
_REGULAR = frozenset(b"0\x007")
_WITHOUT_CONTENT = frozenset(b"123456")
_LONG_NAME, _LONG_LINK, _SPARSE = ord("L"), ord("K"), ord("S")
_PAX, _PAX_OLD, _PAX_GLOBAL = ord("x"), ord("X"), ord("g")


@dataclass(frozen=True)
class _Header:
    kind: int
    name: str
    num_bytes: int


class TarIndex:
    """Reads the headers of one tar, from its beginning to its end.

    Args:
        reader: At the start of the tar; it is read forward, long members are passed over by `seek`.
        num_bytes: Length of the whole file.
        uri: Of the tar, for the members and for messages.
    """

    def __init__(self, reader: BinaryIO, num_bytes: int, uri: str) -> None:
        self._reader, self._num_bytes, self._uri = reader, num_bytes, uri
        self._position = 0
        self._defaults: dict[str, str] = {}

    def members(self) -> Generator[TarMember, None, None]:
        """The regular files in the tar, in its order; folders and links are passed over.

        Raises:
            DatasetError: If it is no tar, is damaged, ends early, or holds sparse files.
            StorageError: If it cannot be read.
        """
        extension: dict[str, str] = {}
        while (header := self._read_header()) is not None:
            if header.kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_OLD, _PAX_GLOBAL):
                extension |= self._read_extension(header)
                continue
            header = self._complete(header, self._defaults | extension)
            extension = {}
            start = self._position
            if header.kind in _REGULAR and not header.name.endswith("/"):
                self._expect_content(header)
                yield TarMember(self._uri, header.name, start, header.num_bytes)
            if header.kind not in _WITHOUT_CONTENT:
                self._expect_content(header)
                self._skip(_round_up(header.num_bytes))
        self._expect_end()

    def _read_header(self) -> _Header | None:
        """The next header, or none at the mark of the end."""
        block = self._read(_BLOCK, "a header")
        if not any(block):
            return None
        if not _has_valid_sum(block):
            raise self._refuse(
                "no tar header, or a damaged one (its sum is wrong)", at=self._position - _BLOCK
            )
        num_bytes = _parse_number(block[124:136])
        if num_bytes is None:
            raise self._refuse("a header without a valid length", at=self._position - _BLOCK)
        name = _decode(block[:100])
        if block[257:263] == b"ustar\0" and block[345] and block[156] not in (_PAX, _PAX_GLOBAL):
            name = f"{_decode(block[345:500])}/{name}"
        return _Header(block[156], name, num_bytes)

    def _read_extension(self, header: _Header) -> dict[str, str]:
        """What a header of GNU or pax says of the member that follows it."""
        if header.num_bytes > _LARGEST_EXTENSION:
            raise self._refuse(f"an extended header of {header.num_bytes} bytes")
        start = self._position
        content = self._read(_round_up(header.num_bytes), "an extended header")
        content = content[: header.num_bytes]
        if header.kind == _LONG_LINK:
            return {}
        if header.kind == _LONG_NAME:
            return {"path": _decode(content)}
        values = _parse_pax(content)
        if values is None:
            raise self._refuse("a damaged extended header", at=start)
        if header.kind == _PAX_GLOBAL:
            self._defaults |= values
            return {}
        return values

    def _complete(self, header: _Header, extension: dict[str, str]) -> _Header:
        if header.kind == _SPARSE or any(key.startswith("GNU.sparse") for key in extension):
            raise self._refuse(f"the sparse file {header.name!r}; pack it without --sparse")
        length = extension.get("size", str(header.num_bytes))
        if not (length.isascii() and length.isdecimal() and len(length) <= _MOST_DIGITS):
            raise self._refuse(f"a member of {length[:_MOST_DIGITS]!r} bytes")
        return _Header(header.kind, extension.get("path", header.name), int(length))

    def _expect_content(self, header: _Header) -> None:
        if self._position + header.num_bytes > self._num_bytes:
            raise self._refuse(
                f"{header.name!r} with {header.num_bytes} bytes, but the file ends at byte "
                f"{self._num_bytes}: it was cut short"
            )

    def _expect_end(self) -> None:
        """After the mark of the end there are zeros, and nothing else."""
        while block := self._reader.read(_READ_BYTES):
            if any(block):
                raise self._refuse(
                    "more content after the end of the archive: tars that were joined must be "
                    "listed singly"
                )
            self._position += len(block)

    def _read(self, num_bytes: int, what: str) -> bytes:
        data = self._reader.read(num_bytes)
        if len(data) < num_bytes:
            raise self._refuse(
                f"the end of the file instead of {what} or the mark of the end: it was cut short, "
                "or its writer was not closed"
            )
        self._position += num_bytes
        return data

    def _skip(self, num_bytes: int) -> None:
        # The padding of the last member may be missing; the next header then is.
        end = min(self._position + num_bytes, self._num_bytes)
        if end - self._position > _LARGEST_READ_OVER:
            self._reader.seek(end)
        else:
            self._reader.read(end - self._position)
        self._position = end

    def _refuse(self, found: str, *, at: int | None = None) -> DatasetError:
        position = self._position if at is None else at
        return DatasetError(
            f"{self._uri}: expected a whole tar, found {found} (byte {position}); "
            "write it again, or leave it out"
        )


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // _BLOCK) * _BLOCK


def _decode(field: bytes) -> str:
    """A name; bytes that are no UTF-8 are escaped, for names must stay text."""
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _parse_octal(field: bytes) -> int | None:
    text = field.partition(b"\0")[0].strip()
    if not text:
        return 0
    return int(text, 8) if all(byte in b"01234567" for byte in text) else None


def _parse_number(field: bytes) -> int | None:
    """A length: octal digits, or GNU's base 256 after a byte 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return _parse_octal(field)


def _has_valid_sum(block: bytes) -> bool:
    """Whether a header's sum is right, its own field taken as blanks.

    Some programs added the bytes as signed numbers.
    """
    wanted = _parse_octal(block[148:156])
    unsigned = sum(block[:148]) + sum(block[156:]) + 8 * ord(" ")
    if unsigned == wanted:
        return True
    return wanted == unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def _parse_pax(content: bytes) -> dict[str, str] | None:
    """Records of a length, a key and a value; none when they are damaged."""
    values: dict[str, str] = {}
    while content.strip(b"\0"):
        digits, blank, _ = content.partition(b" ")
        if not blank or not digits.isdigit() or len(digits) > _MOST_DIGITS:
            return None
        if not len(digits) + 3 <= int(digits) <= len(content):
            return None
        record, content = content[len(digits) + 1 : int(digits)], content[int(digits) :]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            return None
        values[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "backslashreplace")
    return values
