"""COCO data sets and COCO results as a `LabelledSet`, and back; numbers stay as they are written.

What training refuses is refused here, too. Masks, key points and captions are counted and left out.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from retinaray.data.coco import load_coco
from retinaray.data.coco_columns import (
    AnnotationColumns,
    BoxVerdict,
    CocoTables,
    annotation_columns,
    column,
    read_coco_tables,
)
from retinaray.data.coco_ids import positions_of
from retinaray.errors import DatasetError
from retinaray.interchange.labelled_set import (
    FormatTraits,
    LabelledBox,
    LabelledImage,
    LabelledSet,
)

TRAITS = FormatTraits(has_image_ids=True, has_category_ids=True, has_scores=True)
_OTHER_SHAPES = ("segmentation", "keypoints", "caption")


def read_coco(path: Path) -> LabelledSet:
    """Read a COCO data set, or detections in the format coco-dataset.

    Raises:
        DatasetError: If it cannot be read, has faults that `doctor` would call errors, or gives two
            classes one name.
    """
    checked = load_coco(path, on_bad_box="drop")
    tables = read_coco_tables(path)
    columns = annotation_columns(tables)
    names = checked.categories.names
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DatasetError(
            f"{path}: two categories are called {repeated[0]!r}; other formats know classes by "
            "name: rename one"
        )
    names_by_id = dict(zip(checked.categories.ids, names, strict=True))
    name_of = [names_by_id[entry["id"]] for entry in tables.categories]
    boxes: list[list[LabelledBox]] = [[] for _ in tables.images]
    for row in np.flatnonzero(columns.verdicts == BoxVerdict.GOOD).tolist():
        box = _read_box(tables, columns, row, name_of)
        boxes[int(columns.image_positions[row])].append(box)
    record_of = {record.image_id: record for record in checked.images}
    images = []
    for entry, found in zip(tables.images, boxes, strict=True):
        record = record_of[entry["id"]]
        images.append(
            LabelledImage(
                record.file_name, record.height, record.width, tuple(found), record.image_id
            )
        )
    notes = Counter(
        f"{key}s are left out"
        for key in _OTHER_SHAPES
        for value in column(tables.annotations, key)
        if value
    )
    notes["boxes that enclose nothing of their image are left out"] = int(
        np.count_nonzero(columns.verdicts != BoxVerdict.GOOD)
    )
    return LabelledSet(
        tuple(images),
        names,
        checked.categories.ids,
        {text: count for text, count in notes.items() if count},
    )


def _read_box(
    tables: CocoTables, columns: AnnotationColumns, row: int, name_of: list[str]
) -> LabelledBox:
    entry = tables.annotations[row]
    left, top, width, height = columns.xywh[row].tolist()
    attributes = entry.get("attributes")
    score: Any = entry.get("score")
    return LabelledBox(
        name_of[int(columns.category_positions[row])],
        (left, top, width, height),
        is_crowd=bool(columns.is_crowd[row]),
        score=float(score) if type(score) in (int, float) else None,
        attributes=dict(attributes) if isinstance(attributes, dict) else {},
    )


def read_coco_results(path: Path, reference: LabelledSet) -> LabelledSet:
    """Read COCO results, such as detections.json of `infer`, for the images of a data set.

    Args:
        path: A list of image_id, category_id, bbox, score.
        reference: The data set: its images, sizes and classes are taken, its boxes are not.

    Raises:
        DatasetError: If it cannot be read, or an entry fits no image or class of the data set.
    """
    try:
        entries = json.loads(path.read_bytes())
    except OSError as error:
        raise DatasetError(f"{path}: cannot read it: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: expected COCO results, cannot parse it: {error}") from error
    if not isinstance(entries, list):
        raise DatasetError(
            f"{path}: expected COCO results, a list; found a {type(entries).__name__}: is it a "
            "data set (--from coco)?"
        )
    ids = [image.image_id for image in reference.images]
    boxes: list[list[LabelledBox]] = [[] for _ in ids]
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DatasetError(f"{path}, entry {number}: expected an object, found {entry!r:.60}")
    positions = positions_of(column(entries, "image_id"), ids)
    classes = positions_of(column(entries, "category_id"), reference.category_ids or ())
    for number, entry in enumerate(entries):
        place = f"{path}, entry {number}"
        for key, position in (("image_id", positions[number]), ("category_id", classes[number])):
            if position < 0:
                raise DatasetError(
                    f"{place}: {key} {entry.get(key)!r} is not in the file of --reference; give "
                    "the data set that these detections belong to"
                )
        name = reference.names[int(classes[number])]
        boxes[int(positions[number])].append(_read_result(entry, name, place))
    images = tuple(
        replace(image, boxes=tuple(found))
        for image, found in zip(reference.images, boxes, strict=True)
    )
    return replace(reference, images=images, notes={})


def _read_result(entry: Mapping[str, Any], name: str, place: str) -> LabelledBox:
    bbox: Any = entry.get("bbox")
    score: Any = entry.get("score")
    numbers = [*bbox, score] if isinstance(bbox, list) and len(bbox) == 4 else []
    if not numbers or not all(_is_finite(number) for number in numbers):
        raise DatasetError(
            f"{place}: expected bbox [x, y, width, height] and score, found {bbox!r} and {score!r}"
        )
    if bbox[2] <= 0 or bbox[3] <= 0:
        raise DatasetError(f"{place}: expected a box with width and height > 0, found {bbox}")
    left, top, width, height = bbox
    return LabelledBox(name, (left, top, width, height), score=float(score))


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def write_coco(labels: LabelledSet) -> str:
    """A COCO data set as JSON: ids as they were, or 1, 2, ... in order; annotations from 1.

    Scores and attributes stand where CVAT and `infer --format coco-dataset` put them; `area` is
    that of the box.
    """
    category_ids = labels.category_ids or tuple(range(1, len(labels.names) + 1))
    id_of = dict(zip(labels.names, category_ids, strict=True))
    numbered = [
        (number if image.image_id is None else image.image_id, image)
        for number, image in enumerate(labels.images, start=1)
    ]
    annotations = [
        _write_annotation(box, image_id, id_of[box.name])
        for image_id, image in numbered
        for box in image.boxes
    ]
    document = {
        "info": {"description": "converted by retinaray"},
        "licenses": [],
        "images": [
            {
                "id": image_id,
                "file_name": image.file_name,
                "height": image.height,
                "width": image.width,
            }
            for image_id, image in numbered
        ],
        "annotations": [{"id": number} | entry for number, entry in enumerate(annotations, 1)],
        "categories": [{"id": id_of[name], "name": name} for name in labels.names],
    }
    return json.dumps(document, ensure_ascii=False) + "\n"


def _write_annotation(box: LabelledBox, image_id: object, category_id: object) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(box.xywh),
        "area": box.xywh[2] * box.xywh[3],
        "iscrowd": int(box.is_crowd),
        # Empty, not absent: readers such as CVAT's refuse a box without it.
        "segmentation": [],
    }
    if box.attributes:
        entry["attributes"] = dict(box.attributes)
    return entry if box.score is None else entry | {"score": box.score}
