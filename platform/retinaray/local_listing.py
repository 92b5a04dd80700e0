"""Names of the files below a local folder, sorted as whole names, in memory that has a bound.

Folders of a few files are sorted in memory; of a folder with millions the sorted runs wait in
temporary files. Knows nothing of URIs.
"""

from __future__ import annotations

import heapq
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import IO

# Names that a killed writer can leave behind; no listing shows them.
TEMP_PREFIX, TEMP_SUFFIX = ".retinaray-", ".tmp"
# About 15 MB of names; more are sorted in runs of this length.
_NAMES_IN_MEMORY = 200_000
_READ_BYTES = 2**16


def walk_names(folder: Path) -> Iterator[str]:
    """Names of all files below a folder, relative to it, in the order of whole names.

    The order is that of code points, as S3 lists the same keys. Links to folders are followed, but
    not back into a folder that holds them. Files still being written are left out.

    Raises:
        OSError: If a folder cannot be read.
    """
    return _walk(folder, frozenset())


def _walk(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a symbolic link back to a folder that holds it
        return
    for name in _sort_names(_scan(folder)):
        if name.endswith("/"):
            yield from (name + inner for inner in _walk(folder / name, above | {identity}))
        elif not (name.startswith(TEMP_PREFIX) and name.endswith(TEMP_SUFFIX)):
            yield name


def _scan(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            # With its slash a folder sorts where its files sort among the other whole names.
            yield entry.name + ("/" if entry.is_dir() else "")


def _sort_names(names: Iterable[str]) -> Iterator[str]:
    remaining = iter(names)
    run = sorted(islice(remaining, _NAMES_IN_MEMORY))
    with ExitStack() as files:
        runs: list[Iterator[str]] = []
        while following := sorted(islice(remaining, _NAMES_IN_MEMORY)):
            runs.append(_put_aside(run, files))
            run = following
        yield from heapq.merge(*runs, run) if runs else run


def _put_aside(names: list[str], files: ExitStack) -> Iterator[str]:
    """Write sorted names to a file without a name of its own; gives them back one by one."""
    file = files.enter_context(tempfile.TemporaryFile(prefix="retinaray-names-"))  # noqa: SIM115
    # No file name holds NUL.
    file.writelines(os.fsencode(name) + b"\0" for name in names)
    file.seek(0)
    return _read_names(file)


def _read_names(file: IO[bytes]) -> Iterator[str]:
    rest = b""
    while block := file.read(_READ_BYTES):
        *names, rest = (rest + block).split(b"\0")
        yield from map(os.fsdecode, names)
