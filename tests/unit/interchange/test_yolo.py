from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from retinaray.errors import DatasetError
from retinaray.interchange.known_images import KnownImages
from retinaray.interchange.labelled_set import LabelledBox, LabelledSet
from retinaray.interchange.yolo import read_yolo, read_yolo_names, write_yolo

WriteFiles = Callable[..., Path]
NAMES = ("car", "dog")


def test_read_yolo_turns_shares_into_pixels(write_files: WriteFiles, known: KnownImages) -> None:
    folder = write_files({"labels/a.txt": "1 0.5 0.5 0.2 0.4\n\n0 0.1 0.2 0.2 0.4 0.75\r\n"})
    labels = read_yolo(folder, names=NAMES, known=known)
    # Of 100 x 50: centre (50, 25), sides 20 x 20; centre (10, 10), sides 20 x 20.
    assert labels.images[0].boxes == (
        LabelledBox("dog", (40, 15, 20, 20)),
        LabelledBox("car", (0, 0, 20, 20), score=0.75),
    )
    assert labels.images[1].boxes == ()
    assert labels.notes == {"images without a label file, read as images without boxes": 1}


def test_read_yolo_takes_the_box_around_a_polygon(
    write_files: WriteFiles, known: KnownImages
) -> None:
    folder = write_files({"a.txt": "0 0.1 0.2 0.5 0.2 0.3 0.6\n", "sub/b.txt": ""})
    labels = read_yolo(folder, names=NAMES, known=known)
    assert labels.images[0].boxes == (LabelledBox("car", (10, 10, 40, 20)),)
    assert labels.notes == {"polygons become the boxes around them": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2", r"a\.txt, line 2: expected `class x_centre .*`, found 4 columns"),
        ("0 0.1 0.1 0.2 0.1 0.3 0.1", r"a\.txt, line 2: expected width and height > 0"),
        ("2 0.5 0.5 0.2 0.2", r"line 2: expected a class from 0 to 1, found 2"),
        ("0.5 0.5 0.5 0.2 0.2", r"line 2: expected a class from 0 to 1, found 0\.5"),
        ("0 320 0.5 0.2 0.2", r"line 2: expected shares of the image, 0 to 1, found 320; are"),
        ("0 0.5 0.5 0 0.2", r"line 2: expected width and height > 0, found 0\.5 0\.5 0 0\.2"),
        ("0 0,5 0.5 0.1 0.2", r"line 2: expected a number, found '0,5'"),
        ("0 nan 0.5 0.1 0.2", r"line 2: expected a number, found 'nan'"),
    ],
)
def test_read_yolo_names_file_and_line_when_input_is_bad(
    line: str, message: str, write_files: WriteFiles, known: KnownImages
) -> None:
    folder = write_files({"a.txt": f"0 0.5 0.5 0.2 0.2\n{line}\n"})
    with pytest.raises(DatasetError, match=message):
        read_yolo(folder, names=NAMES, known=known)


def test_read_yolo_refuses_a_label_file_without_an_image(
    write_files: WriteFiles, known: KnownImages
) -> None:
    folder = write_files({"c.txt": ""})
    with pytest.raises(DatasetError, match=r"c\.txt: expected an image of that name in photos"):
        read_yolo(folder, names=NAMES, known=known)


def test_write_yolo_writes_shares_and_empty_files(make_set: Callable[..., LabelledSet]) -> None:
    labels = make_set(
        LabelledBox("dog", (40, 15, 20, 20)),
        LabelledBox("car", (90, 40, 20, 20)),  # cut to 10 x 10 at the corner
        LabelledBox("car", (0, 0, 5, 5), is_crowd=True),
    )
    assert dict(write_yolo(labels, source="x")) == {
        "classes.txt": "car\ndog\n",
        "labels/a.txt": "1 0.5 0.5 0.2 0.4\n0 0.95 0.9 0.1 0.2\n",
    }
    assert dict(write_yolo(make_set(), source="x"))["labels/a.txt"] == ""


@pytest.mark.parametrize("names", [["a", "b c"], {0: "a", 1: "b c"}, {1: "b c", 0: "a"}])
def test_read_yolo_names_takes_lists_and_numbered_names(names: object) -> None:
    assert read_yolo_names({"nc": 2, "names": names}, "data.yaml") == ("a", "b c")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "data.yaml: expected `names:` .* found NoneType"),
        ({"names": {0: "a", 2: "b"}}, "a name for 0, 1, 2"),
        ({"names": []}, "expected `names:`"),
        ({"names": ["a", "a"]}, "`names` has 'a' twice"),
    ],
)
def test_read_yolo_names_refuses_what_gives_no_order(tree: object, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_yolo_names(tree, "data.yaml")
