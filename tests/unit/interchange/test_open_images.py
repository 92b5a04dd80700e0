from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from retinaray.errors import DatasetError
from retinaray.interchange.known_images import KnownImages
from retinaray.interchange.labelled_set import LabelledBox, LabelledSet
from retinaray.interchange.open_images import read_open_images, write_open_images

WriteFiles = Callable[..., Path]

HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
    "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
)
ROW = "a,xclick,/m/0bt9lr,1,0.1,0.3,0.2,0.6,1,0,1,-1,0\n"


def test_read_open_images_turns_codes_and_shares_into_names_and_pixels(
    write_files: WriteFiles, known: KnownImages
) -> None:
    folder = write_files(
        {
            "validation-annotations-bbox.csv": HEADER + ROW,
            "class-descriptions-boxable.csv": '/m/0bt9lr,"Dog, big"\n',
        }
    )
    labels = read_open_images(folder, known=known)
    # Of 100 x 50: x 10..30, y 10..30. A flag of -1 says nothing.
    assert labels.images[0].boxes == (
        LabelledBox(
            "Dog, big",
            (10, 10, 20, 20),
            is_crowd=True,
            attributes={"occluded": True, "truncated": False, "is_inside": False},
        ),
    )
    assert labels.names == ("Dog, big",)
    assert len(labels.images) == 2


def test_write_open_images_reads_back_the_same(
    make_set: Callable[..., LabelledSet], write_files: WriteFiles, known: KnownImages
) -> None:
    labels = make_set(
        LabelledBox("a, b", (1.25, 2.5, 33.1, 40.7), attributes={"is_depiction": True}),
        LabelledBox('"c"', (0, 0, 100, 50), score=1.0),
        LabelledBox('"c"', (3, 3, 4, 4), is_crowd=True),
        names=("a, b", '"c"'),
    )
    files = dict(write_open_images(labels, source="x"))
    rows = list(csv.DictReader(files["default-annotations-bbox.csv"].splitlines()))
    assert [row["ImageID"] for row in rows] == ["a", "a", "a"]
    assert [row["IsGroupOf"] for row in rows] == ["0", "0", "1"]
    back = read_open_images(write_files(files), names=labels.names, known=known)
    assert back.images[0] == labels.images[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER.replace("XMin,", "") + ROW, r"line 1: expected the columns .*; XMin is missing"),
        (HEADER + "a,x,dog,1,0.1\n", r"annotations-bbox\.csv, line 2: expected 13 columns"),
        (HEADER + ROW + ROW.replace("0.3", "0.1"), r"line 3: expected 0 <= XMin < XMax <= 1"),
        (HEADER + ROW.replace("0.3", "30"), r"line 2: .* found 0\.1, 30, 0\.2, 0\.6"),
        (HEADER + ROW.replace("0.3", "?"), r"line 2: expected a number, found '\?'"),
        (HEADER + ROW.replace("a,", "z,", 1), r"line 2: expected an image 'z' in photos"),
        (HEADER + '"a', r"expected CSV"),
    ],
)
def test_read_open_images_names_file_and_line_when_input_is_bad(
    text: str, message: str, write_files: WriteFiles, known: KnownImages
) -> None:
    with pytest.raises(DatasetError, match=message):
        read_open_images(write_files({"annotations-bbox.csv": text}), known=known)


def test_read_open_images_asks_for_the_file_when_a_folder_holds_two(
    write_files: WriteFiles, known: KnownImages
) -> None:
    folder = write_files({"train-annotations-bbox.csv": "", "test-annotations-bbox.csv": ""})
    with pytest.raises(DatasetError, match=r"one file \*annotations-bbox\.csv, found 2"):
        read_open_images(folder, known=known)


def test_read_open_images_refuses_two_codes_with_one_name(
    write_files: WriteFiles, known: KnownImages
) -> None:
    files = {
        "annotations-bbox.csv": HEADER + ROW,
        "class-descriptions-boxable.csv": "/m/1,Dog\n/m/2,Dog\n",
    }
    with pytest.raises(DatasetError, match="two classes are called 'Dog'"):
        read_open_images(write_files(files), known=known)
