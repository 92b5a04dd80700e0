from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from retinaray.errors import DatasetError
from retinaray.interchange.kitti import read_kitti, write_kitti
from retinaray.interchange.known_images import KnownImages
from retinaray.interchange.labelled_set import LabelledBox, LabelledSet

WriteFiles = Callable[..., Path]
MakeSet = Callable[..., LabelledSet]

# The first lines of 000001.txt and 000000.txt of KITTI's training labels, moved into 100 x 50.
TRUCK = "Truck 0.00 0 -1.57 59.6 15.9 62.9 18.9 2.85 2.63 12.34 0.47 1.49 69.44 -1.56"
REGION = "DontCare -1 -1 -10 50.5 17.3 59.1 19.0 -1 -1 -1 -1000 -1000 -1000 -10"


def test_read_kitti_takes_corners_as_they_are(write_files: WriteFiles, known: KnownImages) -> None:
    labels = read_kitti(write_files({"label_2/a.txt": f"{TRUCK}\n"}), known=known)
    assert labels.images[0].boxes == (
        LabelledBox(
            "Truck",
            (59.6, 15.9, 3.3, 3.0),
            attributes={
                "alpha": -1.57,
                **{"height": 2.85, "width": 2.63, "length": 12.34},
                **{"x": 0.47, "y": 1.49, "z": 69.44, "rotation_y": -1.56},
            },
        ),
    )
    assert labels.names == ("Truck",)
    assert [image.file_name for image in labels.images] == ["a.png", "sub/b.png"]


def test_read_kitti_makes_dont_care_a_crowd_region_of_each_class(
    write_files: WriteFiles, known: KnownImages
) -> None:
    folder = write_files({"a.txt": f"{REGION}\n", "sub/b.txt": ""})
    labels = read_kitti(folder, names=("Car", "Van"), known=known)
    xywh = (50.5, 17.3, 8.6, 1.7)
    assert labels.images[0].boxes == (
        LabelledBox("Car", xywh, is_crowd=True),
        LabelledBox("Van", xywh, is_crowd=True),
    )
    assert labels.notes == {"DontCare regions become a crowd region of each class": 1}


def test_write_kitti_reads_back_the_same(
    make_set: MakeSet, write_files: WriteFiles, known: KnownImages
) -> None:
    labels = make_set(
        LabelledBox("big car", (1.25, 2.5, 33.1, 40.7), score=0.123456789),
        LabelledBox("dog", (0, 0, 1, 1), attributes={"truncated": 0.5, "occluded": 2}),
        LabelledBox("big car", (5, 5, 9, 9), is_crowd=True),
        LabelledBox("dog", (5, 5, 9, 9), is_crowd=True),
        names=("big car", "dog"),
    )
    files = dict(write_kitti(labels, source="x"))
    lines = files["label_2/a.txt"].splitlines()
    assert lines[0].startswith("big_car 0 0 -10 1.25 2.5 34.35 43.2 -1 -1 -1 -1000 ")
    # One region, whatever number of classes it is written for.
    assert [line.split()[0] for line in lines] == ["big_car", "dog", "DontCare"]
    back = read_kitti(write_files(files), names=labels.names, known=known)
    assert back.images[0] == labels.images[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (TRUCK.replace("Truck", "big truck"), r"a\.txt, line 1: expected 15 columns .* found 16"),
        (TRUCK.rsplit(" ", 1)[0], r"a\.txt, line 1: expected 15 columns .* found 14"),
        (TRUCK.replace("59.6", "x"), r"a\.txt, line 1: expected a number, found 'x'"),
        (TRUCK.replace("62.9", "59.6"), r"line 1: expected left < right .* found 59\.6 15\.9 59"),
        (REGION, r"labels_in: expected at least one class"),
    ],
)
def test_read_kitti_names_file_and_line_when_input_is_bad(
    line: str, message: str, write_files: WriteFiles, known: KnownImages
) -> None:
    with pytest.raises(DatasetError, match=message):
        read_kitti(write_files({"a.txt": line}), known=known)


@pytest.mark.parametrize("names", [("a b", "a_b"), ("DontCare",)])
def test_write_kitti_refuses_names_that_would_be_one(
    names: tuple[str, ...], make_set: MakeSet
) -> None:
    with pytest.raises(DatasetError, match="KITTI would write the class"):
        list(write_kitti(make_set(names=names), source="x"))
