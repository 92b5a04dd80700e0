"""Does any of very many keys occur twice? Answered in memory that has a bound."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from hashlib import blake2b
from typing import IO

import numpy as np

_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("position", "<i8")])
_PACK = struct.Struct("<16sq")
# 6 MB; more keys wait in temporary files, 24 bytes each.
_RECORDS_IN_MEMORY = 1 << 18
_NUM_FILES = 64


class RepeatCheck:
    """Takes keys one by one, and tells at the end whether two were equal.

    Keys are told apart by 128 bits of a hash. A billion keys take 24 GB of the disk for temporary
    files (TMPDIR) and less than 1 GB of memory.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._num_keys = 0
        self._stack = ExitStack()
        self._files: list[IO[bytes]] = []

    def add(self, key: bytes) -> None:
        """Take the next key."""
        digest = blake2b(key, digest_size=16).digest()
        self._buffer += _PACK.pack(digest, self._num_keys)
        self._num_keys += 1
        if len(self._buffer) >= _RECORDS_IN_MEMORY * _RECORD.itemsize:
            self._put_aside()

    def find(self) -> tuple[int, int] | None:
        """Positions, from 0, of the first key that occurred before and of its first occurrence.

        Returns:
            (first occurrence, repetition), or none. No key can be added afterwards.
        """
        with self._stack:
            repeats = [pair for group in self._groups() if (pair := _find_repeat(group))]
        return min(repeats, key=lambda pair: pair[1], default=None)

    def _groups(self) -> Iterator[np.ndarray]:
        if not self._files:
            yield np.frombuffer(self._buffer, _RECORD)
            return
        self._put_aside()
        for file in self._files:
            file.seek(0)
            yield np.frombuffer(file.read(), _RECORD)

    def _put_aside(self) -> None:
        if not self._files:
            self._files = [
                self._stack.enter_context(
                    tempfile.TemporaryFile(prefix="retinaray-keys-")  # noqa: SIM115
                )
                for _ in range(_NUM_FILES)
            ]
        records = np.frombuffer(bytes(self._buffer), _RECORD)
        groups = records["high"] % _NUM_FILES
        for number, file in enumerate(self._files):
            file.write(records[groups == number].tobytes())
        self._buffer.clear()


def _find_repeat(records: np.ndarray) -> tuple[int, int] | None:
    """The repetition with the smallest position, and the first occurrence of its key."""
    order = np.lexsort((records["position"], records["low"], records["high"]))
    ordered = records[order]
    same = (ordered["high"][1:] == ordered["high"][:-1]) & (
        ordered["low"][1:] == ordered["low"][:-1]
    )
    if not same.any():
        return None
    # The smallest repetition of all is the second occurrence of its key, so the entry before it is
    # the first.
    after = np.flatnonzero(same) + 1
    index = after[np.argmin(ordered["position"][after])]
    return int(ordered["position"][index - 1]), int(ordered["position"][index])
