"""COCO JSON as plain columns: parsed once, one list or array per key, nothing judged or repaired.

The reader (`coco`), the checks (`table_faults`, `box_faults`) and the repair (`dataset_repair`)
look through it, so that they cannot disagree about what an id or a box is. It opens no image.
M annotations, N images, K categories. A key that holds null counts as absent.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinaray.data.annotation_formats import (
    is_json_lines,
    list_keys,
    name_foreign_content,
    name_foreign_document,
)
from retinaray.data.coco_ids import positions_of
from retinaray.errors import DatasetError

Entry = dict[str, Any]

_LISTS = ("images", "annotations", "categories")
_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "true or false",
}
_CROWD_SPELLINGS: dict[object, bool] = {"0": False, "1": True, 0.0: False, 1.0: True}


class BoxFormat(IntEnum):
    """How a `bbox` value is written; only NUMBERS is legal in COCO."""

    NUMBERS = 0
    ABSENT = 1
    NUMERIC_STRINGS = 2
    UNUSABLE = 3


class CrowdFormat(IntEnum):
    """How `iscrowd` is written; INTEGER is 0 or 1, OTHER_SPELLING true, "1", 0.0 and the like."""

    INTEGER = 0
    ABSENT = 1
    OTHER_SPELLING = 2
    UNUSABLE = 3


class BoxVerdict(IntEnum):
    """What can be wrong with four numbers as a box; only GOOD can be trained on."""

    GOOD = 0
    NON_FINITE = 1
    NEGATIVE = 2
    ZERO = 3
    OUTSIDE = 4


@dataclass(frozen=True)
class CocoTables:
    """The three tables of one COCO file, as parsed.

    Attributes:
        document: The whole JSON object, with keys such as `info` that nothing here reads.
        images: `document["images"]`.
        annotations: `document["annotations"]`.
        categories: `document["categories"]`.
        source: What messages call the file.
    """

    document: Entry
    images: list[Entry]
    annotations: list[Entry]
    categories: list[Entry]
    source: str


@dataclass(frozen=True)
class AnnotationColumns:
    """What every check asks about annotations, computed once.

    Attributes:
        image_positions: int64 [M], index into the image table, -1 when unknown.
        category_positions: int64 [M], index into the category table, -1 when unknown.
        xywh: float64 [M, 4] as written, NaN where there are no four numbers.
        formats: int8 [M], `BoxFormat`.
        verdicts: int8 [M], `BoxVerdict`; NON_FINITE where `formats` has no numbers.
        clipped_xyxy: float32 [M, 4], cut to the image; not cut where its size is unknown.
        heights: float64 [M], height of the annotation's image, NaN when unknown.
        widths: float64 [M], likewise.
        areas: float64 [M] as written, NaN where there is no number >= 0.
        is_crowd: bool [M], False where `crowd_formats` is ABSENT or UNUSABLE.
        crowd_formats: int8 [M], `CrowdFormat`.
    """

    image_positions: NDArray[np.int64]
    category_positions: NDArray[np.int64]
    xywh: NDArray[np.float64]
    formats: NDArray[np.int8]
    verdicts: NDArray[np.int8]
    clipped_xyxy: NDArray[np.float32]
    heights: NDArray[np.float64]
    widths: NDArray[np.float64]
    areas: NDArray[np.float64]
    is_crowd: NDArray[np.bool_]
    crowd_formats: NDArray[np.int8]


def read_coco_tables(
    annotations: bytes | str | os.PathLike[str], *, source: str = ""
) -> CocoTables:
    """Parse a COCO file given by its bytes or its local path.

    Raises:
        DatasetError: If it cannot be opened, is no JSON, or is not shaped like COCO.
    """
    if isinstance(annotations, bytes):
        name = source or "annotations"
        return tables_of(_parse_json(annotations, name), name)
    name = source or str(annotations)
    try:
        data = Path(annotations).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DatasetError(f"{name}: cannot read the annotation file ({reason})") from error
    return tables_of(_parse_json(data, name), name)


def _parse_json(data: bytes, name: str) -> object:
    expected = f"{name}: expected COCO JSON"
    if not data.strip():
        raise DatasetError(f"{expected}, found an empty file")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        if is_json_lines(data):
            raise DatasetError(
                f"{expected}, found JSON Lines, an object per line; write one object with the "
                f"lists {', '.join(_LISTS)}"
            ) from error
        found = name_foreign_content(data, name)
        if found:
            raise DatasetError(f"{expected}, found {found}") from error
        hint = "; it ends in the middle: copy it again" if _is_cut_short(error) else ""
        raise DatasetError(f"{expected}, cannot parse it: {error}{hint}") from error


def _is_cut_short(error: Exception) -> bool:
    if not isinstance(error, json.JSONDecodeError):
        return False
    # A string cut in two is reported at its start, so the position alone does not tell.
    return error.msg.startswith("Unterminated") or not error.doc[error.pos :].strip()


def tables_of(document: object, source: str) -> CocoTables:
    """Check the outer shape of a parsed COCO file: an object with three lists of objects.

    Raises:
        DatasetError: Naming every list that is missing or holds something else.
    """
    known = name_foreign_document(document, source)
    hint = f" ({known})" if known else ""
    if not isinstance(document, dict):
        raise DatasetError(
            f"{source}: not COCO: expected an object with {', '.join(_LISTS)}, "
            f"found {_name_kind(document)}{hint}"
        )
    problems = [
        problem for key in _LISTS if (problem := _table_problem(key, document.get(key))) is not None
    ]
    if problems:
        found = "" if set(_LISTS) <= document.keys() else f"; found {list_keys(document)}"
        raise DatasetError(f"{source}: not COCO: {'; '.join(problems)}{found}{hint}")
    images, annotations, categories = (document[key] for key in _LISTS)
    return CocoTables(document, images, annotations, categories, source)


def _table_problem(key: str, value: object) -> str | None:
    if value is None:
        return f"`{key}` is missing"
    if not isinstance(value, list):
        return f"`{key}` is {_name_kind(value)}, expected a list"
    for index, entry in enumerate(value):
        if type(entry) is not dict:
            return f"{key}[{index}] is {_name_kind(entry)}, expected an object"
    return None


def _name_kind(value: object) -> str:
    """A JSON value's type in JSON's words, with its article."""
    return _KINDS.get(type(value), "null")


def column(entries: Sequence[Entry], key: str) -> list[Any]:
    """One key of every entry, None where it is absent."""
    return [entry.get(key) for entry in entries]


def numbers(values: Sequence[object]) -> NDArray[np.float64]:
    """float64 of a column; NaN for whatever is no JSON number (strings and booleans too)."""
    if set(map(type, values)) <= {int, float}:
        try:
            return np.array(values, dtype=np.float64)
        except OverflowError:  # an integer beyond float64 somewhere: one by one
            pass
    return np.fromiter((_number(value) for value in values), np.float64, count=len(values))


def _number(value: object) -> float:
    if type(value) is not int and type(value) is not float:
        return float("nan")
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def image_sizes(images: Sequence[Entry]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Heights and widths, float64 [N] each; NaN unless a positive whole number."""
    sizes = []
    for key in ("height", "width"):
        values = numbers(column(images, key))
        whole = np.isfinite(values) & (values > 0) & (values == np.floor(values))
        sizes.append(np.where(whole, values, np.nan))
    return sizes[0], sizes[1]


def parse_boxes(values: Sequence[object]) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
    """`bbox` values as numbers.

    Returns:
        xywh float64 [M, 4], NaN where unusable (numeric strings are converted), and `BoxFormat`
        int8 [M].
    """
    lists: Sequence[Any] = values
    if set(map(type, values)) <= {list} and set(map(len, lists)) <= {4}:
        flat = list(chain.from_iterable(lists))
        if set(map(type, flat)) <= {int, float}:
            return numbers(flat).reshape(-1, 4), np.zeros(len(values), np.int8)
    rows = [_parse_box(value) for value in values]
    formats = np.array([kind for _, kind in rows], np.int8)
    return np.array([box for box, _ in rows], np.float64).reshape(-1, 4), formats


def _parse_box(value: object) -> tuple[list[float], BoxFormat]:
    unusable = [float("nan")] * 4
    if value is None:
        return unusable, BoxFormat.ABSENT
    if not isinstance(value, list) or len(value) != 4:
        return unusable, BoxFormat.UNUSABLE
    kinds = set(map(type, value))
    if kinds <= {int, float}:
        return [_number(item) for item in value], BoxFormat.NUMBERS
    if not kinds <= {int, float, str}:
        return unusable, BoxFormat.UNUSABLE
    try:
        return [float(item) for item in value], BoxFormat.NUMERIC_STRINGS
    except (ValueError, OverflowError):
        return unusable, BoxFormat.UNUSABLE


def parse_crowd_flags(values: Sequence[object]) -> tuple[NDArray[np.bool_], NDArray[np.int8]]:
    """`iscrowd` values as flags: bool [M], and `CrowdFormat` int8 [M]."""
    count = len(values)
    if set(map(type, values)) == {int}:
        whole = numbers(values)
        legal = (whole == 0) | (whole == 1)
        formats = np.where(legal, CrowdFormat.INTEGER, CrowdFormat.UNUSABLE)
        return whole == 1, formats.astype(np.int8)
    rows = [_parse_crowd_flag(value) for value in values]
    flags = np.fromiter((flag for flag, _ in rows), np.bool_, count=count)
    return flags, np.fromiter((kind for _, kind in rows), np.int8, count=count)


def _parse_crowd_flag(value: object) -> tuple[bool, CrowdFormat]:
    if value is None:
        return False, CrowdFormat.ABSENT
    if not isinstance(value, int | float | str) or value not in _CROWD_SPELLINGS:
        return False, CrowdFormat.UNUSABLE
    kind = CrowdFormat.INTEGER if type(value) is int else CrowdFormat.OTHER_SPELLING
    return _CROWD_SPELLINGS[value], kind


def judge_boxes(
    xywh: NDArray[np.float64], heights: NDArray[np.float64], widths: NDArray[np.float64]
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Cut boxes to their images and say which are worth keeping.

    Args:
        xywh: float64 [M, 4], corner and size in original pixels, NaN where there is no box.
        heights: float64 [M], NaN where the image's size is unknown: nothing is cut there.
        widths: float64 [M], likewise.

    Returns:
        `BoxVerdict` int8 [M], and float32 [M, 4] xyxy cut to [0, width] x [0, height]. A side that
        float32 cannot tell from zero counts as zero.
    """
    limits = np.stack([widths, heights, widths, heights], axis=-1)
    limits[np.isnan(limits)] = np.inf
    with np.errstate(invalid="ignore", over="ignore"):
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        clipped = np.minimum(np.maximum(corners, 0.0), limits)
        single = clipped.astype(np.float32)
        outside = np.any(clipped[:, 2:] <= clipped[:, :2], axis=1)
        collapsed = np.any(single[:, 2:] <= single[:, :2], axis=1)
    zero = np.any(xywh[:, 2:] == 0, axis=1) | (collapsed & ~outside)
    verdicts = np.select(
        [~np.isfinite(corners).all(axis=1), np.any(xywh[:, 2:] < 0, axis=1), zero, outside],
        [BoxVerdict.NON_FINITE, BoxVerdict.NEGATIVE, BoxVerdict.ZERO, BoxVerdict.OUTSIDE],
        BoxVerdict.GOOD,
    )
    return verdicts.astype(np.int8), single


def annotation_columns(tables: CocoTables) -> AnnotationColumns:
    """Look up every annotation's image and category, and judge its box."""
    annotations = tables.annotations
    image_positions = positions_of(column(annotations, "image_id"), column(tables.images, "id"))
    category_positions = positions_of(
        column(annotations, "category_id"), column(tables.categories, "id")
    )
    # Position -1 (unknown image) picks the NaN appended at the end.
    heights, widths = (np.append(side, np.nan) for side in image_sizes(tables.images))
    xywh, formats = parse_boxes(column(annotations, "bbox"))
    of_height, of_width = heights[image_positions], widths[image_positions]
    verdicts, clipped_xyxy = judge_boxes(xywh, of_height, of_width)
    areas = numbers(column(annotations, "area"))
    is_crowd, crowd_formats = parse_crowd_flags(column(annotations, "iscrowd"))
    return AnnotationColumns(
        image_positions=image_positions,
        category_positions=category_positions,
        xywh=xywh,
        formats=formats,
        verdicts=verdicts,
        clipped_xyxy=clipped_xyxy,
        heights=of_height,
        widths=of_width,
        areas=np.where(np.isfinite(areas) & (areas >= 0), areas, np.nan),
        is_crowd=is_crowd,
        crowd_formats=crowd_formats,
    )


def without_sizes(columns: AnnotationColumns, is_disputed: NDArray[np.bool_]) -> AnnotationColumns:
    """The columns as if some images had no size: their boxes are judged, but not against an edge.

    Args:
        columns: As computed from the tables.
        is_disputed: bool [N], the images whose size is in doubt.
    """
    # An unknown image (position -1) meets the False appended at the end.
    unknown = np.append(is_disputed, False)[columns.image_positions]
    heights = np.where(unknown, np.nan, columns.heights)
    widths = np.where(unknown, np.nan, columns.widths)
    verdicts, clipped_xyxy = judge_boxes(columns.xywh, heights, widths)
    return replace(
        columns, verdicts=verdicts, clipped_xyxy=clipped_xyxy, heights=heights, widths=widths
    )
