"""LabelMe: one JSON beside each image, with rectangles and polygons in absolute pixels.

A rectangle is any two opposite corners, as they were clicked. What is neither rectangle nor polygon
has no box and is left out.

Source: labelme 5, `labelme/label_file.py` and its example `bbox_detection`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from retinaray.data.image_paths import file_name_problem
from retinaray.errors import DatasetError
from retinaray.interchange.label_files import (
    CLASS_FILE,
    list_label_files,
    name_label_files,
    read_label_text,
    write_class_lines,
)
from retinaray.interchange.labelled_set import (
    FormatTraits,
    LabelledBox,
    LabelledImage,
    LabelledSet,
    box_from_corners,
    order_names,
)

TRAITS = FormatTraits(has_scores=True)
# The first release that reads every key written here.
_VERSION = "5.0.0"
_CROWD = "is_crowd"
_FEWEST_POINTS = {"rectangle": 2, "polygon": 3}
_ENDING = ".json"


def read_labelme(folder: Path, *, names: tuple[str, ...] | None = None) -> LabelledSet:
    """Read a folder of LabelMe files.

    Args:
        folder: With the JSON files; subfolders become part of file names.
        names: Class names in their order; none = by alphabet.

    Raises:
        DatasetError: If a file cannot be read, with file and shape.
    """
    notes: Counter[str] = Counter()
    images = [_read_file(folder, name, notes) for name in list_label_files(folder, _ENDING)]
    used = (box.name for image in images for box in image.boxes)
    return LabelledSet(tuple(images), order_names(used, names, str(folder)), notes=dict(notes))


def _read_file(folder: Path, name: str, notes: Counter[str]) -> LabelledImage:
    path = folder / name
    try:
        tree = json.loads(read_label_text(path))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: expected LabelMe's JSON, cannot parse it: {error}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("shapes"), list):
        raise DatasetError(f"{path}: expected LabelMe's JSON with `shapes`, found none")
    sides = [tree.get(key) for key in ("imageHeight", "imageWidth")]
    if not all(type(side) is int and side > 0 for side in sides):
        raise DatasetError(
            f"{path}: expected imageHeight and imageWidth > 0, found {sides[0]!r} and {sides[1]!r}"
        )
    boxes = [
        box
        for number, shape in enumerate(tree["shapes"])
        if (box := _read_shape(shape, f"{path}, shapes[{number}]", notes)) is not None
    ]
    file_name = _read_file_name(tree.get("imagePath"), name, path)
    return LabelledImage(file_name, int(sides[0] or 0), int(sides[1] or 0), tuple(boxes))


def _read_file_name(written: object, json_name: str, path: Path) -> str:
    """The image's name below the folder; LabelMe writes it relative to the JSON."""
    if not isinstance(written, str) or not written:
        raise DatasetError(f"{path}: expected the image's name in imagePath, found {written!r}")
    plain = written.replace("\\", "/")
    if file_name_problem(plain):
        # Images in another folder than their JSON: only the name itself can be kept.
        plain = PurePosixPath(plain).name
    return str(PurePosixPath(json_name).parent / plain)


def _read_shape(shape: Any, place: str, notes: Counter[str]) -> LabelledBox | None:
    if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
        raise DatasetError(f"{place}: expected a shape with `label`, found {str(shape)[:60]}")
    kind = shape.get("shape_type") or "polygon"
    if kind not in _FEWEST_POINTS:
        notes[f"shapes of type {kind} have no box and are left out"] += 1
        return None
    points: Any = shape.get("points")
    if not _are_points(points, _FEWEST_POINTS[kind]):
        raise DatasetError(
            f"{place}: expected points [[x, y], ...], at least {_FEWEST_POINTS[kind]}, found "
            f"{str(points)[:60]}"
        )
    if kind == "polygon":
        notes["polygons become the boxes around them"] += 1
    left, right = (f(point[0] for point in points) for f in (min, max))
    top, bottom = (f(point[1] for point in points) for f in (min, max))
    if right <= left or bottom <= top:
        raise DatasetError(f"{place}: expected a box with an area, found {points}")
    flags = shape.get("flags")
    attributes = dict(flags) if isinstance(flags, dict) else {}
    if shape.get("group_id") is not None:
        attributes["group_id"] = shape["group_id"]
    score = attributes.pop("score", None)
    return LabelledBox(
        shape["label"],
        box_from_corners(left, top, right, bottom),
        is_crowd=attributes.pop(_CROWD, False) is True,
        score=score if isinstance(score, float) else None,
        attributes=attributes,
    )


def _are_points(points: object, fewest: int) -> bool:
    return (
        isinstance(points, list)
        and len(points) >= fewest
        and all(
            isinstance(point, list)
            and len(point) == 2
            and all(type(number) in (int, float) for number in point)
            for point in points
        )
    )


def write_labelme(labels: LabelledSet, *, source: str) -> Iterator[tuple[str, str]]:
    """Write one JSON per image, to lie beside it; crowd, score and attributes become flags.

    Yields:
        Name and content of each file.

    Raises:
        DatasetError: If two images would share a file, or a class name cannot be written.
    """
    names = name_label_files(labels, _ENDING, source)
    yield CLASS_FILE, write_class_lines(labels.names, source)
    for image, name in zip(labels.images, names, strict=True):
        tree: dict[str, Any] = {
            "version": _VERSION,
            "flags": {},
            "shapes": [_write_shape(box) for box in image.boxes],
            "imagePath": PurePosixPath(image.file_name).name,
            "imageData": None,
            "imageHeight": image.height,
            "imageWidth": image.width,
        }
        yield name, json.dumps(tree, ensure_ascii=False, indent=2) + "\n"


def _write_shape(box: LabelledBox) -> Mapping[str, Any]:
    left, top, right, bottom = box.xyxy
    flags = {key: value for key, value in box.attributes.items() if key != "group_id"}
    flags |= {_CROWD: True} if box.is_crowd else {}
    flags |= {} if box.score is None else {"score": float(box.score)}
    return {
        "label": box.name,
        "points": [[left, top], [right, bottom]],
        "group_id": box.attributes.get("group_id"),
        "description": "",
        "shape_type": "rectangle",
        "flags": flags,
    }
