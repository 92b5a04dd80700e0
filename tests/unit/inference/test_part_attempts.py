"""How an image that kills its worker is found and left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from retinaray.errors import ImageError, StorageError
from retinaray.inference.part_attempts import (
    DEATHS_PER_IMAGE,
    PLAIN_ATTEMPTS,
    PartAttempts,
    refuse_given_up,
)
from retinaray.inference.pipeline import ImageSource
from retinaray.storage import Storage

SOURCES = [ImageSource(index, f"image{index}.jpg") for index in range(5)]


class WorkerDeathError(Exception):
    """Stands for the end of a process: nothing after it runs."""


def make_attempts(root: Path) -> PartAttempts:
    return PartAttempts(str(root), 7, Storage())


def attempt_part(root: Path, poison: set[int]) -> frozenset[int]:
    """One attempt by a worker that dies of some images; gives the images that are given up."""
    attempts = make_attempts(root)
    given_up = attempts.begin()

    def load(source: ImageSource) -> None:
        if int(source.image_id) in poison:
            raise WorkerDeathError
        if source.image_id == 0:
            raise ImageError("merely damaged")

    if attempts.is_suspicious:
        attempts.probe(SOURCES, load, given_up)
    if poison - given_up:
        raise WorkerDeathError
    attempts.end()
    return given_up


def count_deaths(root: Path, poison: set[int]) -> tuple[int, frozenset[int]]:
    """Deaths until the part is through, and what is given up then."""
    for deaths in range(100):
        try:
            return deaths, attempt_part(root, poison)
        except WorkerDeathError:
            continue
    pytest.fail("the part never ends")


def test_attempts_leave_nothing_behind_when_nothing_happens(tmp_path: Path) -> None:
    assert count_deaths(tmp_path, set()) == (0, frozenset())
    assert list((tmp_path / "attempts").iterdir()) == []


@pytest.mark.parametrize("poison", [{0}, {3}, {4}, {1, 3}])
def test_attempts_give_up_exactly_the_images_that_kill(tmp_path: Path, poison: set[int]) -> None:
    deaths, given_up = count_deaths(tmp_path, poison)
    assert given_up == poison
    assert deaths == PLAIN_ATTEMPTS + DEATHS_PER_IMAGE * len(poison)


def test_attempts_suspect_no_image_when_workers_die_of_other_causes(tmp_path: Path) -> None:
    for _ in range(10):
        attempts = make_attempts(tmp_path)
        assert attempts.begin() == frozenset()
        if attempts.is_suspicious:
            attempts.probe(SOURCES, lambda _: None, frozenset())
        # The end comes in the network, while nothing is read.


def test_begin_says_what_to_do_when_the_journal_is_damaged(tmp_path: Path) -> None:
    make_attempts(tmp_path).begin()
    (tmp_path / "attempts" / "part-000000007.json").write_text("[1", encoding="utf-8")
    with pytest.raises(StorageError, match=r"part-000000007\.json: expected the journal .* delete"):
        make_attempts(tmp_path).begin()


def test_refuse_given_up_raises_for_these_images_only() -> None:
    read = refuse_given_up(lambda uri: uri.encode(), [SOURCES[2]])
    assert read("image1.jpg") == b"image1.jpg"
    with pytest.raises(ImageError, match=r"image2\.jpg: 2 worker processes ended"):
        read("image2.jpg")
