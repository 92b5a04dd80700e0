"""Reads COCO annotations into arrays that train, score and travel between processes.

Ids stay what the JSON says they are, of any size and of either JSON type; class indices 0..K-1 (no
background) exist only through the category table. What cannot be read is refused whole, with every
fault of the file in one message. N images, M boxes, K classes; boxes are in original-image pixels.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from retinaray.data.box_faults import (
    crowd_faults,
    degenerate_box_faults,
    misread_box_faults,
    notation_faults,
)
from retinaray.data.coco_columns import (
    AnnotationColumns,
    BoxVerdict,
    CocoTables,
    annotation_columns,
    column,
    image_sizes,
    read_coco_tables,
)
from retinaray.data.coco_ids import Id
from retinaray.data.faults import Fault
from retinaray.data.image_paths import resolve_image_uri
from retinaray.data.table_faults import reference_faults, table_faults
from retinaray.errors import DatasetError

__all__ = [
    "Category",
    "CategoryTable",
    "CocoDataset",
    "ImageRecord",
    "ImageTargets",
    "coco_ground_truth",
    "load_coco",
    "resolve_image_uri",
]

logger = logging.getLogger(__name__)

_MAX_EXAMPLES = 3
_MAX_LISTED_NAMES = 20


@dataclass(frozen=True, slots=True)
class Category:
    """One class: its id in COCO files and the name shown to people."""

    id: Id
    name: str


@dataclass(frozen=True)
class CategoryTable:
    """Which class index means which category: index i is `categories[i]`, K entries, no background.

    `load_coco` orders it by id (integers by value, strings by code point), as COCOeval does, so
    that the splits of one data set agree whatever the order in their files. `from_json` keeps the
    order it is given, so that an artefact's table is never reordered.

    Raises:
        DatasetError: If it is empty or an id occurs twice.
    """

    categories: tuple[Category, ...]
    _index_of_id: Mapping[Id, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        lookup = {category.id: index for index, category in enumerate(self.categories)}
        if not lookup:
            raise DatasetError("expected at least one category, found none")
        if len(lookup) < len(self.categories):
            raise DatasetError(f"expected distinct category ids, found {list(self.ids)}")
        object.__setattr__(self, "_index_of_id", lookup)

    def __len__(self) -> int:
        return len(self.categories)

    @property
    def ids(self) -> tuple[Id, ...]:
        """Category ids in index order."""
        return tuple(category.id for category in self.categories)

    @property
    def names(self) -> tuple[str, ...]:
        """Category names in index order."""
        return tuple(category.name for category in self.categories)

    def index_of(self, category_id: Id) -> int:
        """Class index of a category id.

        Raises:
            DatasetError: If the table has no such id; 3 and "3" are different ids.
        """
        index = self._index_of_id.get(category_id)
        if index is None:
            raise DatasetError(f"category_id {category_id!r} is none of {list(self.ids)}")
        return index

    def to_json(self) -> list[dict[str, Any]]:
        """`[{"id": ..., "name": ...}, ...]` in index order."""
        return [{"id": category.id, "name": category.name} for category in self.categories]

    @classmethod
    def from_json(cls, entries: object) -> "CategoryTable":
        """The table that `to_json` wrote.

        Raises:
            DatasetError: If `entries` is anything else.
        """
        if not isinstance(entries, list):
            raise DatasetError(f"expected a list of categories, found {type(entries).__name__}")
        for entry in entries:
            if (
                not isinstance(entry, dict)
                or type(entry.get("id")) not in (int, str)
                or not isinstance(entry.get("name"), str)
            ):
                raise DatasetError(f'expected a category {{"id", "name"}}, found {entry!r}')
        return cls(tuple(Category(entry["id"], entry["name"]) for entry in entries))


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of a data set; height and width in pixels, as the JSON says (upright)."""

    image_id: Id
    file_name: str
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class ImageTargets:
    """The ground truth of one image, M boxes in file order; M may be 0.

    Attributes:
        boxes_xyxy: float32 [M, 4], original-image pixels, clipped to the image, x2 > x1, y2 > y1.
        class_indices: int64 [M], in [0, K).
        is_crowd: bool [M], regions to ignore.
        area: float32 [M], as the JSON says (a mask's area may be less than its box's); width x
            height of the clipped box where it says nothing usable.
    """

    boxes_xyxy: NDArray[np.float32]
    class_indices: NDArray[np.int64]
    is_crowd: NDArray[np.bool_]
    area: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class CocoDataset:
    """A whole COCO file: images by id, and their boxes as columns grouped by image.

    Attributes:
        images: N records, by id (integers by value, strings by code point). Images without boxes
            are kept: they are negatives.
        categories: The K classes.
        boxes_xyxy: float32 [M, 4] of the whole data set, as in `ImageTargets`.
        class_indices: int64 [M].
        is_crowd: bool [M].
        area: float32 [M].
        offsets: int64 [N + 1]; image i owns rows `offsets[i]` to `offsets[i + 1]`.
        num_dropped_boxes: How many boxes were left out, by reason: keys `non_finite`, `negative`,
            `zero`, `outside`; absent where none.
        source: What messages call the file.
    """

    images: tuple[ImageRecord, ...]
    categories: CategoryTable
    boxes_xyxy: NDArray[np.float32]
    class_indices: NDArray[np.int64]
    is_crowd: NDArray[np.bool_]
    area: NDArray[np.float32]
    offsets: NDArray[np.int64]
    num_dropped_boxes: Mapping[str, int]
    source: str

    def __len__(self) -> int:
        return len(self.images)

    def targets(self, position: int) -> ImageTargets:
        """Ground truth of `images[position]`; copies, which the caller may change.

        Raises:
            IndexError: If position is not in [0, N).
        """
        if not 0 <= position < len(self.images):
            raise IndexError(f"image {position} of {len(self.images)}")
        rows = slice(self.offsets[position], self.offsets[position + 1])
        return ImageTargets(
            boxes_xyxy=self.boxes_xyxy[rows].copy(),
            class_indices=self.class_indices[rows].copy(),
            is_crowd=self.is_crowd[rows].copy(),
            area=self.area[rows].copy(),
        )


def load_coco(
    annotations: bytes | str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    on_bad_box: Literal["drop", "error"] = "drop",
    source: str = "",
) -> CocoDataset:
    """Read a COCO file.

    Args:
        annotations: The file's bytes, or its local path.
        num_classes: If given, how many categories the file must have.
        on_bad_box: What to do with boxes that enclose nothing of their image (zero or negative
            size, not finite, outside): leave them out and log how many, or refuse the file.
        source: What messages call the file; its path by default.

    Raises:
        DatasetError: If it cannot be opened or parsed, or has faults; all are listed.
    """
    if on_bad_box not in ("drop", "error"):
        raise ValueError(f'on_bad_box: expected "drop" or "error", got {on_bad_box!r}')
    tables = read_coco_tables(annotations, source=source)
    columns = annotation_columns(tables)
    bad_boxes = degenerate_box_faults(tables, columns, max_examples=_MAX_EXAMPLES)
    refused_boxes = bad_boxes if on_bad_box == "error" else []
    problems = [*_blocking_problems(tables, columns), *map(_bad_box_problem, refused_boxes)]
    if num_classes is not None and num_classes != len(tables.categories):
        problems.append(_class_count_problem(tables, num_classes))
    if problems:
        raise DatasetError(_refusal(tables.source, problems))
    if bad_boxes:
        logger.warning(
            "%s: dropped %d of %d boxes: %s",
            tables.source,
            sum(fault.count for fault in bad_boxes),
            len(tables.annotations),
            "; ".join(example for fault in bad_boxes for example in fault.examples),
        )
    return _assemble(tables, columns)


def _blocking_problems(tables: CocoTables, columns: AnnotationColumns) -> list[str]:
    """Faults that leave no single meaning to the file, worded; an empty image table has one."""
    faults = [
        *table_faults(tables, max_examples=_MAX_EXAMPLES),
        *reference_faults(tables, columns, max_examples=_MAX_EXAMPLES),
        *notation_faults(tables, columns, max_examples=_MAX_EXAMPLES),
        *misread_box_faults(tables, columns, max_examples=_MAX_EXAMPLES),
        *crowd_faults(tables, columns, max_examples=_MAX_EXAMPLES),
    ]
    return [
        f"{fault.code}, {fault.count} in all: {'; '.join(fault.examples)}; "
        + ("`retinaray doctor --fix` repairs it" if fault.fixable else fault.advice)
        for fault in faults
        if fault.severity == "error" and fault.code != "no_images"
    ]


def _bad_box_problem(fault: Fault) -> str:
    return (
        f"{fault.code}, {fault.count} in all: {'; '.join(fault.examples)}; "
        "fix or drop it (data.on_bad_box)"
    )


def _class_count_problem(tables: CocoTables, num_classes: int) -> str:
    listed = [
        f"{entry.get('id')} {entry.get('name') or ''}".rstrip()
        for entry in tables.categories[:_MAX_LISTED_NAMES]
    ]
    more = ", ..." if len(tables.categories) > len(listed) else ""
    return (
        f"num_classes is {num_classes}, but `categories` has {len(tables.categories)}: "
        f"{', '.join(listed)}{more}; background is not counted: "
        f"give --classes {len(tables.categories)}, or leave it out"
    )


def _refusal(source: str, problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return f"{source}: {problems[0]}"
    return f"{source}: {len(problems)} kinds of fault" + "".join(f"\n  - {p}" for p in problems)


def _assemble(tables: CocoTables, columns: AnnotationColumns) -> CocoDataset:
    """The data set of tables that have no blocking fault."""
    num_images = len(tables.images)
    image_order, image_rank = _order_by_id(column(tables.images, "id"))
    category_order, class_index = _order_by_id(column(tables.categories, "id"))
    kept = np.flatnonzero(columns.verdicts == BoxVerdict.GOOD)
    rank = image_rank[columns.image_positions[kept]]
    rows = kept[np.argsort(rank, kind="stable")]
    boxes_xyxy = columns.clipped_xyxy[rows]
    sides = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    areas = columns.areas[rows]
    dropped = {
        verdict.name.lower(): count
        for verdict in BoxVerdict
        if verdict is not BoxVerdict.GOOD
        and (count := int(np.count_nonzero(columns.verdicts == verdict)))
    }
    return CocoDataset(
        images=_image_records(tables, image_order),
        categories=CategoryTable(tuple(_category(tables.categories[i]) for i in category_order)),
        boxes_xyxy=boxes_xyxy,
        class_indices=class_index[columns.category_positions[rows]],
        is_crowd=columns.is_crowd[rows],
        area=np.where(np.isnan(areas), sides[:, 0] * sides[:, 1], areas).astype(np.float32),
        offsets=np.append(0, np.cumsum(np.bincount(rank, minlength=num_images))).astype(np.int64),
        num_dropped_boxes=dropped,
        source=tables.source,
    )


def _order_by_id(ids: Sequence[Any]) -> tuple[list[int], NDArray[np.int64]]:
    """Positions sorted by id, and the rank of every position."""
    order = sorted(range(len(ids)), key=ids.__getitem__)
    rank = np.empty(len(ids), np.int64)
    rank[order] = np.arange(len(ids))
    return order, rank


def _category(entry: Mapping[str, Any]) -> Category:
    name = entry.get("name")
    return Category(entry["id"], name if isinstance(name, str) and name else str(entry["id"]))


def _image_records(tables: CocoTables, order: Sequence[int]) -> tuple[ImageRecord, ...]:
    heights, widths = (side.astype(np.int64).tolist() for side in image_sizes(tables.images))
    entries = tables.images
    return tuple(
        ImageRecord(entries[i]["id"], entries[i]["file_name"], heights[i], widths[i]) for i in order
    )


def coco_ground_truth(dataset: CocoDataset) -> dict[str, Any]:
    """The data set as a COCO document for pycocotools: what training sees, and nothing it refuses.

    Annotation ids are 1..M: pycocotools counts a match with id 0 as a miss. Ids of images and
    categories, order and areas are the data set's.
    """
    image_of_row = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
    corners = dataset.boxes_xyxy.astype(np.float64)
    xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    category_ids = dataset.categories.ids
    annotations = [
        {
            "id": row + 1,
            "image_id": dataset.images[position].image_id,
            "category_id": category_ids[class_index],
            "bbox": box,
            "area": area,
            "iscrowd": crowd,
        }
        for row, (position, class_index, box, area, crowd) in enumerate(
            zip(
                image_of_row.tolist(),
                dataset.class_indices.tolist(),
                xywh.tolist(),
                dataset.area.tolist(),
                dataset.is_crowd.astype(int).tolist(),
                strict=True,
            )
        )
    ]
    images = [
        {"id": i.image_id, "file_name": i.file_name, "height": i.height, "width": i.width}
        for i in dataset.images
    ]
    return {
        "images": images,
        "annotations": annotations,
        "categories": dataset.categories.to_json(),
    }
