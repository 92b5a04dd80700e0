"""Finds what is wrong with the tables of a COCO file: ids, references, names and unused entries.

Boxes are the business of `box_faults`, image files of `image_files`.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from retinaray.data.coco_columns import (
    AnnotationColumns,
    CocoTables,
    Entry,
    column,
    image_sizes,
)
from retinaray.data.coco_ids import IdKind, id_kinds, id_target
from retinaray.data.faults import (
    Fault,
    annotation_label,
    category_label,
    field_label,
    image_label,
    is_systematic,
    make_fault,
)
from retinaray.data.image_paths import file_name_problem

_LARGEST_INT32 = 2**31 - 1

_Sites = list[tuple[Callable[[CocoTables, int], str], int]]


def split_duplicates(entries: Sequence[Entry], twin_key: str) -> tuple[list[int], list[int]]:
    """Entries whose id came before: indices of those equal in `twin_key`, and of the others."""
    first: dict[object, Entry] = {}
    equal: list[int] = []
    conflicting: list[int] = []
    for index, entry in enumerate(entries):
        value = entry.get("id")
        if type(value) is not int and type(value) is not str:
            continue
        earlier = first.setdefault(value, entry)
        if earlier is not entry:
            same = earlier.get(twin_key) == entry.get(twin_key)
            (equal if same else conflicting).append(index)
    return equal, conflicting


def repeated(values: Iterable[object]) -> list[int]:
    """Indices of values that came before; None never counts."""
    seen: set[object] = set()
    later = []
    for index, value in enumerate(values):
        if value in seen:
            later.append(index)
        elif value is not None:
            seen.add(value)
    return later


def nameless(entries: Sequence[Entry], key: str) -> list[int]:
    """Indices of entries whose `key` is no string, or an empty one."""
    return [
        index
        for index, value in enumerate(column(entries, key))
        if not (isinstance(value, str) and value)
    ]


def table_faults(tables: CocoTables, *, max_examples: int) -> list[Fault]:
    """Faults of the image and category tables that keep the file from being read."""
    fault = partial(make_fault, max_examples=max_examples)
    images, categories = tables.images, tables.categories
    label_image, label_category = partial(image_label, tables), partial(category_label, tables)
    equal_images, other_images = split_duplicates(images, "file_name")
    equal_categories, other_categories = split_duplicates(categories, "name")
    invalid: _Sites = [
        *((image_label, index) for index in _of_kind(images, IdKind.INVALID)),
        *((category_label, index) for index in _of_kind(categories, IdKind.INVALID)),
    ]
    names = [name if isinstance(name, str) else "" for name in column(images, "file_name")]
    problems = {i: why for i, name in enumerate(names) if name and (why := file_name_problem(name))}
    unsized = np.flatnonzero(np.isnan(image_sizes(images)).any(axis=0))
    return [
        *fault("no_images", [] if images else [0], lambda _: tables.source),
        *fault("no_categories", [] if categories else [0], lambda _: tables.source),
        *_fault_of_sites("invalid_ids", tables, invalid, max_examples),
        *fault("duplicate_image_ids", equal_images, label_image),
        *fault("conflicting_image_ids", other_images, label_image),
        *fault("duplicate_category_ids", equal_categories, label_category),
        *fault("conflicting_category_ids", other_categories, label_category),
        *fault("missing_file_name", nameless(images, "file_name"), label_image),
        *fault("unsafe_file_name", problems, lambda i: f"{label_image(i)} {problems[i]}"),
        *fault("missing_size", unsized, label_image),
    ]


def _of_kind(entries: Sequence[Entry], *kinds: IdKind) -> list[int]:
    return np.flatnonzero(np.isin(id_kinds(column(entries, "id")), kinds)).tolist()


def _fault_of_sites(code: str, tables: CocoTables, sites: _Sites, max_examples: int) -> list[Fault]:
    """One fault whose examples come from several tables."""
    return make_fault(
        code,
        range(len(sites)),
        lambda i: sites[i][0](tables, sites[i][1]),
        max_examples=max_examples,
    )


def references_are_systematically_unknown(positions: NDArray[np.int64]) -> bool:
    """Whether most annotations refer to nothing (-1): then the table is the wrong one."""
    return is_systematic(int(np.count_nonzero(positions < 0)), len(positions))


def reference_faults(
    tables: CocoTables, columns: AnnotationColumns, *, max_examples: int
) -> list[Fault]:
    """Ids of two JSON types for one thing, and annotations that refer to nothing."""
    sites: _Sites = []
    faults: list[Fault] = []
    for entries, key, positions, code, label in (
        (tables.images, "image_id", columns.image_positions, "unknown_image", image_label),
        (
            tables.categories,
            "category_id",
            columns.category_positions,
            "unknown_category",
            category_label,
        ),
    ):
        target = id_target(column(entries, "id"))
        misspelt = id_kinds(column(tables.annotations, key)) != target
        field = partial(field_label, key=key)
        sites += [(label, i) for i in _of_kind(entries, *(set(IdKind) - {target, IdKind.INVALID}))]
        sites += [(field, i) for i in np.flatnonzero(misspelt & (positions >= 0)).tolist()]
        faults += make_fault(
            code,
            np.flatnonzero(positions < 0),
            partial(field, tables),
            max_examples=max_examples,
            fixable=not references_are_systematically_unknown(positions),
        )
    return [*_fault_of_sites("mixed_id_types", tables, sites, max_examples), *faults]


def integer_ids(entries: Sequence[Entry]) -> list[int | None]:
    """Ids as integers, None for whatever is none."""
    return [value if type(value) is int else None for value in column(entries, "id")]


def annotation_id_faults(tables: CocoTables, *, max_examples: int) -> list[Fault]:
    """Annotation ids that pycocotools cannot score by: it wants distinct integers other than 0."""
    ids = integer_ids(tables.annotations)
    label = partial(annotation_label, tables)
    codes = {
        "missing_annotation_ids": [index for index, value in enumerate(ids) if value is None],
        "duplicate_annotation_ids": repeated(ids),
        "zero_annotation_id": [index for index, value in enumerate(ids) if value == 0],
    }
    return [
        fault
        for code, where in codes.items()
        for fault in make_fault(code, where, label, max_examples=max_examples)
    ]


def oddity_faults(
    tables: CocoTables, columns: AnnotationColumns, *, max_examples: int
) -> list[Fault]:
    """What can be read as it is but deserves a look: names, order, ids of other tools' reach."""
    fault = partial(make_fault, max_examples=max_examples)
    images, categories = tables.images, tables.categories
    label_image, label_category = partial(image_label, tables), partial(category_label, tables)
    names = column(categories, "name")
    category_ids = column(categories, "id")
    unsorted = set(map(type, category_ids)) == {int} and category_ids != sorted(category_ids)
    boxes_of_image = np.bincount(columns.image_positions + 1, minlength=len(images) + 1)[1:]
    boxes_of_class = np.bincount(columns.category_positions + 1, minlength=len(categories) + 1)[1:]
    same_names = repeated(name if isinstance(name, str) else None for name in names)
    copies = set(split_duplicates(images, "file_name")[0])
    files = [None if i in copies else entry.get("file_name") for i, entry in enumerate(images)]
    same_files = repeated(name if isinstance(name, str) else None for name in files)
    return [
        *fault("duplicate_file_names", same_files, label_image),
        *_fault_of_sites("string_ids", tables, _id_sites(tables, _is_string), max_examples),
        *_fault_of_sites("huge_ids", tables, _id_sites(tables, _is_huge), max_examples),
        *fault("unsorted_categories", [0] if unsorted else [], lambda _: str(category_ids[:9])),
        *fault("missing_category_name", nameless(categories, "name"), label_category),
        *fault("duplicate_category_names", same_names, label_category),
        *fault("images_without_boxes", np.flatnonzero(boxes_of_image == 0), label_image),
        *fault("classes_without_boxes", np.flatnonzero(boxes_of_class == 0), label_category),
    ]


def _id_sites(tables: CocoTables, picks: Callable[[object], bool]) -> _Sites:
    return [
        *((image_label, i) for i, v in enumerate(column(tables.images, "id")) if picks(v)),
        *((category_label, i) for i, v in enumerate(column(tables.categories, "id")) if picks(v)),
    ]


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _is_huge(value: object) -> bool:
    return isinstance(value, int) and not -_LARGEST_INT32 - 1 <= value <= _LARGEST_INT32
