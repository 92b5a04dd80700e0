"""Class names for a checkpoint of ODTK's, which has none: from a COCO file, a list, or made up.

ODTK numbers classes by their position in the JSON that it was trained on, not by their ids, so the
order of the file is kept.
"""

from __future__ import annotations

import json

from retinaray.data.coco import Category, CategoryTable
from retinaray.errors import DatasetError

_MAX_LISTED = 5


def make_class_numbers(num_classes: int) -> CategoryTable:
    """Categories class-0, class-1, ... with the ids 0, 1, ..., which `odtk infer` writes, too."""
    return CategoryTable(tuple(Category(i, f"class-{i}") for i in range(num_classes)))


def read_odtk_categories(content: bytes, *, num_classes: int, source: str) -> CategoryTable:
    """Categories in the order of a file.

    Args:
        content: A COCO JSON with `categories`, or a JSON list of names, whose ids are then 0, 1,
            ....
        num_classes: K of the checkpoint.
        source: The file's name, for messages.

    Raises:
        DatasetError: If it is neither, or has another number of classes.
    """
    try:
        value = json.loads(content)
    except ValueError as error:
        raise DatasetError(f"{source}: expected JSON: {error}") from error
    entries = value.get("categories") if isinstance(value, dict) else value
    if not isinstance(entries, list):
        raise DatasetError(
            f"{source}: expected a COCO file with a list `categories`, or a list of names; found "
            f"{type(value).__name__ if entries is None else type(entries).__name__}; give the "
            "annotations that the model was trained on"
        )
    if all(isinstance(entry, str) for entry in entries):
        entries = [{"id": index, "name": name} for index, name in enumerate(entries)]
    if len(entries) != num_classes:
        names = [str(e.get("name", e) if isinstance(e, dict) else e) for e in entries]
        listed = ", ".join(names[:_MAX_LISTED]) + (", ..." if len(names) > _MAX_LISTED else "")
        raise DatasetError(
            f"{source}: expected {num_classes} categories, as many as the checkpoint has classes "
            f"(background is not counted), found {len(entries)} ({listed or 'none'}); give the "
            "annotations that it was trained on"
        )
    try:
        return CategoryTable.from_json(entries)
    except DatasetError as error:
        raise DatasetError(f"{source}: {error}") from error
