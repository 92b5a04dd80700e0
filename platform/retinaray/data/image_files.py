"""Compares a COCO file with its image files: which are missing or broken, and whose size differs.

Only headers are read, in threads, and only from local folders.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retinaray.data.coco_columns import (
    AnnotationColumns,
    BoxVerdict,
    CocoTables,
    Entry,
    image_sizes,
)
from retinaray.data.faults import Fault, image_label, make_fault
from retinaray.data.image_paths import file_name_problem, resolve_image_uri
from retinaray.errors import DatasetError, ImageError
from retinaray.path_hints import hint_at_image, hint_at_missing

HEAD_BYTES = 64 * 1024
_MOST_BYTES = 1 << 30
_FILES_PER_TASK = 64
_JPEG_START = b"\xff\xd8\xff"
# The names under which JPEG, PNG and WebP keep EXIF, and ones no reader looks for.
_EXIF_NAMES = ((b"Exif\0\0", b"Xxxx\0\0"), (b"eXIf", b"xXXx"), (b"EXIF", b"XXXX"))
_PROPORTIONAL_TOLERANCE = 0.01
_FIT_TOLERANCE_PX = 1.0

Mask = NDArray[np.bool_]


class FileState(Enum):
    """What became of one image file."""

    READ = "read"
    MISSING = "missing"
    UNREADABLE = "unreadable"
    NOT_TRIED = "not tried"


@dataclass(frozen=True, slots=True)
class FileHeader:
    """What an image file says of itself.

    Attributes:
        state: READ, or why there is no size.
        height: Of the upright image, px; 0 if not READ.
        width: Likewise.
        is_turned: Whether EXIF exchanges the sides: a tool that ignores it sees width x height.
        problem: Why the file is UNREADABLE; of the first that is MISSING where it may be.
    """

    state: FileState
    height: int = 0
    width: int = 0
    is_turned: bool = False
    problem: str = ""


def read_headers(
    images: Sequence[Entry], images_root: str, *, num_threads: int = 8
) -> list[FileHeader]:
    """Read the header of every image, in the order of `images`.

    Entries without a usable `file_name` are NOT_TRIED. Of a JPEG the first 64 KiB are read, and the
    rest only if the size is not among them; other formats may keep EXIF at the end: all is read.

    Raises:
        DatasetError: If the folder is not a local one that exists.
        ValueError: If num_threads is not positive.
    """
    if "://" in images_root:
        raise DatasetError(f"expected a local image folder, got {images_root}; copy it, or skip it")
    if not Path(images_root).is_dir():
        hint = hint_at_missing(Path(images_root))
        raise DatasetError(
            f"the image folder {images_root} does not exist, or is no folder"
            + (f"; {hint}" if hint else "")
        )
    names = [entry.get("file_name") for entry in images]
    tasks = [names[i : i + _FILES_PER_TASK] for i in range(0, len(names), _FILES_PER_TASK)]
    with ThreadPoolExecutor(num_threads) as pool:
        groups = pool.map(partial(_read_some, images_root), tasks)
        headers = [header for group in groups for header in group]
    return _explain_first_missing(headers, names, Path(images_root))


def _explain_first_missing(
    headers: list[FileHeader], names: Sequence[object], root: Path
) -> list[FileHeader]:
    """The headers, of which the first that is missing says where its file may be instead."""
    for index, header in enumerate(headers):
        if header.state is FileState.MISSING:
            hint = hint_at_image(root, str(names[index]))
            headers[index] = replace(header, problem=hint)
            break
    return headers


def _read_some(images_root: str, names: Sequence[object]) -> list[FileHeader]:
    return [_read_one(images_root, name) for name in names]


def _read_one(images_root: str, name: object) -> FileHeader:
    if not isinstance(name, str) or file_name_problem(name) is not None:
        return FileHeader(FileState.NOT_TRIED)
    try:
        return _read_header(Path(resolve_image_uri(images_root, name)))
    except (FileNotFoundError, NotADirectoryError):
        return FileHeader(FileState.MISSING)
    except (OSError, ImageError) as error:
        return FileHeader(FileState.UNREADABLE, problem=str(error))


def _read_header(path: Path) -> FileHeader:
    with path.open("rb") as file:
        data = file.read(HEAD_BYTES)
        if data.startswith(_JPEG_START):
            try:
                return _parse_header(data)
            except ImageError:
                if len(data) < HEAD_BYTES:
                    raise
        return _parse_header(data + file.read(_MOST_BYTES))


def _parse_header(data: bytes) -> FileHeader:
    # Brings torch and torchvision along, which a look at the JSON alone does not need.
    from retinaray.data.image_decoding import read_image_size

    height, width = read_image_size(data)
    is_turned = False
    if height != width and any(name in data for name, _ in _EXIF_NAMES):
        for name, hidden in _EXIF_NAMES:
            data = data.replace(name, hidden)
        is_turned = read_image_size(data) == (width, height)
    return FileHeader(FileState.READ, height, width, is_turned)


def folder_is_plausible(headers: Sequence[FileHeader]) -> bool:
    """Whether at least half of the files could be read; if not, it is likely the wrong folder."""
    tried = sum(header.state is not FileState.NOT_TRIED for header in headers)
    return 2 * sum(header.state is FileState.READ for header in headers) >= tried


def judge_sizes(
    tables: CocoTables, columns: AnnotationColumns, headers: Sequence[FileHeader]
) -> list[str]:
    """For every image the code of its size fault, "" if it has none.

    To write the file's size is right only if the boxes are drawn on the file as it is. It counts as
    shown for an image without boxes, and for one whose boxes fit the file and not the JSON's size.
    It is likely, and accepted, if the boxes fit both, no other image's boxes speak against it, and
    there is no other explanation: a rescaled image (same aspect) or ignored EXIF.
    """
    heights, widths = image_sizes(tables.images)
    file_heights = np.array([header.height for header in headers], np.float64)
    file_widths = np.array([header.width for header in headers], np.float64)
    is_turned = np.array([header.is_turned for header in headers], np.bool_)
    differs = (heights != file_heights) | (widths != file_widths)
    differs &= np.isfinite(heights) & np.isfinite(widths) & (file_heights > 0)
    bottoms, rights, has_boxes = _box_extents(columns, len(headers))
    fits_json = (bottoms <= heights + _FIT_TOLERANCE_PX) & (rights <= widths + _FIT_TOLERANCE_PX)
    fits_file = bottoms <= file_heights + _FIT_TOLERANCE_PX
    fits_file &= rights <= file_widths + _FIT_TOLERANCE_PX
    swapped = (heights == file_widths) & (widths == file_heights)
    turned = swapped & is_turned
    cross, other_cross = heights * file_widths, widths * file_heights
    rescaled = np.abs(cross - other_cross) <= _PROPORTIONAL_TOLERANCE * np.maximum(
        cross, other_cross
    )
    contradicted = bool(np.any(differs & has_boxes & fits_json & ~fits_file))
    likely = fits_file & ~rescaled & ~turned & (not contradicted)
    clear = ~has_boxes | (fits_file & ~fits_json) | likely
    codes = np.select(
        [~differs, clear & turned, clear & swapped, clear, turned],
        ["", "exif_unrotated_size", "size_swapped", "size_mismatch", "exif_size_unclear"],
        "size_unclear",
    )
    return [str(code) for code in codes]


def _box_extents(
    columns: AnnotationColumns, num_images: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], Mask]:
    """How far down and right each image's boxes reach, and which images have boxes."""
    usable = (columns.image_positions >= 0) & (columns.verdicts != BoxVerdict.NON_FINITE)
    positions = columns.image_positions[usable]
    ends = columns.xywh[usable, :2] + columns.xywh[usable, 2:]
    bottoms, rights = np.zeros(num_images), np.zeros(num_images)
    np.maximum.at(rights, positions, ends[:, 0])
    np.maximum.at(bottoms, positions, ends[:, 1])
    return bottoms, rights, np.bincount(positions, minlength=num_images) > 0


def file_faults(
    tables: CocoTables,
    headers: Sequence[FileHeader],
    size_codes: Sequence[str],
    *,
    max_examples: int,
) -> list[Fault]:
    """Files that are missing or broken, sizes that differ (`judge_sizes`), photos stored turned."""
    fault = partial(make_fault, max_examples=max_examples, fixable=folder_is_plausible(headers))
    label = partial(image_label, tables)
    states = [header.state for header in headers]
    upright = [i for i, h in enumerate(headers) if h.is_turned and not size_codes[i]]

    def at_state(wanted: FileState) -> list[int]:
        return [index for index, state in enumerate(states) if state is wanted]

    def missing(index: int) -> str:
        problem = headers[index].problem
        return f"{label(index)}: {problem}" if problem else label(index)

    def sizes(index: int) -> str:
        entry, header = tables.images[index], headers[index]
        return (
            f"{label(index)}: JSON height {entry.get('height')}, width {entry.get('width')}; "
            f"file height {header.height}, width {header.width}"
        )

    faults = [
        *fault("missing_file", at_state(FileState.MISSING), missing),
        *fault(
            "unreadable_file",
            at_state(FileState.UNREADABLE),
            lambda i: f"{label(i)}: {headers[i].problem}",
        ),
        *fault("exif_orientation", upright, label),
    ]
    for code in sorted({code for code in size_codes if code}):
        faults += fault(code, [i for i, c in enumerate(size_codes) if c == code], sizes)
    return faults
