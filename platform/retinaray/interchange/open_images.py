"""Open Images: a CSV with a line per box in 0..1, beside it the classes and the list of images.

`IsGroupOf`, a box around many objects that scoring ignores, is COCO's crowd. ImageID is the file
name without its ending; sizes are in the images only.

Source: storage.googleapis.com/openimages, "Data Formats" of V7; V5 and later write
class-descriptions-boxable.csv without a header, V6 and later with one.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from retinaray.errors import DatasetError
from retinaray.interchange.known_images import KnownImages
from retinaray.interchange.label_files import (
    CLASS_FILE,
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
    order_names,
)

_FLAGS = {
    "IsOccluded": "occluded",
    "IsTruncated": "truncated",
    "IsDepiction": "is_depiction",
    "IsInside": "is_inside",
}
TRAITS = FormatTraits(has_scores=True, attributes=frozenset(_FLAGS.values()), is_relative=True)
_SIDES = ("XMin", "XMax", "YMin", "YMax")
_COLUMNS = (
    *("ImageID", "Source", "LabelName", "Confidence", *_SIDES),
    *("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside"),
)
_BOXES = "annotations-bbox.csv"
_CLASSES = "class-descriptions-boxable.csv"
_IMAGES = "image_ids_and_rotation.csv"
_SUBSET = "default"
_IMAGE_COLUMNS = (
    *("ImageID", "Subset", "OriginalURL", "OriginalLandingURL", "License", "AuthorProfileURL"),
    *("Author", "Title", "OriginalSize", "OriginalMD5", "Thumbnail300KURL", "Rotation"),
)
_MACHINE = "machine"


def read_open_images(
    path: Path, *, names: tuple[str, ...] | None = None, known: KnownImages
) -> LabelledSet:
    """Read a CSV of boxes, or the folder that holds one.

    Args:
        path: The file of boxes, or a folder with one file `*annotations-bbox.csv`. Class
            descriptions beside it give names to codes such as /m/01g317.
        names: Class names in their order; none = by alphabet.
        known: All images, with their sizes.

    Returns:
        All known images.

    Raises:
        DatasetError: If a line cannot be read, with file and line, or a box has no image.
    """
    table = _find_table(path)
    shown_names = _read_descriptions(table.parent)
    # Open Images' own ids have no ending; those of other writers, such as Globox, have it.
    by_name = known.by_stem() | {image.file_name: image for image in known.images}
    boxes: dict[str, list[LabelledBox]] = {}
    for place, row in _read_rows(table):
        image = by_name.get(row["ImageID"])
        if image is None:
            raise DatasetError(
                f"{place}: expected an image {row['ImageID']!r} in {known.source}, found none; "
                "give the folder of these images with --images"
            )
        boxes.setdefault(image.file_name, []).append(_read_box(row, place, image, shown_names))
    used = (box.name for found in boxes.values() for box in found)
    images = [replace(image, boxes=tuple(boxes.get(image.file_name, ()))) for image in known.images]
    return LabelledSet(tuple(images), order_names(used, names, str(path)))


def _find_table(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.glob(f"*{_BOXES}"))
    if len(found) != 1:
        raise DatasetError(
            f"{path}: expected one file *{_BOXES}, found {len(found)}; name the file itself"
        )
    return found[0]


def _read_descriptions(folder: Path) -> dict[str, str]:
    path = folder / _CLASSES
    if not path.is_file():
        return {}
    rows = [row for row in csv.reader(io.StringIO(read_label_text(path))) if row]
    for number, row in enumerate(rows, 1):
        if len(row) != 2:
            raise DatasetError(f"{path}, line {number}: expected `LabelName,DisplayName`")
    names = {code: name for code, name in rows if (code, name) != ("LabelName", "DisplayName")}
    repeated = [name for name, count in Counter(names.values()).items() if count > 1]
    if repeated:
        raise DatasetError(f"{path}: two classes are called {repeated[0]!r}; rename one")
    return names


def _read_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(read_label_text(path)), strict=True)
    missing = [name for name in ("ImageID", "LabelName", *_SIDES) if name not in _header(reader)]
    if missing:
        raise DatasetError(
            f"{path}, line 1: expected the columns {', '.join(_COLUMNS)}; {missing[0]} is missing"
        )
    try:
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise DatasetError(f"{place}: expected {len(_header(reader))} columns, as line 1")
            yield place, row
    except csv.Error as error:
        raise DatasetError(f"{path}, line {reader.line_num}: expected CSV: {error}") from error


def _header(reader: csv.DictReader[str]) -> list[str]:
    return list(reader.fieldnames or [])


def _read_box(
    row: Mapping[str, str], place: str, image: LabelledImage, shown_names: Mapping[str, str]
) -> LabelledBox:
    words = [row[name] for name in _SIDES]
    left, right, top, bottom = read_numbers(words, place)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise DatasetError(
            f"{place}: expected 0 <= XMin < XMax <= 1 and 0 <= YMin < YMax <= 1, found "
            f"{', '.join(words)}"
        )
    confidence = read_numbers([row.get("Confidence") or "1"], place)[0]
    is_detection = row.get("Source") == _MACHINE or confidence != 1
    return LabelledBox(
        shown_names.get(row["LabelName"], row["LabelName"]),
        box_from_shares((left + right) / 2, (top + bottom) / 2, right - left, bottom - top, image),
        is_crowd=row.get("IsGroupOf") == "1",
        score=confidence if is_detection else None,
        # -1 means that nobody looked.
        attributes={
            name: row[column] == "1"
            for column, name in _FLAGS.items()
            if row.get(column) in ("0", "1")
        },
    )


def write_open_images(labels: LabelledSet, *, source: str) -> Iterator[tuple[str, str]]:
    """Write boxes, classes and images; boxes are cut to their image. LabelName is the class name.

    Yields:
        Name and content of each file.

    Raises:
        DatasetError: If two images would share an ImageID, or a name cannot be written.
    """
    ids = [name.removesuffix(".csv") for name in name_label_files(labels, ".csv", source)]
    yield CLASS_FILE, write_class_lines(labels.names, source)
    yield _CLASSES, _write_csv([name, name] for name in labels.names)
    blank = [""] * (len(_IMAGE_COLUMNS) - 2)
    yield (
        _IMAGES,
        _write_csv([_IMAGE_COLUMNS, *([image_id, _SUBSET, *blank] for image_id in ids)]),
    )
    rows = (
        _write_box(image_id, cut_to_image(box, image), image)
        for image_id, image in zip(ids, labels.images, strict=True)
        for box in image.boxes
    )
    yield f"{_SUBSET}-{_BOXES}", _write_csv([_COLUMNS, *rows])


def _write_csv(rows: object) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)  # type: ignore[arg-type]
    return out.getvalue()


def _write_box(image_id: str, box: LabelledBox, image: LabelledImage) -> list[object]:
    left, top, right, bottom = box.xyxy
    flags = {
        column: int(bool(box.attributes[name])) if name in box.attributes else -1
        for column, name in _FLAGS.items()
    }
    return [
        image_id,
        "" if box.score is None else _MACHINE,
        box.name,
        1 if box.score is None else repr(float(box.score)),
        *(repr(side / image.width) for side in (left, right)),
        *(repr(side / image.height) for side in (top, bottom)),
        flags["IsOccluded"],
        flags["IsTruncated"],
        int(box.is_crowd),
        flags["IsDepiction"],
        flags["IsInside"],
    ]
