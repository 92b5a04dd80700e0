"""Pascal VOC: one XML per image, absolute corners.

The VOC devkit counts pixels from 1 and includes the last one: a box xmin=1, xmax=W covers a row of
W pixels, and is [0, W] here. LabelImg, CVAT, Datumaro and Roboflow write continuous corners from 0.
Which of the two a file means cannot be seen from its numbers, only from its <database>.

Source: VOC2012 devkit documentation, 3.4; attributes as Datumaro and CVAT write them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from xml.sax.saxutils import escape

from retinaray.data.image_paths import file_name_problem
from retinaray.errors import DatasetError
from retinaray.interchange.label_files import (
    CLASS_FILE,
    list_label_files,
    name_label_files,
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
from retinaray.interchange.xml_lines import Element, parse_xml

Origin = Literal["auto", "zero", "one"]

TRAITS = FormatTraits(has_scores=True)
_FLAGS = ("truncated", "occluded", "difficult")
_DEVKIT = re.compile(r"\bVOC20\d\d\b")
_CROWD = "is_crowd"
_SCORE = "score"
# XML 1.0 has no way to write these.
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def read_voc(
    folder: Path,
    *,
    names: tuple[str, ...] | None = None,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    origin: Origin = "auto",
) -> LabelledSet:
    """Read a folder of VOC files.

    Args:
        folder: With the XML files, or with `Annotations/`; subfolders become part of file names.
        names: Class names in their order; none = by alphabet.
        sizes: File name to height and width, for files without <size>.
        origin: Where pixels are counted from; `auto` = 1 where <database> names a VOC year, else 0.

    Raises:
        DatasetError: If a file cannot be read, with file and line.
    """
    inner = folder / "Annotations"
    root = inner if inner.is_dir() else folder
    notes: Counter[str] = Counter()
    images = [
        _read_file(root, name, sizes or {}, origin, notes)
        for name in list_label_files(root, ".xml")
    ]
    used = (box.name for image in images for box in image.boxes)
    return LabelledSet(tuple(images), order_names(used, names, str(folder)), notes=dict(notes))


def _read_file(
    root: Path,
    name: str,
    sizes: Mapping[str, tuple[int, int]],
    origin: Origin,
    notes: Counter[str],
) -> LabelledImage:
    tree = parse_xml(root / name)
    if tree.tag != "annotation":
        raise DatasetError(f"{tree.place}: expected <annotation>, found <{tree.tag}>")
    file_name = _read_file_name(tree, name)
    database = [found.text for source in tree.find_all("source") for found in source.children]
    is_devkit = any(_DEVKIT.search(text) for text in database)
    first = 1.0 if origin == "one" or (origin == "auto" and is_devkit) else 0.0
    if first and origin == "auto":
        notes["files of the VOC devkit, whose pixels count from 1"] += 1
    height, width = _read_size(tree, sizes.get(file_name))
    boxes = [_read_object(element, first, notes) for element in tree.find_all("object")]
    return LabelledImage(file_name, height, width, tuple(boxes))


def _read_file_name(tree: Element, xml_name: str) -> str:
    """The image's name; where it names no subfolder, that of its XML counts."""
    written = tree.need("filename").text.replace("\\", "/")
    plain = PurePosixPath(written).name if file_name_problem(written) else written
    if not plain:
        raise DatasetError(f"{tree.place}: expected a name in <filename>, found none")
    parent = PurePosixPath(xml_name).parent
    return plain if "/" in plain else str(parent / plain)


def _read_size(tree: Element, known: tuple[int, int] | None) -> tuple[int, int]:
    size = tree.find("size")
    sides = [0, 0]
    if size is not None:
        place = f"{size.place}, <size>"
        words = [size.need(tag).text for tag in ("height", "width")]
        sides = [int(number) for number in read_numbers(words, place)]
    if min(sides) > 0:
        return sides[0], sides[1]
    if known is None:
        raise DatasetError(
            f"{tree.place}: expected <size> with width and height > 0, found none; give the folder "
            "of the images with --images"
        )
    return known


def _read_object(element: Element, first: float, notes: Counter[str]) -> LabelledBox:
    name = element.need("name").text
    if not name:
        raise DatasetError(f"{element.place}: expected a class in <name>, found none")
    corners = element.need("bndbox")
    words = [corners.need(tag).text for tag in ("xmin", "ymin", "xmax", "ymax")]
    left, top, right, bottom = read_numbers(words, corners.place)
    left, top = left - first, top - first
    if right <= left or bottom <= top:
        raise DatasetError(
            f"{corners.place}: expected xmin < xmax and ymin < ymax, found {', '.join(words)}"
        )
    attributes = _read_attributes(element)
    is_crowd = attributes.pop(_CROWD, False) is True
    if is_crowd:
        # Written for tools that know nothing of crowds.
        attributes.pop("difficult", None)
    score = attributes.pop(_SCORE, None)
    if element.find("part") is not None:
        notes["parts of objects are left out"] += 1
    return LabelledBox(
        name,
        box_from_corners(left, top, right, bottom),
        is_crowd=is_crowd,
        score=score if isinstance(score, float) else None,
        attributes=attributes,
    )


def _read_attributes(element: Element) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for flag in _FLAGS:
        child = element.find(flag)
        if child is not None and child.text:
            found[flag] = bool(read_numbers([child.text], child.place)[0])
    pose = element.find("pose")
    if pose is not None and pose.text:
        found["pose"] = pose.text
    attributes = element.find("attributes")
    if attributes is not None:
        for entry in attributes.find_all("attribute"):
            found[entry.need("name").text] = _read_value(entry.need("value").text)
    return found


def _read_value(text: str) -> bool | float | str:
    if text in ("True", "False"):
        return text == "True"
    try:
        return float(text)
    except ValueError:
        return text


def write_voc(
    labels: LabelledSet, *, origin: Origin = "zero", source: str
) -> Iterator[tuple[str, str]]:
    """Write `Annotations/`, `ImageSets/Main/`, and the class names for us and for Datumaro.

    Args:
        labels: What to write. A crowd region becomes `difficult`, which VOC's scoring ignores, and
            says so in an attribute, too.
        origin: `one` writes corners as the devkit has them, anything else continuous ones.
        source: What messages call the data set.

    Yields:
        Name and content of each file.

    Raises:
        DatasetError: If two images would share a file, or a name cannot be written.
    """
    names = name_label_files(labels, ".xml", source)
    yield CLASS_FILE, write_class_lines(labels.names, source)
    stems = "".join(f"{name.removesuffix('.xml')}\n" for name in names)
    yield "ImageSets/Main/default.txt", stems
    if not any(":" in name for name in labels.names):
        # Without it Datumaro and CVAT take no classes but VOC's own twenty.
        lines = ["# label:color_rgb:parts:actions", *(f"{name}:::" for name in labels.names)]
        yield "labelmap.txt", "\n".join(lines) + "\n"
    first = 1.0 if origin == "one" else 0.0
    for image, name in zip(labels.images, names, strict=True):
        for text in (image.file_name, *(box.name for box in image.boxes)):
            if _NO_XML.search(text):
                raise DatasetError(f"{source}: {text!r} holds a character that XML has not")
        yield f"Annotations/{name}", _write_file(image, first)


def _write_file(image: LabelledImage, first: float) -> str:
    path = PurePosixPath(image.file_name)
    folder = "" if str(path.parent) == "." else str(path.parent)
    lines = [
        "<annotation>",
        f"  <folder>{escape(folder)}</folder>",
        f"  <filename>{escape(path.name)}</filename>",
        f"  <size><width>{image.width}</width><height>{image.height}</height>"
        "<depth>3</depth></size>",
        "  <segmented>0</segmented>",
        *(_write_object(box, first) for box in image.boxes),
        "</annotation>",
    ]
    return "\n".join(lines) + "\n"


def _show(number: float) -> str:
    """All digits; whole numbers as the devkit has them, since many readers take no others."""
    return f"{number:.0f}" if float(number).is_integer() else repr(number)


def _write_object(box: LabelledBox, first: float) -> str:
    left, top, right, bottom = box.xyxy
    corners = {"xmin": left + first, "ymin": top + first, "xmax": right, "ymax": bottom}
    numbers = "".join(f"<{tag}>{_show(number)}</{tag}>" for tag, number in corners.items())
    flags = {flag: bool(box.attributes.get(flag)) for flag in _FLAGS}
    flags["difficult"] |= box.is_crowd
    written = [flag for flag in _FLAGS if flag in box.attributes or flags[flag]]
    extra: dict[str, Any] = {
        key: value for key, value in box.attributes.items() if key not in (*_FLAGS, "pose")
    }
    extra |= {_CROWD: True} if box.is_crowd else {}
    extra |= {} if box.score is None else {_SCORE: box.score}
    pose = box.attributes.get("pose")
    lines = [
        "  <object>",
        f"    <name>{escape(box.name)}</name>",
        *([f"    <pose>{escape(str(pose))}</pose>"] if pose is not None else []),
        *(f"    <{flag}>{int(flags[flag])}</{flag}>" for flag in written),
        f"    <bndbox>{numbers}</bndbox>",
    ]
    if extra:
        entries = "".join(
            f"<attribute><name>{escape(str(key))}</name><value>{escape(str(value))}</value>"
            "</attribute>"
            for key, value in extra.items()
        )
        lines.append(f"    <attributes>{entries}</attributes>")
    return "\n".join([*lines, "  </object>"])
