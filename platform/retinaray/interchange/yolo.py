"""YOLO: one text file per image, a line `class x_centre y_centre width height` in 0..1 per box.

Class indices are places in a list that lies elsewhere (classes.txt, obj.names, or `names` of a
data.yaml); sizes are in the images only. An image whose text is empty or absent has no boxes.

Source: Ultralytics, "Object Detection Datasets Overview"; a sixth column is the confidence, as
`save_conf` writes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
    box_from_shares,
    cut_to_image,
)

TRAITS = FormatTraits(crowd="left out", attributes=frozenset(), is_relative=True)
_EXPECTED = "class x_centre y_centre width height"
# Tools round to six digits, and a box at the edge may end a little outside.
_TOLERANCE = 0.01


def read_yolo(folder: Path, *, names: tuple[str, ...], known: KnownImages) -> LabelledSet:
    """Read a folder of YOLO labels.

    Args:
        folder: With the text files, or with `labels/`.
        names: Class names; a label's class is a place in it.
        known: All images, with their sizes.

    Returns:
        All known images; those without a label file have no boxes, and are counted.

    Raises:
        DatasetError: If a line cannot be read, with file and line, or a label has no image.
    """
    inner = folder / "labels"
    root = inner if inner.is_dir() else folder
    by_stem = known.by_stem()
    notes: Counter[str] = Counter()
    boxes: dict[str, tuple[LabelledBox, ...]] = {}
    for name in list_label_files(root, ".txt"):
        if name == CLASS_FILE:
            continue
        image = by_stem.get(name[: -len(".txt")])
        if image is None:
            raise DatasetError(
                f"{root / name}: expected an image of that name in {known.source}, found none; "
                "give the folder of these labels' images with --images"
            )
        boxes[image.file_name] = tuple(_read_file(root / name, image, names, notes))
    notes["images without a label file, read as images without boxes"] = len(known.images) - len(
        boxes
    )
    return LabelledSet(
        tuple(
            LabelledImage(
                image.file_name, image.height, image.width, boxes.get(image.file_name, ())
            )
            for image in known.images
        ),
        names,
        notes={text: count for text, count in notes.items() if count},
    )


def _read_file(
    path: Path, image: LabelledImage, names: Sequence[str], notes: Counter[str]
) -> Iterator[LabelledBox]:
    for number, line in enumerate(read_label_text(path).split("\n"), 1):
        words = line.split()
        if words:
            yield _read_line(words, f"{path}, line {number}", image, names, notes)


def _read_line(
    words: Sequence[str],
    place: str,
    image: LabelledImage,
    names: Sequence[str],
    notes: Counter[str],
) -> LabelledBox:
    numbers = read_numbers(words, place)
    index, shares = numbers[0], numbers[1:]
    is_polygon = len(shares) >= 6 and len(shares) % 2 == 0
    if len(shares) not in (4, 5) and not is_polygon:
        raise DatasetError(f"{place}: expected `{_EXPECTED}`, found {len(words)} columns")
    if not index.is_integer() or not 0 <= index < len(names):
        raise DatasetError(
            f"{place}: expected a class from 0 to {len(names) - 1}, found {words[0]}; the list of "
            "classes (--class-names) may be another one"
        )
    outside = [share for share in shares if not -_TOLERANCE <= share <= 1 + _TOLERANCE]
    if outside:
        raise DatasetError(
            f"{place}: expected shares of the image, 0 to 1, found {outside[0]:g}; are these "
            "pixels?"
        )
    name = names[int(index)]
    if is_polygon:
        notes["polygons become the boxes around them"] += 1
        shares = _enclose(shares)
    if min(shares[2], shares[3]) <= 0:
        raise DatasetError(f"{place}: expected width and height > 0, found {' '.join(words[1:])}")
    score = shares[4] if len(shares) == 5 else None
    x_centre, y_centre, width, height = shares[:4]
    return LabelledBox(name, box_from_shares(x_centre, y_centre, width, height, image), score=score)


def _enclose(points: Sequence[float]) -> list[float]:
    """Centre and sides of the box around a polygon."""
    left, right = min(points[::2]), max(points[::2])
    top, bottom = min(points[1::2]), max(points[1::2])
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


def read_yolo_names(tree: object, source: str) -> tuple[str, ...]:
    """Class names of a data.yaml.

    Args:
        tree: Its content; `names` is a list, or a mapping from 0, 1, ... to names.
        source: What messages call it.

    Raises:
        DatasetError: If it has no such names.
    """
    names: Any = tree.get("names") if isinstance(tree, dict) else None
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DatasetError(
            f"{source}: expected `names:` with a list, or with a name for 0, 1, 2, ...; found "
            f"{type(names).__name__}"
        )
    texts = tuple(str(name) for name in names)
    repeated = sorted({name for name in texts if texts.count(name) > 1})
    if repeated:
        raise DatasetError(f"{source}: `names` has {repeated[0]!r} twice; rename one")
    return texts


def write_yolo(labels: LabelledSet, *, source: str) -> Iterator[tuple[str, str]]:
    """Write `labels/` and the class names; crowd regions are left out, boxes cut to their image.

    Numbers have all their digits, so that nothing is lost. The data.yaml is the caller's.

    Yields:
        Name and content of each file; empty content for an image without boxes.

    Raises:
        DatasetError: If two images would share a file, or a name cannot be written.
    """
    label_names = name_label_files(labels, ".txt", source)
    yield CLASS_FILE, write_class_lines(labels.names, source)
    index_of = {name: index for index, name in enumerate(labels.names)}
    for image, name in zip(labels.images, label_names, strict=True):
        lines = [
            f"{index_of[box.name]} {_write_shares(cut_to_image(box, image), image)}\n"
            for box in image.boxes
            if not box.is_crowd
        ]
        yield f"labels/{name}", "".join(lines)


def _write_shares(box: LabelledBox, image: LabelledImage) -> str:
    left, top, width, height = box.xywh
    shares = (
        (left + width / 2) / image.width,
        (top + height / 2) / image.height,
        width / image.width,
        height / image.height,
    )
    return " ".join(repr(share) for share in shares)
