"""Examines a COCO data set and says what is wrong with it, before a GPU is taken.

The questions are asked in `table_faults`, `box_faults` and `image_files`; `faults` is the catalogue
of answers and says what a severity means. The repair is `dataset_repair`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from retinaray.data.box_faults import box_faults, crowd_faults
from retinaray.data.coco_columns import (
    CocoTables,
    annotation_columns,
    image_sizes,
    read_coco_tables,
    without_sizes,
)
from retinaray.data.faults import Fault
from retinaray.data.image_files import (
    FileHeader,
    FileState,
    file_faults,
    folder_is_plausible,
    judge_sizes,
    read_headers,
)
from retinaray.data.table_faults import (
    annotation_id_faults,
    oddity_faults,
    reference_faults,
    table_faults,
)

__all__ = ["DoctorReport", "Fault", "examine_dataset", "examine_tables"]


@dataclass(frozen=True)
class DoctorReport:
    """What the doctor found.

    Attributes:
        num_images: Entries in `images`.
        num_annotations: Entries in `annotations`.
        num_categories: Entries in `categories`.
        faults: Errors first, each code once.
        repairs: What `repair_dataset` did: entries changed, by what was done. Empty after an
            examination.
    """

    num_images: int
    num_annotations: int
    num_categories: int
    faults: tuple[Fault, ...]
    repairs: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_clean(self) -> bool:
        """Whether there is no error; warnings alone do not make a data set unclean."""
        return not any(fault.severity == "error" for fault in self.faults)

    def to_json(self) -> dict[str, Any]:
        """The report as plain dicts and lists."""
        return {
            "is_clean": self.is_clean,
            "num_images": self.num_images,
            "num_annotations": self.num_annotations,
            "num_categories": self.num_categories,
            "faults": [
                {
                    "code": fault.code,
                    "severity": fault.severity,
                    "count": fault.count,
                    "fixable": fault.fixable,
                    "advice": fault.advice,
                    "examples": list(fault.examples),
                }
                for fault in self.faults
            ],
            "repairs": dict(self.repairs),
        }

    def to_text(self) -> str:
        """The report for a terminal: counts, what was repaired, one block per fault."""
        lines = [
            f"{self.num_images} images, {self.num_annotations} annotations, "
            f"{self.num_categories} categories"
        ]
        lines += [f"repaired: {action}: {count}" for action, count in self.repairs.items()]
        if not self.faults:
            return "\n".join([*lines, "no faults"])
        code_width = max(len(fault.code) for fault in self.faults)
        count_width = max(len("count"), *(len(str(fault.count)) for fault in self.faults))
        indent = " " * (9 + code_width + count_width + 4)
        lines.append(f"{'severity':9}{'fault':{code_width}}  {'count':>{count_width}}  fix")
        for fault in self.faults:
            fix = "yes" if fault.fixable else "no "
            name = f"{fault.severity:9}{fault.code:{code_width}}"
            lines.append(f"{name}  {fault.count:>{count_width}}  {fix}  {fault.advice}")
            lines += [f"{indent}     {example}" for example in fault.examples]
        return "\n".join(lines)


def examine_dataset(
    annotations_path: str | os.PathLike[str],
    images_root: str | os.PathLike[str] | None,
    *,
    check_files: bool = True,
    num_threads: int = 8,
    max_examples: int = 3,
) -> DoctorReport:
    """Look for every fault of the catalogue `faults.FAULT_KINDS`.

    Args:
        annotations_path: Local COCO file.
        images_root: Local folder that `file_name` is relative to; None to look at the JSON alone.
        check_files: Whether to read the headers of the image files.
        num_threads: How many files are read at once.
        max_examples: How many examples each fault shows.

    Raises:
        DatasetError: If the file cannot be read as COCO at all, or the folder does not exist.
    """
    tables = read_coco_tables(annotations_path)
    headers = None
    if images_root is not None and check_files:
        headers = read_headers(tables.images, str(images_root), num_threads=num_threads)
    return examine_tables(
        tables, headers, has_images=images_root is not None, max_examples=max_examples
    )


def examine_tables(
    tables: CocoTables,
    headers: Sequence[FileHeader] | None,
    *,
    has_images: bool,
    max_examples: int = 3,
) -> DoctorReport:
    """Examine parsed tables.

    Args:
        tables: The data set.
        headers: One per image, or None if files were not looked at.
        has_images: Whether a repair would have the image files to read sizes from.
        max_examples: How many examples each fault shows.
    """
    columns = annotation_columns(tables)
    found_in_files: list[Fault] = []
    if headers is not None:
        size_codes = judge_sizes(tables, columns, headers)
        columns = without_sizes(columns, np.array([bool(code) for code in size_codes], np.bool_))
        found_in_files = file_faults(tables, headers, size_codes, max_examples=max_examples)
    faults = [
        *table_faults(tables, max_examples=max_examples),
        *reference_faults(tables, columns, max_examples=max_examples),
        *found_in_files,
        *box_faults(tables, columns, max_examples=max_examples),
        *crowd_faults(tables, columns, max_examples=max_examples),
        *annotation_id_faults(tables, max_examples=max_examples),
        *oddity_faults(tables, columns, max_examples=max_examples),
    ]
    if not (has_images and _sizes_are_at_hand(tables, headers)):
        faults = [_without_size_repair(fault) for fault in faults]
    return DoctorReport(
        num_images=len(tables.images),
        num_annotations=len(tables.annotations),
        num_categories=len(tables.categories),
        faults=tuple(sorted(faults, key=lambda fault: fault.severity != "error")),
    )


def _without_size_repair(fault: Fault) -> Fault:
    if fault.code != "missing_size":
        return fault
    return replace(fault, fixable=False, advice="--fix needs the image files to read it from")


def _sizes_are_at_hand(tables: CocoTables, headers: Sequence[FileHeader] | None) -> bool:
    """Whether every image without a size gets one, or is dropped, by a repair."""
    if headers is None:
        return True
    unsized = np.flatnonzero(np.isnan(image_sizes(tables.images)).any(axis=0))
    return folder_is_plausible(headers) and not any(
        headers[index].state is FileState.NOT_TRIED for index in unsized.tolist()
    )
