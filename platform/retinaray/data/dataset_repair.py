"""Writes a repaired copy of a COCO data set: whatever has one obvious right answer, nothing else.

Each step looks with the same eyes as the doctor, so that what the doctor calls fixable is gone
afterwards. Labels are dropped only where they say nothing: no image, no four numbers, no extent, or
a word-for-word copy. Keys that COCO does not define are carried over.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retinaray.data.box_faults import (
    DEGENERATE_BOX_CODES,
    areas_of_boxes,
    boxes_are_systematically_outside,
    contradicting_areas,
    later_duplicates,
    misread_boxes,
    missing_areas,
    overshooting,
)
from retinaray.data.coco_columns import (
    AnnotationColumns,
    BoxFormat,
    BoxVerdict,
    CocoTables,
    CrowdFormat,
    Entry,
    annotation_columns,
    column,
    image_sizes,
    read_coco_tables,
    tables_of,
    without_sizes,
)
from retinaray.data.coco_ids import IdKind, id_kinds, id_target, positions_of, unify_id
from retinaray.data.dataset_doctor import DoctorReport, examine_tables
from retinaray.data.faults import FAULT_KINDS
from retinaray.data.image_files import (
    FileHeader,
    FileState,
    folder_is_plausible,
    judge_sizes,
    read_headers,
)
from retinaray.data.table_faults import (
    integer_ids,
    nameless,
    references_are_systematically_unknown,
    repeated,
    split_duplicates,
)
from retinaray.errors import DatasetError

_MAX_PASSES = 10
_AREA_IS_BOX_TOLERANCE = 0.01


@dataclass
class _Repair:
    """The data set under repair, and what has been done to it, by fault code."""

    tables: CocoTables
    headers: list[FileHeader] | None
    done: Counter[str] = field(default_factory=Counter)

    def drop(self, table: str, indices_by_code: Mapping[str, Iterable[int]]) -> None:
        """Drop entries of one table, with their headers where it is the image table."""
        gone: set[int] = set()
        for code, indices in indices_by_code.items():
            fresh = set(map(int, indices)) - gone
            self.done[code] += len(fresh)
            gone |= fresh
        if not gone:
            return
        entries = [e for i, e in enumerate(self.tables.document[table]) if i not in gone]
        document = {**self.tables.document, table: entries}
        self.tables = tables_of(document, self.tables.source)
        if table == "images" and self.headers is not None:
            self.headers = [h for i, h in enumerate(self.headers) if i not in gone]

    def columns(self) -> AnnotationColumns:
        """As the doctor sees them: boxes are not cut at an edge that is in dispute."""
        columns = annotation_columns(self.tables)
        if self.headers is None:
            return columns
        codes = judge_sizes(self.tables, columns, self.headers)
        return without_sizes(columns, np.array([bool(code) for code in codes], np.bool_))


def repair_dataset(
    annotations_path: str | os.PathLike[str],
    images_root: str | os.PathLike[str] | None,
    output_path: str | os.PathLike[str],
    *,
    num_threads: int = 8,
) -> DoctorReport:
    """Write a repaired copy of a COCO file; the input is never touched.

    Args:
        annotations_path: Local COCO file.
        images_root: Folder of the images; None to repair only what needs no image.
        output_path: Where the copy goes, whole or not at all; another file there is replaced.
        num_threads: How many image headers are read at once.

    Returns:
        What is still wrong with the copy, none of it fixable here, and what was repaired: entries
        changed by fault code, and `annotation_of_dropped_image`.

    Raises:
        DatasetError: If the input cannot be read as COCO, the folder does not exist, or the output
            is the input or cannot be written.
    """
    source, target = Path(annotations_path), Path(output_path)
    tables = read_coco_tables(source)
    if target.resolve() == source.resolve() or (target.exists() and target.samefile(source)):
        raise DatasetError(f"{target} is the file under repair; name another output file")
    headers = None
    if images_root is not None:
        headers = read_headers(tables.images, str(images_root), num_threads=num_threads)
    repair = _Repair(tables, headers)
    # One mended fault can bring another to light: a clipped box may equal its neighbour.
    for _ in range(_MAX_PASSES):
        before = repair.done.total()
        for step in _STEPS:
            step(repair)
        if repair.done.total() == before:
            break
    repaired = replace(repair.tables, source=str(target))
    report = examine_tables(repaired, repair.headers, has_images=images_root is not None)
    _write_atomically(repair.tables.document, target)
    return replace(report, repairs={code: n for code, n in sorted(repair.done.items()) if n})


def _write_atomically(document: Entry, target: Path) -> None:
    partial_path = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial_path.open("w", encoding="ascii") as file:
            file.write(json.dumps(document))
            file.flush()
            os.fsync(file.fileno())
        partial_path.replace(target)
    except OSError as error:
        if partial_path.exists():
            partial_path.unlink()
        raise DatasetError(f"cannot write {target}: {error}") from error


def _unify_ids(repair: _Repair) -> None:
    tables = repair.tables
    for entries, key in ((tables.images, "image_id"), (tables.categories, "category_id")):
        ids, references = column(entries, "id"), column(tables.annotations, key)
        target = id_target(ids)
        known = positions_of(references, ids) >= 0
        misspelt = np.flatnonzero(known & (id_kinds(references) != target))
        for index in misspelt:
            tables.annotations[index][key] = unify_id(references[index], target)
        kinds = id_kinds(ids)
        strays = np.flatnonzero((kinds != target) & (kinds != IdKind.INVALID))
        for index in strays:
            entries[index]["id"] = unify_id(ids[index], target)
        repair.done["mixed_id_types"] += len(misspelt) + len(strays)


def _merge_equal_entries(repair: _Repair) -> None:
    equal_images, _ = split_duplicates(repair.tables.images, "file_name")
    equal_categories, _ = split_duplicates(repair.tables.categories, "name")
    repair.drop("images", {"duplicate_image_ids": equal_images})
    repair.drop("categories", {"duplicate_category_ids": equal_categories})


def _drop_images_without_file(repair: _Repair) -> None:
    if repair.headers is None or not folder_is_plausible(repair.headers):
        return
    states = [header.state for header in repair.headers]
    codes = {"missing_file": FileState.MISSING, "unreadable_file": FileState.UNREADABLE}
    before = _image_positions(repair)
    repair.drop(
        "images",
        {
            code: [i for i, state in enumerate(states) if state is gone]
            for code, gone in codes.items()
        },
    )
    orphans = np.flatnonzero((before >= 0) & (_image_positions(repair) < 0))
    repair.drop("annotations", {"annotation_of_dropped_image": orphans})


def _image_positions(repair: _Repair) -> NDArray[np.int64]:
    references = column(repair.tables.annotations, "image_id")
    return positions_of(references, column(repair.tables.images, "id"))


def _correct_sizes(repair: _Repair) -> None:
    if repair.headers is None or not folder_is_plausible(repair.headers):
        return
    tables = repair.tables
    codes = judge_sizes(tables, annotation_columns(tables), repair.headers)
    for index in np.flatnonzero(np.isnan(image_sizes(tables.images)).any(axis=0)):
        codes[index] = "missing_size"
    for entry, header, code in zip(tables.images, repair.headers, codes, strict=True):
        if code and FAULT_KINDS[code].fixable and header.state is FileState.READ:
            entry["height"], entry["width"] = header.height, header.width
            repair.done[code] += 1


def _mend_box_notation(repair: _Repair) -> None:
    columns = repair.columns()
    strings = np.flatnonzero(columns.formats == BoxFormat.NUMERIC_STRINGS)
    for index in strings:
        repair.tables.annotations[index]["bbox"] = columns.xywh[index].tolist()
    repair.done["string_bbox"] += len(strings)
    unknown = columns.image_positions < 0
    if references_are_systematically_unknown(columns.image_positions):
        unknown[:] = False
    repair.drop(
        "annotations",
        {
            "unknown_image": np.flatnonzero(unknown),
            "missing_bbox": np.flatnonzero(columns.formats == BoxFormat.ABSENT),
            "unusable_bbox": np.flatnonzero(columns.formats == BoxFormat.UNUSABLE),
        },
    )


def _mend_geometry(repair: _Repair) -> None:
    columns = repair.columns()
    if misread_boxes(columns) is not None:
        return
    kept_verdicts = {BoxVerdict.OUTSIDE} if boxes_are_systematically_outside(columns) else set()
    cut = np.flatnonzero(overshooting(columns) & (not kept_verdicts))
    box_areas = areas_of_boxes(columns)
    for index in cut:
        entry = repair.tables.annotations[index]
        entry["bbox"] = _clip(entry["bbox"], columns.heights[index], columns.widths[index])
        surplus = abs(columns.areas[index] - box_areas[index])
        if surplus <= _AREA_IS_BOX_TOLERANCE * box_areas[index]:
            entry["area"] = entry["bbox"][2] * entry["bbox"][3]
    repair.done["partly_outside_box"] += len(cut)
    repair.drop(
        "annotations",
        {
            code: np.flatnonzero(columns.verdicts == verdict)
            for verdict, code in DEGENERATE_BOX_CODES.items()
            if verdict not in kept_verdicts
        },
    )


def _drop_duplicate_boxes(repair: _Repair) -> None:
    columns = repair.columns()
    if misread_boxes(columns) is None:
        repair.drop("annotations", {"duplicate_boxes": np.flatnonzero(later_duplicates(columns))})


def _clip(xywh: list[float], height: float, width: float) -> list[float]:
    """Cut a box to its image; an unknown edge (NaN) does not cut."""
    left, top = max(xywh[0], 0), max(xywh[1], 0)
    right, bottom = xywh[0] + xywh[2], xywh[1] + xywh[3]
    right = width if right > width else right
    bottom = height if bottom > height else bottom
    return [float(left), float(top), float(right - left), float(bottom - top)]


def _write_areas(repair: _Repair) -> None:
    columns = repair.columns()
    if misread_boxes(columns) is not None:
        return
    box_areas = areas_of_boxes(columns)
    for mask, code in (
        (missing_areas(columns), "missing_area"),
        (contradicting_areas(repair.tables, columns), "contradicting_area"),
    ):
        for index in np.flatnonzero(mask):
            repair.tables.annotations[index]["area"] = float(box_areas[index])
        repair.done[code] += int(np.count_nonzero(mask))


def _write_crowd_flags(repair: _Repair) -> None:
    columns = repair.columns()
    for kind, code in (
        (CrowdFormat.ABSENT, "missing_iscrowd"),
        (CrowdFormat.OTHER_SPELLING, "iscrowd_not_integer"),
    ):
        indices = np.flatnonzero(columns.crowd_formats == kind)
        for index in indices:
            repair.tables.annotations[index]["iscrowd"] = int(columns.is_crowd[index])
        repair.done[code] += len(indices)


def _number_annotations(repair: _Repair) -> None:
    annotations = repair.tables.annotations
    whole = integer_ids(annotations)
    free = count(max((value for value in whole if value is not None), default=0) + 1)
    for indices, code in (
        ([i for i, value in enumerate(whole) if value is None], "missing_annotation_ids"),
        (repeated(whole), "duplicate_annotation_ids"),
        ([i for i, value in enumerate(whole) if value == 0], "zero_annotation_id"),
    ):
        for index in indices:
            annotations[index]["id"] = next(free)
        repair.done[code] += len(indices)


def _mend_categories(repair: _Repair) -> None:
    categories = repair.tables.categories
    for index in nameless(categories, "name"):
        entry = categories[index]
        fallback = entry["id"] if entry.get("id") is not None else f"categories[{index}]"
        entry["name"] = str(entry.get("name") or fallback)
        repair.done["missing_category_name"] += 1
    ids = column(categories, "id")
    if set(map(type, ids)) == {int} and ids != sorted(ids):
        categories.sort(key=lambda entry: int(entry["id"]))
        repair.done["unsorted_categories"] += 1


_STEPS: tuple[Callable[[_Repair], None], ...] = (
    _unify_ids,
    _merge_equal_entries,
    _drop_images_without_file,
    _correct_sizes,
    _mend_box_notation,
    _mend_geometry,
    _drop_duplicate_boxes,
    _write_areas,
    _write_crowd_flags,
    _number_annotations,
    _mend_categories,
)
