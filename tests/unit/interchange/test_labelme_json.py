from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retinaray.errors import DatasetError
from retinaray.interchange.labelled_set import LabelledBox, LabelledSet
from retinaray.interchange.labelme_json import read_labelme, write_labelme

WriteFiles = Callable[..., Path]


def make_file(*shapes: dict[str, Any], **keys: Any) -> str:
    tree = {"imagePath": "a.png", "imageHeight": 50, "imageWidth": 100, "shapes": list(shapes)}
    return json.dumps(tree | keys)


def make_shape(points: Any, kind: str = "rectangle", **keys: Any) -> dict[str, Any]:
    return {"label": "dog", "points": points, "shape_type": kind} | keys


def test_read_labelme_takes_rectangles_however_they_were_drawn(write_files: WriteFiles) -> None:
    folder = write_files(
        {
            "x/a.json": make_file(
                make_shape([[30.5, 40], [10.25, 20]]),
                make_shape([[1, 2], [5, 9], [3, 1]], "polygon", flags={"difficult": True}),
                make_shape([[1, 2]], "point"),
                make_shape([[1, 1], [2, 2]], group_id=3, flags={"is_crowd": True}),
            )
        }
    )
    labels = read_labelme(folder)
    assert labels.images[0].file_name == "x/a.png"
    assert labels.images[0].boxes == (
        LabelledBox("dog", (10.25, 20, 20.25, 20)),
        LabelledBox("dog", (1, 1, 4, 8), attributes={"difficult": True}),
        LabelledBox("dog", (1, 1, 1, 1), is_crowd=True, attributes={"group_id": 3}),
    )
    assert labels.notes == {
        "polygons become the boxes around them": 1,
        "shapes of type point have no box and are left out": 1,
    }


def test_write_labelme_reads_back_the_same(
    make_set: Callable[..., LabelledSet], write_files: WriteFiles
) -> None:
    labels = make_set(
        LabelledBox("人 x", (1.25, 2.5, 33.1, 40.7), score=0.5, attributes={"group_id": 4}),
        LabelledBox("dog", (5, 6, 7, 8), is_crowd=True, attributes={"n": [1, "a"]}),
        names=("人 x", "dog"),
    )
    files = dict(write_labelme(labels, source="x"))
    assert read_labelme(write_files(files), names=labels.names).images == labels.images


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"a\.json: expected LabelMe's JSON, cannot parse it: .*line 1"),
        ("[]", r"a\.json: expected LabelMe's JSON with `shapes`"),
        (make_file(imageWidth=None), r"expected imageHeight and imageWidth > 0, found 50 and None"),
        (make_file(imagePath=""), r"expected the image's name in imagePath, found ''"),
        (make_file({"points": []}), r"a\.json, shapes\[0\]: expected a shape with `label`"),
        (make_file(make_shape([[1, 2]])), r"shapes\[0\]: expected points .* at least 2"),
        (make_file(make_shape([[1, 2], [1, 5]])), r"shapes\[0\]: expected a box with an area"),
        (make_file(make_shape([[1, "2"], [1, 5]])), r"shapes\[0\]: expected points"),
    ],
)
def test_read_labelme_names_file_and_shape_when_input_is_bad(
    text: str, message: str, write_files: WriteFiles
) -> None:
    with pytest.raises(DatasetError, match=message):
        read_labelme(write_files({"a.json": text}))
