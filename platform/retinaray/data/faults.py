"""What can be wrong with a COCO data set: the catalogue of faults, and how each is worded.

`table_faults` and `box_faults` find those that the JSON alone shows, `image_files` those that need
the images. Here is also how an entry is named to the user. Severity says what retinaray would do:

- error: it refuses the file, loses a label, or would train or score on something wrong. Any error
  makes a data set unclean (`retinaray doctor` exits with 1).
- warning: it works as written; other tools may not, or the user should know.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retinaray.data.coco_columns import AnnotationColumns, BoxVerdict, CocoTables

Severity = Literal["error", "warning"]
_SHOWN_CHARACTERS = 60
_SYSTEMATIC_COUNT = 10
_TOO_MANY = "too many for --fix: is it the right file, folder and notation?"


@dataclass(frozen=True)
class Fault:
    """One kind of fault found in a data set.

    Attributes:
        code: Stable name, a key of `FAULT_KINDS`.
        count: How many entries have it, at least 1.
        examples: The first few, each naming its image or annotation.
        fixable: Whether `repair_dataset` removes all of them.
        advice: What the repair does, or what to do by hand.
        severity: See the module.
    """

    code: str
    count: int
    examples: tuple[str, ...]
    fixable: bool
    advice: str
    severity: Severity


class FaultKind(NamedTuple):
    """What is always the same about a fault."""

    severity: Severity
    fixable: bool
    advice: str


_DROP = "--fix drops the annotation"
FAULT_KINDS: dict[str, FaultKind] = {
    "no_images": FaultKind("error", False, "is this the file you meant?"),
    "no_categories": FaultKind("error", False, "add the classes to `categories`"),
    "invalid_ids": FaultKind("error", False, "give the entry an integer or string `id`"),
    "mixed_id_types": FaultKind("error", True, "--fix writes every id in the table's type"),
    "duplicate_image_ids": FaultKind("error", True, "--fix keeps the first of the equal entries"),
    "conflicting_image_ids": FaultKind("error", False, "two files share an id: renumber by hand"),
    "duplicate_category_ids": FaultKind("error", True, "--fix keeps the first of equal entries"),
    "conflicting_category_ids": FaultKind("error", False, "two names share an id: renumber"),
    "missing_file_name": FaultKind("error", False, "add `file_name`, or drop the image"),
    "unsafe_file_name": FaultKind("error", False, "use names relative to the image folder"),
    "duplicate_file_names": FaultKind(
        "error", False, "boxes of one entry are background in the other: merge them"
    ),
    "missing_size": FaultKind("error", True, "--fix reads height and width from the file"),
    "unknown_image": FaultKind("error", True, _DROP),
    "unknown_category": FaultKind("error", False, "add the class to `categories`, or drop these"),
    "missing_bbox": FaultKind("error", True, _DROP),
    "unusable_bbox": FaultKind("error", True, f"expected [x, y, width, height]; {_DROP}"),
    "string_bbox": FaultKind("error", True, "--fix writes the numbers as numbers"),
    "non_finite_box": FaultKind("error", True, _DROP),
    "negative_size_box": FaultKind("error", True, _DROP),
    "zero_size_box": FaultKind("error", True, _DROP),
    "outside_box": FaultKind("error", True, _DROP),
    "duplicate_boxes": FaultKind("error", True, "same image, class and box; --fix keeps the first"),
    "boxes_look_xyxy": FaultKind(
        "error", False, "these look like x1, y1, x2, y2: convert to x, y, width, height"
    ),
    "boxes_look_normalised": FaultKind("error", False, "every box lies in 0..1: scale to pixels"),
    "invalid_iscrowd": FaultKind("error", False, "expected 0 or 1"),
    "missing_annotation_ids": FaultKind("error", True, "--fix gives it a free integer id"),
    "duplicate_annotation_ids": FaultKind(
        "error", True, "pycocotools scores only the last of them; --fix renumbers the later ones"
    ),
    "zero_annotation_id": FaultKind(
        "error", True, "pycocotools counts a match with id 0 as a miss; --fix renumbers it"
    ),
    "partly_outside_box": FaultKind("warning", True, "clipped when read; --fix clips it"),
    "tiny_box": FaultKind("warning", False, "no detector learns a side below 1 px: check, or drop"),
    "missing_area": FaultKind("warning", True, "taken as width x height; --fix writes it"),
    "contradicting_area": FaultKind(
        "warning", True, "size-wise AP goes by area; --fix writes width x height"
    ),
    "missing_iscrowd": FaultKind("warning", True, "taken as 0; --fix writes it"),
    "iscrowd_not_integer": FaultKind("warning", True, "read as 0 or 1; --fix writes that"),
    "crowd_boxes": FaultKind("warning", False, "ignored in training and scoring, as COCO defines"),
    "string_ids": FaultKind("warning", False, "kept as they are; int-only tools fail on them"),
    "huge_ids": FaultKind("warning", False, "kept as they are; int32 tools wrap them"),
    "unsorted_categories": FaultKind(
        "warning", True, "tools that go by position mislabel; --fix sorts by id"
    ),
    "missing_category_name": FaultKind("warning", True, "shown as its id; --fix writes that"),
    "duplicate_category_names": FaultKind("warning", False, "rename, or merge the classes"),
    "images_without_boxes": FaultKind("warning", False, "kept as negatives"),
    "classes_without_boxes": FaultKind("warning", False, "cannot be learnt or scored here"),
    "missing_file": FaultKind("error", True, "--fix drops the image and its annotations"),
    "unreadable_file": FaultKind("error", True, "--fix drops the image and its annotations"),
    "size_mismatch": FaultKind("error", True, "boxes fit the file; --fix writes the file's size"),
    "size_swapped": FaultKind("error", True, "height and width exchanged; --fix exchanges them"),
    "exif_unrotated_size": FaultKind(
        "error", True, "boxes fit the upright photo; --fix writes the upright size"
    ),
    "size_unclear": FaultKind(
        "error", False, "boxes may belong to another version of the image: overlay and rescale"
    ),
    "exif_size_unclear": FaultKind(
        "error", False, "boxes may be drawn on the unrotated photo: overlay one, then re-export"
    ),
    "exif_orientation": FaultKind(
        "warning", False, "turned upright when read; tools that ignore EXIF misplace the boxes"
    ),
}


def make_fault(
    code: str,
    where: Iterable[int] | NDArray[np.int64],
    describe: Callable[[int], str],
    *,
    max_examples: int,
    fixable: bool = True,
) -> list[Fault]:
    """A fault of the catalogue for the entries at `where`: one, or none when `where` is empty.

    Args:
        code: Key of `FAULT_KINDS`.
        where: Indices of the faulty entries, in file order.
        describe: Index to the line that shows it.
        max_examples: How many are shown.
        fixable: False takes the catalogue's fixability away, because there are too many.
    """
    indices = [int(index) for index in where]
    if not indices:
        return []
    kind = FAULT_KINDS[code]
    advice = kind.advice if fixable or not kind.fixable else _TOO_MANY
    examples = tuple(describe(index) for index in indices[:max_examples])
    return [Fault(code, len(indices), examples, kind.fixable and fixable, advice, kind.severity)]


def is_systematic(num_faulty: int, num_entries: int) -> bool:
    """Whether a fault is no slip but a convention: ten or more entries, and more than half.

    To drop or cut them all would destroy the data set, where another reading may save it.
    """
    return num_faulty >= _SYSTEMATIC_COUNT and 2 * num_faulty > num_entries


def show(value: object) -> str:
    """A JSON value as the file spells it, shortened: 3 and "3" look different."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _shown_name(name: object) -> str:
    """A name without quotes; control characters stay escaped, for it goes to a terminal."""
    return show(name).strip('"')


def image_label(tables: CocoTables, index: int) -> str:
    """`image 1729 (a.jpg)`; by place in the file where it has no id."""
    entry = tables.images[index]
    name = f"image {show(entry['id'])}" if entry.get("id") is not None else f"images[{index}]"
    return f"{name} ({_shown_name(entry['file_name'])})" if entry.get("file_name") else name


def category_label(tables: CocoTables, index: int) -> str:
    """`category 3 (car)`; by place in the file where it has no id."""
    entry = tables.categories[index]
    known = entry.get("id") is not None
    name = f"category {show(entry['id'])}" if known else f"categories[{index}]"
    return f"{name} ({_shown_name(entry['name'])})" if entry.get("name") else name


def annotation_label(tables: CocoTables, index: int) -> str:
    """`annotation 12 of image 1729`; by place in the file where it has no id."""
    entry = tables.annotations[index]
    known = entry.get("id") is not None
    name = f"annotation {show(entry['id'])}" if known else f"annotations[{index}]"
    return f"{name} of image {show(entry.get('image_id'))}"


def field_label(tables: CocoTables, index: int, *, key: str) -> str:
    """`annotation 12 of image 1729: area is "big"`."""
    value = tables.annotations[index].get(key)
    return f"{annotation_label(tables, index)}: {key} is {show(value)}"


def box_label(
    tables: CocoTables, columns: AnnotationColumns, index: int, *, good_problem: str = ""
) -> str:
    """`annotation 12 of image 1729: box (10, 5, 0, 4) has zero width`.

    A box whose verdict is GOOD has `good_problem`. The image's size follows where the box's place
    matters.
    """
    box = columns.xywh[index].tolist()
    verdict = int(columns.verdicts[index])
    problem = good_problem if verdict == BoxVerdict.GOOD else _box_problem(box, verdict)
    if np.isfinite(columns.heights[index]) and (verdict == BoxVerdict.OUTSIDE or "edge" in problem):
        problem += f" (height {columns.heights[index]:g}, width {columns.widths[index]:g})"
    numbers = ", ".join(f"{number:.10g}" for number in box)
    return f"{annotation_label(tables, index)}: box ({numbers}) {problem}"


def _box_problem(xywh: Sequence[float], verdict: int) -> str:
    sides = {"width": xywh[2], "height": xywh[3]}
    if verdict == BoxVerdict.NON_FINITE:
        return "is not finite"
    if verdict == BoxVerdict.NEGATIVE:
        return f"has negative {' and '.join(name for name, side in sides.items() if side < 0)}"
    if verdict == BoxVerdict.ZERO:
        flat = [name for name, side in sides.items() if side == 0]
        return f"has zero {' and '.join(flat) or 'size in single precision'}"
    return "lies outside its image"
