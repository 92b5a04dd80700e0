"""A folder of many files that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from retinaray.errors import DatasetError
from retinaray.local_files import explained_local
from retinaray.local_listing import TEMP_PREFIX, TEMP_SUFFIX


def refuse_existing(target: Path, *, may_be_empty_folder: bool) -> None:
    """Refuse to write over what is there.

    Args:
        target: Where something is to be written.
        may_be_empty_folder: Whether an empty folder may be taken.

    Raises:
        DatasetError: If something is there.
    """
    if may_be_empty_folder and target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise DatasetError(
            f"{target}: expected a new place to write to; remove it, or name another"
        )


def write_folder(target: Path, files: Iterable[tuple[str, str]]) -> int:
    """Write files beside the target, then give their folder its name.

    Args:
        target: New, or an empty folder.
        files: Name below the folder, and content as UTF-8; drawn one by one.

    Returns:
        How many files there are.

    Raises:
        StorageError: If it cannot be written; nothing is left behind.
    """
    count = 0
    with explained_local(str(target), "write"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f"{TEMP_PREFIX}{os.urandom(16).hex()}{TEMP_SUFFIX}"
        temporary.mkdir()
        try:
            for name, text in files:
                path = temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(text.encode())
                count += 1
            temporary.replace(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return count
