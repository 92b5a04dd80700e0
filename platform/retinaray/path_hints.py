"""What a path that cannot be opened probably meant: the nearest name, or what a folder holds.

Asked once, at the end of a command that failed. It reads names, never files.
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

_MOST_NAMES = 2000
_MOST_SHOWN = 3
_DEEPEST = 4
_MOST_FOLDERS = 100
_IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})
_MODELS = frozenset({".pth", ".onnx", ".plan", ".engine"})
_KINDS = (_IMAGES, _MODELS, frozenset({".json", ".jsonl"}), frozenset({".yaml", ".yml"}))


def hint_at_error(error: BaseException) -> str:
    """What to say besides about an error that a local path has caused; empty when nothing helps.

    Args:
        error: Whose cause, or that one's cause, is what the operating system raised.
    """
    cause = error.__cause__
    for _ in range(_DEEPEST):
        if cause is None or isinstance(cause, OSError):
            break
        cause = cause.__cause__
    if not isinstance(cause, OSError) or not isinstance(cause.filename, str):
        return ""
    path = Path(cause.filename)
    if isinstance(cause, IsADirectoryError):
        return hint_at_folder(path)
    if isinstance(cause, FileNotFoundError):
        return hint_at_missing(path)
    return ""


def hint_at_missing(path: Path) -> str:
    """The nearest name to the first part of a path that is not there.

    Returns:
        A sentence without a full stop; empty when the path is there, or no name is alike and
        nothing else can be told.
    """
    missing = path
    while missing.parent != missing and not missing.parent.is_dir():
        missing = missing.parent
    folder = missing.parent
    if missing.exists() or not folder.is_dir():
        return ""
    nearest = _find_nearest(missing, _list_names(folder))
    if nearest:
        return f"nearest: {folder / nearest}"
    if missing != path and str(missing).isprintable():
        return f"the folder {missing} is not there"
    if not path.is_absolute():
        return f"it was looked for in {Path.cwd() / folder}"
    return ""


def hint_at_image(root: Path, name: str) -> str:
    """Where an image of a data set lies that is not below its folder.

    Args:
        root: The folder of images as it was given.
        name: Path of the image in it, as the annotations have it.
    """
    if not root.is_dir():
        return hint_at_missing(root)
    file = Path(name)
    folders = [root.parent, *(root / inner for inner in _list_names(root)[:_MOST_FOLDERS])]
    for folder in folders:
        if (folder / file).is_file():
            return f"it is in {folder}: give that folder"
    if (root / file.name).is_file():
        return f"{root / file.name} is there: take the folder out of the file names"
    for other in _list_names((root / file).parent):
        if Path(other).stem == file.stem:
            return f"{other} is there: the annotations have another ending"
    return hint_at_missing(root / file) if _list_names(root) else "the folder is empty"


def hint_at_folder(path: Path) -> str:
    """What a folder that stands where a file belongs holds, and what to do with it."""
    names = _list_names(path)
    if not names:
        return "the folder is empty"
    endings = Counter(Path(name).suffix.lower() for name in names)
    lowered = {name.lower() for name in names}
    if _is_voc(path):
        return _propose_conversion(path, "voc", "looks like Pascal VOC")
    if {"data.yaml", "dataset.yaml", "labels"} & lowered:
        images = shlex.quote(str(path / "images"))
        return _propose_conversion(path, "yolo", "looks like YOLO", more=f" --images {images}")
    found = [name for name in names if Path(name).suffix.lower() in {".json", *_MODELS}]
    is_beside_images = any(endings[ending] for ending in _IMAGES)
    if is_beside_images and len(found) > _MOST_SHOWN:
        return _propose_conversion(path, "labelme", "looks like LabelMe, a JSON beside each image")
    if found:
        return f"it holds {show_paths([str(path / name) for name in found])}"
    inner = next(filter(_is_voc, (path / name for name in names[:_MOST_FOLDERS])), None)
    if inner is not None:
        return _propose_conversion(inner, "voc", f"holds {inner.name}, which looks like Pascal VOC")
    if endings[".xml"]:
        return _propose_conversion(path, "voc", "holds XML; if that is Pascal VOC")
    if is_beside_images:
        return "it holds images; labels or a model were expected here (images go to --images)"
    if endings[".txt"]:
        return _propose_conversion(
            path, "yolo", "holds .txt files; if these are YOLO labels", more=" --images FOLDER"
        )
    return f"it holds {show_paths([str(path / name) for name in names])}"


def show_paths(paths: Sequence[str]) -> str:
    """The first few of some paths, and how many more there are."""
    shown = ", ".join(paths[:_MOST_SHOWN])
    more = len(paths) - _MOST_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _find_nearest(missing: Path, names: Sequence[str]) -> str:
    """The name whose stem is most like the missing one's; of equals the one with its ending.

    A file of another kind is none: labels are not offered for a model.
    """
    stems: dict[str, str] = {}
    wanted = _find_kind(missing)
    for name in sorted(names, key=lambda name: Path(name).suffix != missing.suffix):
        kind = _find_kind(Path(name))
        if not wanted or not kind or kind == wanted:
            stems.setdefault(Path(name).stem.lower(), name)
    # Endings are left out: all files of a folder are alike in these.
    alike = difflib.get_close_matches(missing.stem.lower(), stems, n=1)
    return stems[alike[0]] if alike else ""


def _find_kind(path: Path) -> frozenset[str]:
    """The endings of files that hold the same as this one; empty when nothing is known of it."""
    return next((kind for kind in _KINDS if path.suffix.lower() in kind), frozenset())


def _is_voc(folder: Path) -> bool:
    """Whether labels lie in a folder as in Pascal VOC; the images may be elsewhere."""
    if not (folder / "Annotations").is_dir():
        return False
    if (folder / "JPEGImages").is_dir():
        return True
    return any(name.lower().endswith(".xml") for name in _list_names(folder / "Annotations"))


def _propose_conversion(path: Path, name: str, looks: str, more: str = "") -> str:
    source = shlex.quote(str(path))
    command = f"retinaray convert {source} train.json --from {name}{more}"
    return f"it {looks}: `{command}` makes COCO of it"


def _list_names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            # What a terminal would obey instead of showing is left out.
            names = (entry.name for entry in islice(entries, _MOST_NAMES))
            return sorted(name for name in names if name.isprintable())
    except OSError:
        # Only a hint is lost; the error that it belongs to is told anyway.
        return []
