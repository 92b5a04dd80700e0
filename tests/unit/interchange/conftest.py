from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from retinaray.assembly.convert import ConvertOutcome, run_convert
from retinaray.config.convert_schema import ConvertJob
from retinaray.config.loading import load_from_argv
from retinaray.interchange.known_images import KnownImages
from retinaray.interchange.labelled_set import LabelledBox, LabelledImage, LabelledSet

# Ids with gaps, in no order; names with blanks and other scripts; a subfolder; an empty image.
STREET: dict[str, list[dict[str, Any]]] = {
    "images": [
        {"id": 42, "file_name": "Straße 1.png", "height": 60, "width": 97},
        {"id": 7, "file_name": "sub/b.png", "height": 80, "width": 64},
        {"id": 99, "file_name": "空.png", "height": 33, "width": 50},
    ],
    "annotations": [
        {"id": 1, "image_id": 42, "category_id": 9, "bbox": [1.25, 2.5, 33.1, 40.7]},
        {"id": 2, "image_id": 42, "category_id": 4, "bbox": [0, 0, 97, 60]},
        {"id": 3, "image_id": 7, "category_id": 4, "bbox": [10.123, 20.456, 3.3, 7.77]},
        {"id": 4, "image_id": 7, "category_id": 9, "bbox": [5, 6, 20, 30]},
    ],
    "categories": [{"id": 9, "name": "Ampel rot"}, {"id": 4, "name": "人"}],
}


@pytest.fixture
def street() -> dict[str, list[dict[str, Any]]]:
    """A COCO document; each test gets its own copy, with all fields of a box."""
    document: dict[str, list[dict[str, Any]]] = json.loads(json.dumps(STREET))
    for entry in document["annotations"]:
        entry |= {"area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0, "segmentation": []}
    return document


@pytest.fixture
def street_file(tmp_path: Path, street: dict[str, Any]) -> Path:
    """`street` as a file."""
    path = tmp_path / "street.json"
    path.write_text(json.dumps(street))
    return path


@pytest.fixture
def street_images(tmp_path: Path) -> Path:
    """The images of `street`, grey."""
    folder = tmp_path / "street_images"
    for image in STREET["images"]:
        path = folder / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = io.BytesIO()
        Image.new("L", (image["width"], image["height"])).save(stream, "PNG")
        path.write_bytes(stream.getvalue())
    return folder


@pytest.fixture
def write_files(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder of text files: write_files({"a.txt": "..."})."""

    def write(files: dict[str, str], folder: str = "labels_in") -> Path:
        for name, text in files.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return tmp_path / folder

    return write


@pytest.fixture
def make_set() -> Callable[..., LabelledSet]:
    """A data set of one image a.png, 100 wide and 50 high: make_set(box, ...)."""

    def make(*boxes: LabelledBox, names: tuple[str, ...] = ("car", "dog")) -> LabelledSet:
        return LabelledSet((LabelledImage("a.png", 50, 100, boxes),), names)

    return make


@pytest.fixture
def known() -> KnownImages:
    """Two images without boxes: a.png, 100 wide and 50 high, and sub/b.png, 64 wide, 80 high."""
    images = (LabelledImage("a.png", 50, 100), LabelledImage("sub/b.png", 80, 64))
    return KnownImages(images, "photos")


@pytest.fixture
def convert() -> Callable[..., ConvertOutcome]:
    """Run the command on arguments, as `retinaray convert` does."""

    def run(*argv: object) -> ConvertOutcome:
        return run_convert(load_from_argv(ConvertJob, [str(word) for word in argv]))

    return run
