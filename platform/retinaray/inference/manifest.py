"""Which images a run processes, in which order, under which ids, and how they are cut into parts.

A part is the unit of work and of commitment. The cut depends on the order of the images alone, so
that the files of a run do not depend on the number of workers. Everything streams: nothing here
grows with the number of images.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from retinaray.data.coco import resolve_image_uri
from retinaray.errors import DatasetError
from retinaray.inference.pipeline import ImageSource
from retinaray.storage import Storage, is_s3, join_uri

IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".gif",
        ".webp",
        ".tif",
        ".tiff",
        ".avif",
        ".jp2",
        ".j2k",
        ".mpo",
        ".ppm",
        ".pgm",
    ]
)
# The first parts are small, so that a small set still keeps all workers busy; later ones amortise
# the commit.
_GROWTH = ((64, 16), (64, 64), (256, 256))
_LARGEST = 1000


@dataclass(frozen=True)
class Part:
    """Images that are processed and committed together.

    Attributes:
        number: Position of the part in the run, from 0.
        sources: Its images, at least one.
    """

    number: int
    sources: tuple[ImageSource, ...]


def list_sources(
    images: str, annotations: Mapping[str, Any] | None, storage: Storage
) -> Iterator[ImageSource]:
    """The images of a run.

    Args:
        images: Folder, S3 prefix, .txt list of URIs, or COCO .json whose file names lie beside it.
        annotations: Content of a COCO file; then `images` is the folder or prefix of its file
            names.
        storage: Where to look.

    Yields:
        Images in the order of the COCO file or of the list, else sorted by URI. Ids are the COCO
        file's, else they count from 1.

    Raises:
        DatasetError: If there is no image, or the list is malformed.
        StorageError: If the location cannot be read.
    """
    if annotations is not None:
        found = _list_coco(images, annotations)
    elif images.lower().endswith(".json"):
        content = _parse_json(storage.read_bytes(images), images)
        found = _list_coco(_parent(images), content)
    elif images.lower().endswith((".txt", ".lst")):
        found = _number(_read_list(images, storage))
    else:
        found = _number(uri for uri in storage.list_files(images) if _is_image(uri))
    return _refuse_empty(found, images)


def _refuse_empty(sources: Iterator[ImageSource], images: str) -> Iterator[ImageSource]:
    first = next(sources, None)
    if first is None:
        raise DatasetError(
            f"{images}: no images found; expected a folder, an S3 prefix, a .txt list of URIs "
            "or a COCO .json "
            f"(image files end in {', '.join(sorted(IMAGE_SUFFIXES)[:6])}, ...)"
        )
    yield first
    yield from sources


def _is_image(uri: str) -> bool:
    return PurePosixPath(uri).suffix.lower() in IMAGE_SUFFIXES


def _number(uris: Iterable[str]) -> Iterator[ImageSource]:
    return (ImageSource(number, uri) for number, uri in enumerate(uris, start=1))


def _list_coco(root: str, content: Any) -> Iterator[ImageSource]:
    records = content.get("images") if isinstance(content, Mapping) else None
    if not isinstance(records, list):
        raise DatasetError(f"COCO file for {root}: expected an object with a list 'images'")
    incomplete = [record for record in records if not _is_complete(record)]
    if incomplete:
        raise DatasetError(
            f"COCO file for {root}: {len(incomplete)} images without a usable id or file_name, "
            f"first: {incomplete[0]}"
        )
    seen: set[int | str] = set()
    for record in records:
        if record["id"] in seen:
            raise DatasetError(
                f"COCO file for {root}: image id {record['id']!r} occurs twice; "
                "run `retinaray doctor --fix` on it"
            )
        seen.add(record["id"])
    return (
        ImageSource(record["id"], resolve_image_uri(root, record["file_name"]))
        for record in records
    )


def _is_complete(record: Any) -> bool:
    return (
        isinstance(record, Mapping)
        and type(record.get("id")) in (int, str)
        and isinstance(record.get("file_name"), str)
    )


def _read_list(uri: str, storage: Storage) -> Iterator[str]:
    """URIs of a text file, one per line, relative to the file; `#` is part of a name."""
    root = _parent(uri)
    with storage.open_reader(uri) as reader:
        for number, line in enumerate(reader, start=1):
            entry = _decode_line(line, uri, number)
            if entry:
                is_absolute = is_s3(entry) or entry.startswith(("/", "file://"))
                yield entry if is_absolute else join_uri(root, entry)


def _decode_line(line: bytes, uri: str, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{uri}, line {number}: expected UTF-8 text, one URI per line: {error}"
        ) from error


def _parent(uri: str) -> str:
    folder, slash, _ = uri.rpartition("/")
    return folder or slash or "."


def _parse_json(content: bytes, uri: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise DatasetError(f"{uri}: expected COCO JSON: {error}") from error


def cut_parts(sources: Iterable[ImageSource], part_size: int | None = None) -> Iterator[Part]:
    """Cut images into numbered parts.

    Args:
        sources: Images in their order.
        part_size: Images per part; none = 16 at first, growing to 1000.

    Yields:
        Parts; together they hold each image once, in order.
    """
    remaining = iter(sources)
    number = 0
    while chunk := tuple(islice(remaining, part_size or _size_of(number))):
        yield Part(number, chunk)
        number += 1


def _size_of(number: int) -> int:
    for count, size in _GROWTH:
        if number < count:
            return size
        number -= count
    return _LARGEST
