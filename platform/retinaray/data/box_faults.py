"""Finds what is wrong with the boxes of a COCO file, and with what stands beside them.

Masks over all annotations, shared by the report, the reader and the repair.
"""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from retinaray.data.coco_columns import (
    AnnotationColumns,
    BoxFormat,
    BoxVerdict,
    CocoTables,
    CrowdFormat,
)
from retinaray.data.faults import (
    Fault,
    annotation_label,
    box_label,
    field_label,
    is_systematic,
    make_fault,
)

OVERSHOOT_TOLERANCE_PX = 0.01
"""How far a box may pass its image's edge unreported: exporters round to two decimals."""
AREA_RATIO_RANGE = (0.01, 1.5)
"""Area over width x height. No mask fills more than its box; one under 1 % is doubtful."""
DEGENERATE_BOX_CODES = {
    BoxVerdict.NON_FINITE: "non_finite_box",
    BoxVerdict.NEGATIVE: "negative_size_box",
    BoxVerdict.ZERO: "zero_size_box",
    BoxVerdict.OUTSIDE: "outside_box",
}

Mask = NDArray[np.bool_]


def misread_boxes(columns: AnnotationColumns) -> str | None:
    """Code of the fault if the boxes as a whole seem to be in another notation, else None.

    Each box alone would look tiny or outside; to cut or drop them would destroy the labels.
    """
    usable = columns.verdicts != BoxVerdict.NON_FINITE
    usable &= (columns.heights > 2) & (columns.widths > 2)
    boxes = columns.xywh[usable]
    if not len(boxes):
        return None
    if boxes.max() <= 1.0 and (boxes[:, :2] + boxes[:, 2:]).max() <= 2.0 and boxes.min() >= 0:
        return "boxes_look_normalised"
    limits = np.stack([columns.widths[usable], columns.heights[usable]], axis=1)
    limits += OVERSHOOT_TOLERANCE_PX
    as_corners = (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & (boxes[:, 2:] <= limits).all(axis=1)
    overshoots = (boxes[:, :2] + boxes[:, 2:] > limits).any(axis=1)
    enough = len(boxes) >= 10 and as_corners.mean() >= 0.99 and overshoots.mean() >= 0.2
    return "boxes_look_xyxy" if enough else None


def misread_box_faults(
    tables: CocoTables, columns: AnnotationColumns, *, max_examples: int
) -> list[Fault]:
    """The one fault of boxes that seem to be in another notation."""
    code = misread_boxes(columns)
    if code is None:
        return []
    numeric = np.flatnonzero(columns.formats == BoxFormat.NUMBERS)
    label = partial(field_label, tables, key="bbox")
    return make_fault(code, numeric, label, max_examples=max_examples)


def overshooting(columns: AnnotationColumns) -> Mask:
    """GOOD boxes that pass their image's edge by more than the tolerance: bool [M]."""
    limits = np.stack([columns.widths, columns.heights], axis=1) + OVERSHOOT_TOLERANCE_PX
    with np.errstate(invalid="ignore", over="ignore"):
        ends = columns.xywh[:, :2] + columns.xywh[:, 2:]
    past = (columns.xywh[:, :2] < -OVERSHOOT_TOLERANCE_PX).any(axis=1) | (ends > limits).any(axis=1)
    return np.asarray(past & (columns.verdicts == BoxVerdict.GOOD), np.bool_)


def boxes_are_systematically_outside(columns: AnnotationColumns) -> bool:
    """Whether most boxes pass their image's edge: then they belong to images of another size."""
    outside = columns.verdicts == BoxVerdict.OUTSIDE
    num_judged = np.count_nonzero(outside | (columns.verdicts == BoxVerdict.GOOD))
    num_past = np.count_nonzero(outside | overshooting(columns))
    return is_systematic(int(num_past), int(num_judged))


def later_duplicates(columns: AnnotationColumns) -> Mask:
    """GOOD boxes equal to an earlier one in image, class, crowd flag and all numbers: bool [M]."""
    keys = np.column_stack(
        [columns.xywh, columns.is_crowd, columns.category_positions, columns.image_positions]
    )
    known = (columns.image_positions >= 0) & (columns.category_positions >= 0)
    rows = np.flatnonzero(known & (columns.verdicts == BoxVerdict.GOOD))
    # lexsort is stable, so of equal rows the first in the file comes first.
    order = rows[np.lexsort(keys[rows].T)]
    later = np.zeros(len(keys), np.bool_)
    later[order[1:][(keys[order[1:]] == keys[order[:-1]]).all(axis=1)]] = True
    return later


def areas_of_boxes(columns: AnnotationColumns) -> NDArray[np.float64]:
    """Width x height as written: float64 [M], NaN where it is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        box_areas = columns.xywh[:, 2] * columns.xywh[:, 3]
    return np.where(np.isfinite(box_areas), box_areas, np.nan)


def missing_areas(columns: AnnotationColumns) -> Mask:
    """GOOD boxes without a usable area: bool [M]."""
    good = columns.verdicts == BoxVerdict.GOOD
    missing = good & np.isnan(columns.areas) & np.isfinite(areas_of_boxes(columns))
    return np.asarray(missing, np.bool_)


def contradicting_areas(tables: CocoTables, columns: AnnotationColumns) -> Mask:
    """GOOD boxes whose area no mask inside them can have: bool [M]."""
    box_areas = areas_of_boxes(columns)
    low, high = AREA_RATIO_RANGE
    good = columns.verdicts == BoxVerdict.GOOD
    too_small = good & (columns.areas < low * box_areas)
    for index in np.flatnonzero(too_small):
        if tables.annotations[index].get("segmentation"):
            too_small[index] = False
    return np.asarray(too_small | (good & (columns.areas / high > box_areas)), np.bool_)


def notation_faults(
    tables: CocoTables, columns: AnnotationColumns, *, max_examples: int
) -> list[Fault]:
    """`bbox` values that are not four JSON numbers."""
    codes = {
        BoxFormat.ABSENT: "missing_bbox",
        BoxFormat.UNUSABLE: "unusable_bbox",
        BoxFormat.NUMERIC_STRINGS: "string_bbox",
    }
    label = partial(field_label, tables, key="bbox")
    return [
        fault
        for kind, code in codes.items()
        for fault in make_fault(
            code, np.flatnonzero(columns.formats == kind), label, max_examples=max_examples
        )
    ]


def degenerate_box_faults(
    tables: CocoTables, columns: AnnotationColumns, *, max_examples: int
) -> list[Fault]:
    """Boxes of four numbers that enclose nothing of their image."""
    systematic = boxes_are_systematically_outside(columns)
    numeric = np.isin(columns.formats, (BoxFormat.NUMBERS, BoxFormat.NUMERIC_STRINGS))
    return [
        fault
        for verdict, code in DEGENERATE_BOX_CODES.items()
        for fault in make_fault(
            code,
            np.flatnonzero(numeric & (columns.verdicts == verdict)),
            partial(box_label, tables, columns),
            max_examples=max_examples,
            fixable=verdict != BoxVerdict.OUTSIDE or not systematic,
        )
    ]


def box_faults(tables: CocoTables, columns: AnnotationColumns, *, max_examples: int) -> list[Fault]:
    """All faults of boxes and areas; geometry is not judged in a notation that is not COCO's."""
    fault = partial(make_fault, max_examples=max_examples)
    faults = notation_faults(tables, columns, max_examples=max_examples)
    misread = misread_box_faults(tables, columns, max_examples=max_examples)
    if misread:
        return [*faults, *misread]
    good = columns.verdicts == BoxVerdict.GOOD
    sides = columns.clipped_xyxy[:, 2:] - columns.clipped_xyxy[:, :2]
    past_edge = partial(box_label, tables, columns, good_problem="passes the edge of its image")
    twice = partial(box_label, tables, columns, good_problem="came before")
    thin = partial(box_label, tables, columns, good_problem="has a side below 1 px")
    area = partial(field_label, tables, key="area")

    return [
        *faults,
        *degenerate_box_faults(tables, columns, max_examples=max_examples),
        *fault(
            "partly_outside_box",
            np.flatnonzero(overshooting(columns)),
            past_edge,
            fixable=not boxes_are_systematically_outside(columns),
        ),
        *fault("tiny_box", np.flatnonzero(good & (sides < 1).any(axis=1)), thin),
        *fault("duplicate_boxes", np.flatnonzero(later_duplicates(columns)), twice),
        *fault("missing_area", np.flatnonzero(missing_areas(columns)), area),
        *fault("contradicting_area", np.flatnonzero(contradicting_areas(tables, columns)), area),
    ]


def crowd_faults(
    tables: CocoTables, columns: AnnotationColumns, *, max_examples: int
) -> list[Fault]:
    """`iscrowd` values that are not 0 or 1, and how many are 1."""
    fault = partial(make_fault, max_examples=max_examples)
    label = partial(field_label, tables, key="iscrowd")
    formats = columns.crowd_formats
    return [
        *fault("invalid_iscrowd", np.flatnonzero(formats == CrowdFormat.UNUSABLE), label),
        *fault("missing_iscrowd", np.flatnonzero(formats == CrowdFormat.ABSENT), label),
        *fault("iscrowd_not_integer", np.flatnonzero(formats == CrowdFormat.OTHER_SPELLING), label),
        *fault("crowd_boxes", np.flatnonzero(columns.is_crowd), partial(annotation_label, tables)),
    ]
