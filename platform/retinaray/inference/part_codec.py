"""Rows of a part as bytes and back: JSON lines, plain, gzip or zstd, told apart by the name.

Compressed bytes depend on the content alone: no time, no name stands in them.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, cast

from retinaray.errors import StorageError

Compression = Literal["none", "gzip", "zstd"]
SUFFIXES: dict[Compression, str] = {"none": "", "gzip": ".gz", "zstd": ".zst"}

Row = dict[str, Any]

# A gzip header and trailer round the deflated data; its time is 0.
_GZIP_WINDOW = 16 + zlib.MAX_WBITS
_GZIP_LEVEL = 6


def compression_of(name: str) -> Compression:
    """How a file is compressed, by the end of its name."""
    for compression, suffix in SUFFIXES.items():
        if suffix and name.lower().endswith(suffix):
            return compression
    return "none"


def encode_rows(rows: Iterable[Row], compression: Compression = "none") -> bytes:
    """One line of JSON per row."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    out = io.BytesIO()
    with open_compressed(out, compression) as writer:
        writer.write(content)
    return out.getvalue()


def decode_rows(content: bytes, name: str) -> Iterator[Row]:
    """The rows of a file of JSON lines, one after another.

    Args:
        content: The whole file.
        name: Its URI; the end of it tells how it is compressed.

    Raises:
        StorageError: If it is damaged.
    """
    try:
        with _open_decompressed(content, compression_of(name)) as lines:
            for line in lines:
                yield json.loads(line)
    # What the decompressors raise: zlib.error, EOFError, and OSError of gzip and Arrow.
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise StorageError(
            f"{name}: expected the JSON lines that this run wrote, found something else ({error}): "
            "delete it and run the same command again"
        ) from error


def _open_decompressed(content: bytes, compression: Compression) -> BinaryIO:
    if compression == "gzip":
        return cast("BinaryIO", gzip.GzipFile(fileobj=io.BytesIO(content)))
    if compression == "zstd":
        import pyarrow as pa

        stream = pa.CompressedInputStream(pa.py_buffer(content), "zstd")
        return cast("BinaryIO", io.BufferedReader(stream))
    return io.BytesIO(content)


@contextmanager
def open_compressed(out: BinaryIO, compression: Compression) -> Iterator[BinaryIO]:
    """Write through a compressor.

    Args:
        out: Where the compressed bytes go; it stays open.
        compression: "none" passes the bytes on.
    """
    if compression == "gzip":
        deflate = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)
        yield cast("BinaryIO", _DeflatingWriter(out, deflate))
        out.write(deflate.flush())
    elif compression == "zstd":
        import pyarrow as pa

        sink = pa.PythonFile(_Shield(out), mode="w")
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            yield cast("BinaryIO", stream)
    else:
        yield out


class _DeflatingWriter(io.RawIOBase):
    """Passes deflated bytes on as they come."""

    def __init__(self, out: BinaryIO, deflate: Any) -> None:
        self._out, self._deflate = out, deflate

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._out.write(self._deflate.compress(data))
        return memoryview(data).nbytes


class _Shield(io.RawIOBase):
    """Passes bytes on; closing it leaves the writer behind it open."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._out.write(data)
