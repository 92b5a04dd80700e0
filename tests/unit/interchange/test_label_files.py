from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from retinaray.errors import DatasetError
from retinaray.interchange.known_images import KnownImages, find_images
from retinaray.interchange.label_files import (
    list_label_files,
    name_label_files,
    read_class_lines,
    read_label_text,
    write_class_lines,
)
from retinaray.interchange.labelled_set import LabelledImage, LabelledSet


def make_images(*names: str) -> LabelledSet:
    return LabelledSet(tuple(LabelledImage(name, 5, 5) for name in names), ("dog",))


def test_name_label_files_keeps_subfolders_and_odd_names() -> None:
    labels = make_images("a b/Ä.1.jpg", "c")
    assert name_label_files(labels, ".txt", "x") == ["a b/Ä.1.txt", "c.txt"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.jpg", "a.png"), "set: 'a.jpg' and 'a.png' would share the label file 'a.txt'"),
        (("../a.jpg",), "set: file_name '../a.jpg' leads out of the image folder"),
        (("/etc/a.jpg",), "set: file_name '/etc/a.jpg' is absolute"),
    ],
)
def test_name_label_files_refuses_names_that_cannot_be_files(
    names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        name_label_files(make_images(*names), ".txt", "set")


def test_list_label_files_refuses_folders_without_labels(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"expected label files \*\.xml, found none"):
        list_label_files(tmp_path, ".xml")
    with pytest.raises(DatasetError, match=r"none: expected a folder of \.xml files"):
        list_label_files(tmp_path / "none", ".xml")


def test_read_label_text_names_the_line_when_bytes_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfok\nStra\xdfe\n")
    with pytest.raises(DatasetError, match=r"a\.txt, line 2: expected text in UTF-8"):
        read_label_text(tmp_path / "a.txt")


def test_read_label_text_leaves_out_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfok\n")
    assert read_label_text(tmp_path / "a.txt") == "ok\n"


def test_read_class_lines_gives_names_in_order(write_files: Callable[..., Path]) -> None:
    folder = write_files({"classes.txt": "traffic light\r\n人\n\n"})
    assert read_class_lines(folder / "classes.txt") == ("traffic light", "人")


@pytest.mark.parametrize(("text", "message"), [("a\n\nb", "line 2"), ("a\nb\na", "line 3")])
def test_read_class_lines_names_the_line_when_names_are_no_list(
    text: str, message: str, write_files: Callable[..., Path]
) -> None:
    with pytest.raises(DatasetError, match=rf"classes\.txt, {message}: expected one class name"):
        read_class_lines(write_files({"classes.txt": text}) / "classes.txt")


@pytest.mark.parametrize("name", ["a\nb", " a", ""])
def test_write_class_lines_refuses_names_that_would_not_come_back(name: str) -> None:
    with pytest.raises(DatasetError, match="holds a line break, or blanks"):
        write_class_lines(["dog", name], "set")


def test_find_images_reads_sizes_and_passes_other_files_over(street_images: Path) -> None:
    (street_images / "notes.txt").write_text("x")
    found = find_images(street_images, num_threads=1)
    assert found.images == (
        LabelledImage("Straße 1.png", 60, 97),
        LabelledImage("sub/b.png", 80, 64),
        LabelledImage("空.png", 33, 50),
    )


def test_find_images_names_a_broken_image(street_images: Path) -> None:
    (street_images / "z.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"z\.png: expected an image, cannot read its size"):
        find_images(street_images)


def test_find_images_refuses_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"expected images \(--images\), found none"):
        find_images(tmp_path)
    with pytest.raises(DatasetError, match="none: expected a folder of images"):
        find_images(tmp_path / "none")


def test_by_stem_refuses_images_that_share_a_label_file() -> None:
    known = KnownImages(make_images("a.jpg", "a.png").images, "photos")
    with pytest.raises(DatasetError, match=r"photos: 'a\.jpg' and 'a\.png' share one label file"):
        known.by_stem()
