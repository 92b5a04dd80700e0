from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from retinaray.errors import DatasetError, StorageError
from retinaray.interchange.output_folder import refuse_existing, write_folder


def test_write_folder_writes_all_files(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert write_folder(tmp_path / "out", [("a b/ä.txt", "ü"), ("c", "")]) == 2
    assert (tmp_path / "out" / "a b" / "ä.txt").read_bytes() == "ü".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_write_folder_leaves_nothing_when_a_file_cannot_be_made(tmp_path: Path) -> None:
    def fail() -> Iterator[tuple[str, str]]:
        yield "a.txt", "x"
        raise DatasetError("broken")

    with pytest.raises(DatasetError, match="broken"):
        write_folder(tmp_path / "out", fail())
    assert list(tmp_path.iterdir()) == []


def test_write_folder_explains_why_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"cannot write .*file/out: "):
        write_folder(tmp_path / "file" / "out", [("a", "b")])


def test_refuse_existing_takes_new_places_and_empty_folders(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "new", may_be_empty_folder=False)
    refuse_existing(tmp_path, may_be_empty_folder=True)
    with pytest.raises(DatasetError, match="expected a new place"):
        refuse_existing(tmp_path, may_be_empty_folder=False)
    (tmp_path / "x").write_text("x")
    with pytest.raises(DatasetError, match="expected a new place"):
        refuse_existing(tmp_path, may_be_empty_folder=True)
