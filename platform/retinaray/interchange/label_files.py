"""Label files on disk: found, read as text, and named after their images.

One rule for all formats with a file per image: the label file has the image's name, subfolders
included, with the format's ending.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from retinaray.data.image_paths import file_name_problem
from retinaray.errors import DatasetError
from retinaray.interchange.labelled_set import LabelledSet
from retinaray.local_listing import walk_names

CLASS_FILE = "classes.txt"
"""Class names in class order, one a line, beside labels that have no place for them."""


def list_label_files(folder: Path, ending: str) -> list[str]:
    """Names of the label files below a folder, relative to it, sorted.

    Args:
        folder: Where they are.
        ending: Of their names, such as `.xml`.

    Raises:
        DatasetError: If the folder cannot be read, or there is none.
    """
    try:
        names = [name for name in walk_names(folder) if name.lower().endswith(ending)]
    except OSError as error:
        raise DatasetError(
            f"{folder}: expected a folder of {ending} files, cannot read it: {error.strerror}"
        ) from error
    if not names:
        raise DatasetError(f"{folder}: expected label files *{ending}, found none; check the path")
    return names


def read_label_text(path: Path) -> str:
    """Content of a text file in UTF-8, a mark of the byte order left out.

    Raises:
        DatasetError: If it cannot be read, or is no UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DatasetError(f"{path}: cannot read it: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DatasetError(f"{path}, line {line}: expected text in UTF-8; save it so") from error


def read_class_lines(path: Path) -> tuple[str, ...]:
    """Class names, one a line; empty lines at the end do not count.

    Raises:
        DatasetError: If a line is empty or comes twice, or there is none.
    """
    lines = [line.strip() for line in read_label_text(path).rstrip().split("\n")]
    for number, name in enumerate(lines, 1):
        if not name or name in lines[: number - 1]:
            fault = "twice" if name else "an empty line"
            raise DatasetError(
                f"{path}, line {number}: expected one class name a line, each once, found "
                f"{fault}{f' {name!r}' if name else ''}"
            )
    return tuple(lines)


def read_numbers(words: Sequence[str], place: str) -> list[float]:
    """Words as finite numbers.

    Raises:
        DatasetError: Naming the place and the first word that is none.
    """
    numbers = []
    for word in words:
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise DatasetError(f"{place}: expected a number, found {word!r}")
        numbers.append(number)
    return numbers


def name_label_files(labels: LabelledSet, ending: str, source: str) -> list[str]:
    """Name of each image's label file, in the order of the images.

    Raises:
        DatasetError: If an image's name leads out of its folder, or two images would share a file.
    """
    names: dict[str, str] = {}
    for image in labels.images:
        problem = file_name_problem(image.file_name)
        if problem is not None:
            raise DatasetError(
                f"{source}: file_name {image.file_name!r} {problem}; expected a name relative to "
                "the image folder"
            )
        name = str(PurePosixPath(image.file_name).with_suffix(ending))
        if name in names:
            raise DatasetError(
                f"{source}: {names[name]!r} and {image.file_name!r} would share the label file "
                f"{name!r}; rename one of the images"
            )
        names[name] = image.file_name
    return list(names)


def write_class_lines(names: Sequence[str], source: str) -> str:
    """Text of `CLASS_FILE`.

    Raises:
        DatasetError: If a name holds a line break, or blanks at an end.
    """
    for name in names:
        if name != name.strip() or len(name.splitlines()) != 1:
            raise DatasetError(
                f"{source}: the class name {name!r} holds a line break, or blanks at an end; "
                "rename it"
            )
    return "".join(f"{name}\n" for name in names)
