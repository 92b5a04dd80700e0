"""The order of names below a folder, and that a folder of any size takes no more memory."""

from __future__ import annotations

import os
import random
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from retinaray import local_listing
from retinaray.local_listing import walk_names

# Line end (0x0a) < blank (0x20) < "-" (0x2d) < "." (0x2e) < "/" (0x2f) < "0" (0x30), then letters
# and what is beyond ASCII.
ORDERED = ["a-b/x", "a.jpg", "a/\n", "a/ x", "a/b/1", "a/b0", "a0", "b", "é", "日本", "😀"]


@pytest.fixture
def make_files(tmp_path: Path) -> Callable[[list[str]], Path]:
    """Write empty files below a folder, in any order."""

    def make(names: list[str]) -> Path:
        for name in random.Random(0).sample(names, len(names)):
            path = tmp_path / "folder" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / "folder"

    return make


@pytest.mark.parametrize("names_in_memory", [1, 2, 3, 100])
def test_walk_names_gives_the_order_of_whole_names_however_many_fit_in_memory(
    make_files: Callable[[list[str]], Path], monkeypatch: pytest.MonkeyPatch, names_in_memory: int
) -> None:
    monkeypatch.setattr(local_listing, "_NAMES_IN_MEMORY", names_in_memory)
    monkeypatch.setattr(local_listing, "_READ_BYTES", 3)
    assert list(walk_names(make_files(ORDERED))) == ORDERED


def test_walk_names_keeps_names_that_are_no_text(
    make_files: Callable[[list[str]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_listing, "_NAMES_IN_MEMORY", 1)
    folder = make_files(["a.jpg"])
    (folder / os.fsdecode(b"\xff\xfe.jpg")).touch()
    (folder / os.fsdecode(b"z\x80.jpg")).touch()
    found = list(walk_names(folder))
    assert [os.fsencode(name) for name in found] == [b"a.jpg", b"z\x80.jpg", b"\xff\xfe.jpg"]


def test_walk_names_leaves_no_temporary_file(
    make_files: Callable[[list[str]], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    aside = tmp_path / "aside"
    aside.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(aside))
    monkeypatch.setattr(local_listing, "_NAMES_IN_MEMORY", 2)
    names = walk_names(make_files(ORDERED))
    assert next(names) == ORDERED[0]
    names.close()  # type: ignore[attr-defined]
    assert list(aside.iterdir()) == []


def measure_peak(monkeypatch: pytest.MonkeyPatch, num_names: int) -> int:
    def scan(_: Path) -> Iterator[str]:
        return (f"{number * 7919 % num_names:030}.jpg" for number in range(num_names))

    monkeypatch.setattr(local_listing, "_scan", scan)
    tracemalloc.start()
    try:
        previous, count = "", 0
        for name in walk_names(Path("/")):
            assert name > previous
            previous, count = name, count + 1
        assert count == num_names
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_walk_names_takes_no_more_memory_when_a_folder_holds_ten_times_the_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local_listing, "_NAMES_IN_MEMORY", 2000)
    monkeypatch.setattr(local_listing, "_READ_BYTES", 1024)
    small, large = measure_peak(monkeypatch, 2000), measure_peak(monkeypatch, 20_000)
    # 18,000 names of 83 bytes more would be 1.5 MB.
    assert large < small + 300_000
