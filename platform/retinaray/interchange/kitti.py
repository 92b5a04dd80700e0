"""KITTI: one text file per image, a line of 15 columns per object, or 16 with a score.

Type, truncated (0..1), occluded (0..3), alpha, left, top, right, bottom in continuous pixels from 0
(the devkit takes right - left as the width), three sizes, three places and a rotation of the box in
space. `DontCare` is a region to ignore, of no class. Columns are separated by blanks: a class name
holds none.

Source: readme.txt of the KITTI object development kit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from retinaray.errors import DatasetError
from retinaray.interchange.known_images import KnownImages
from retinaray.interchange.label_files import (
    CLASS_FILE,
    list_label_files,
    name_label_files,
    read_label_text,
    read_numbers,
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

_SPACE_COLUMNS = ("height", "width", "length", "x", "y", "z", "rotation_y")
_UNKNOWN = {
    "truncated": 0.0,
    "occluded": 0.0,
    "alpha": -10.0,
    **dict.fromkeys(("height", "width", "length"), -1.0),
    **dict.fromkeys(("x", "y", "z"), -1000.0),
    "rotation_y": -10.0,
}
"""What the devkit writes where it does not know; no attribute comes of it."""
TRAITS = FormatTraits(has_scores=True, crowd="region", attributes=frozenset(_UNKNOWN))
_REGION = "DontCare"
_FOLDERS = ("label_2", "training/label_2", "labels")
_EXPECTED = "type truncated occluded alpha left top right bottom h w l x y z ry"


def read_kitti(
    folder: Path, *, names: tuple[str, ...] | None = None, known: KnownImages
) -> LabelledSet:
    """Read a folder of KITTI labels.

    Args:
        folder: With the text files, or with `label_2/`.
        names: Class names in their order; none = by alphabet. A name with blanks is found in the
            labels with `_` instead.
        known: All images, with their sizes.

    Returns:
        All known images. A DontCare region becomes one crowd region for each class.

    Raises:
        DatasetError: If a line cannot be read, with file and line, or a label has no image.
    """
    root = next((folder / inner for inner in _FOLDERS if (folder / inner).is_dir()), folder)
    by_stem = known.by_stem()
    read_as = {_join(name): name for name in names or ()}
    boxes: dict[str, list[LabelledBox]] = {}
    for name in list_label_files(root, ".txt"):
        if name == CLASS_FILE:
            continue
        image = by_stem.get(name[: -len(".txt")])
        if image is None:
            raise DatasetError(
                f"{root / name}: expected an image of that name in {known.source}, found none; "
                "give the folder of these labels' images with --images"
            )
        boxes[image.file_name] = list(_read_file(root / name, read_as))
    every = [box for found in boxes.values() for box in found]
    class_names = order_names(
        (box.name for box in every if box.name != _REGION), names, str(folder)
    )
    notes = {
        "DontCare regions become a crowd region of each class": sum(
            box.name == _REGION for box in every
        ),
        "images without a label file, read as images without boxes": len(known.images) - len(boxes),
    }
    images = [
        replace(image, boxes=tuple(_spread(boxes.get(image.file_name, ()), class_names)))
        for image in known.images
    ]
    return LabelledSet(
        tuple(images), class_names, notes={text: count for text, count in notes.items() if count}
    )


def _join(name: str) -> str:
    return "_".join(name.split())


def _read_file(path: Path, read_as: Mapping[str, str]) -> Iterator[LabelledBox]:
    for number, line in enumerate(read_label_text(path).split("\n"), 1):
        words = line.split()
        if words:
            yield _read_line(words, f"{path}, line {number}", read_as)


def _read_line(words: Sequence[str], place: str, read_as: Mapping[str, str]) -> LabelledBox:
    # A 16th column may also come from a blank in the name.
    if len(words) not in (15, 16) or words[1].isalpha():
        raise DatasetError(
            f"{place}: expected 15 columns `{_EXPECTED}`, or 16 with a score, found {len(words)}; "
            "a class name may hold no blanks"
        )
    name = read_as.get(words[0], words[0])
    numbers = read_numbers(words[1:], place)
    left, top, right, bottom = numbers[3:7]
    if right <= left or bottom <= top:
        raise DatasetError(
            f"{place}: expected left < right and top < bottom, found {' '.join(words[4:8])}"
        )
    values = dict(zip(_UNKNOWN, (*numbers[:3], *numbers[7:14]), strict=True))
    is_region = words[0] == _REGION
    attributes = {
        key: int(value) if key == "occluded" else value
        for key, value in values.items()
        if value != _UNKNOWN[key] and not is_region
    }
    return LabelledBox(
        _REGION if is_region else name,
        box_from_corners(left, top, right, bottom),
        is_crowd=is_region,
        score=numbers[14] if len(numbers) == 15 else None,
        attributes=attributes,
    )


def _spread(boxes: Sequence[LabelledBox], names: Sequence[str]) -> Iterator[LabelledBox]:
    for box in boxes:
        if box.is_crowd:
            yield from (replace(box, name=name) for name in names)
        else:
            yield box


def write_kitti(labels: LabelledSet, *, source: str) -> Iterator[tuple[str, str]]:
    """Write `label_2/` and the class names; blanks in names become `_`, crowd regions `DontCare`.

    Yields:
        Name and content of each file; empty content for an image without boxes.

    Raises:
        DatasetError: If two images would share a file, or two classes a name.
    """
    label_names = name_label_files(labels, ".txt", source)
    joined = Counter(_join(name) for name in (*labels.names, _REGION))
    taken = [name for name in labels.names if joined[_join(name)] > 1]
    if taken:
        raise DatasetError(
            f"{source}: KITTI would write the class {taken[0]!r} as {_join(taken[0])!r}, which is "
            "another class, or a region to ignore; rename it"
        )
    yield CLASS_FILE, write_class_lines(labels.names, source)
    for image, name in zip(labels.images, label_names, strict=True):
        yield f"label_2/{name}", "".join(_write_lines(image))


def _write_lines(image: LabelledImage) -> Iterator[str]:
    regions = set()
    for box in image.boxes:
        if box.is_crowd and box.xywh in regions:
            continue  # the same region for another class
        if box.is_crowd:
            regions.add(box.xywh)
        yield _write_line(box)


def _write_line(box: LabelledBox) -> str:
    values = {
        key: float(box.attributes[key]) if _is_number(box.attributes.get(key)) else default
        for key, default in _UNKNOWN.items()
    }
    name = _join(box.name)
    if box.is_crowd:
        values = {**_UNKNOWN, "truncated": -1.0, "occluded": -1.0}
        name = _REGION
    columns = [
        name,
        f"{values['truncated']:g}",
        f"{values['occluded']:.0f}",
        f"{values['alpha']:g}",
        *(repr(float(corner)) for corner in box.xyxy),
        *(f"{values[key]:g}" for key in _SPACE_COLUMNS),
    ]
    if box.score is not None:
        columns.append(repr(float(box.score)))
    return " ".join(columns) + "\n"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
