"""What is proposed for a path that cannot be opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from retinaray.errors import StorageError
from retinaray.path_hints import (
    hint_at_error,
    hint_at_folder,
    hint_at_image,
    hint_at_missing,
)


def _fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("trian.json", "nearest: {}/train.json"),
        ("Train.JSON", "nearest: {}/train.json"),
        ("train.jsn", "nearest: {}/train.json"),
        ("images.txt", "nearest: {}/images"),
        ("imagse/a.jpg", "nearest: {}/images"),
        ("none/at/all.json", "the folder {}/none is not there"),
        ("quite_other.pth", ""),
        ("none.json", ""),
        # Labels are not offered for a model.
        ("train.pth", ""),
    ],
)
def test_hint_at_missing_names_the_nearest(tmp_path: Path, wrong: str, hint: str) -> None:
    _fill(tmp_path, "train.json", "images/a.jpg")
    assert hint_at_missing(tmp_path / wrong) == hint.format(tmp_path)


def test_hint_at_missing_says_where_a_relative_path_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hint_at_missing(Path("model.pth")) == f"it was looked for in {tmp_path}"


def test_hint_at_missing_is_empty_when_the_path_is_there(tmp_path: Path) -> None:
    assert hint_at_missing(_fill(tmp_path, "a") / "a") == ""


@pytest.mark.parametrize(
    ("root", "name", "hint"),
    [
        ("imgs", "a.jpg", "nearest: {}/images"),
        ("images", "gone/a.jpg", "{}/images/a.jpg is there: take the folder out of the file names"),
        ("images", "a.png", "a.jpg is there: the annotations have another ending"),
        ("images", "images/a.jpg", "it is in {}: give that folder"),
        (".", "a.jpg", "it is in {}/images: give that folder"),
        ("images", "zzz.jpg", ""),
        ("images", "\x1b[2J/zzz.jpg", ""),
    ],
)
def test_hint_at_image_finds_it_elsewhere(tmp_path: Path, root: str, name: str, hint: str) -> None:
    _fill(tmp_path, "images/a.jpg", "train.json")
    assert hint_at_image(tmp_path / root, name) == hint.format(tmp_path)


def test_hint_at_folder_shows_no_control_characters_and_quotes_blanks(tmp_path: Path) -> None:
    folder = _fill(tmp_path / "my set", "\x1b[2J.json", "a.xml")
    hint = hint_at_folder(folder)
    assert "\x1b" not in hint
    assert f"retinaray convert '{folder}' train.json --from voc" in hint


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        ((), "the folder is empty"),
        (
            ("Annotations/a.xml", "JPEGImages/a.jpg"),
            "it looks like Pascal VOC: `retinaray convert {0} train.json --from voc` makes COCO "
            "of it",
        ),
        (("Annotations/a.xml", "ImageSets/Main/default.txt", "labelmap.txt"), "--from voc`"),
        (
            ("VOC2012/Annotations/a.xml", "VOC2012/JPEGImages/a.jpg"),
            "{0}/VOC2012 train.json --from voc`",
        ),
        (("train.json", "voc/Annotations/a.xml"), "it holds {0}/train.json"),
        (("data.yaml", "labels/a.txt"), "--from yolo --images {0}/images`"),
        (("train.json", "val.json", "images/a.jpg"), "it holds {0}/train.json, {0}/val.json"),
        (("a.jpg", "a.json", "b.json", "c.json", "d.json"), "--from labelme`"),
        (("a.xml", "b.xml"), "--from voc`"),
        (("a.jpg", "b.png"), "it holds images; labels or a model were expected here"),
        (("a.txt",), "--from yolo --images FOLDER`"),
        (("best.pth", "loss.png"), "it holds {0}/best.pth"),
        (("1", "2", "3", "4"), "it holds {0}/1, {0}/2, {0}/3 and 1 more"),
    ],
    ids=lambda entry: None if isinstance(entry, str) else entry[0] if entry else "empty",
)
def test_hint_at_folder_says_what_it_holds(
    tmp_path: Path, names: tuple[str, ...], hint: str
) -> None:
    assert hint.format(tmp_path) in hint_at_folder(_fill(tmp_path, *names))


def test_hint_at_error_follows_causes_to_the_system(tmp_path: Path) -> None:
    _fill(tmp_path, "train.json")
    try:
        (tmp_path / "tran.json").read_bytes()
    except FileNotFoundError as error:
        inner = StorageError("cannot read")
        inner.__cause__ = error
    outer = StorageError("cannot train")
    outer.__cause__ = inner
    assert hint_at_error(outer) == f"nearest: {tmp_path / 'train.json'}"


def test_hint_at_error_is_empty_when_no_path_is_at_fault() -> None:
    error = StorageError("S3 is down")
    assert hint_at_error(error) == ""
    error.__cause__ = OSError("no number, no name")
    assert hint_at_error(error) == ""
