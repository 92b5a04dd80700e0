"""Which images a run processes, in which order, under which ids, and how they are cut into parts.

A part is the unit of work and of commitment. The cut depends on the order of the images alone, so
that the files of a run do not depend on the number of workers. Everything streams: nothing here
grows with the number of images, except with a COCO file, which is read whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from retinaray.data.coco import resolve_image_uri
from retinaray.errors import DatasetError
from retinaray.inference.manifest_tables import folder_of, is_table, list_table
from retinaray.inference.pipeline import ImageSource
from retinaray.inference.source_filters import FoundImage, SourceChoice, SourceSieve
from retinaray.inference.source_listing import (
    IMAGE_SUFFIXES,
    is_shard,
    list_folder,
    list_named_shards,
    make_writable,
    name_below,
    open_shards,
)
from retinaray.path_hints import hint_at_folder, hint_at_missing
from retinaray.storage import Storage, find_secret, hide_secret, is_s3, local_path

# The first parts are small, so that a small set still keeps all workers busy; later ones amortise
# the commit.
_GROWTH = ((64, 16), (64, 64), (256, 256))
_LARGEST = 1000
_VIDEOS = frozenset({".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".wmv", ".mpg", ".mpeg"})
_TAKE_ALL = SourceChoice()


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
    images: str,
    annotations: Mapping[str, Any] | None,
    storage: Storage,
    *,
    choice: SourceChoice = _TAKE_ALL,
    threads: int = 8,
) -> Iterator[ImageSource]:
    """The images of a run.

    Args:
        images: Folder or S3 prefix of image files or of tars; one image; one .tar or a numbered
            range of them (`a-{000..012}.tar`); a list (.txt, .csv, .jsonl, .parquet; see
            `manifest_tables`); or a COCO .json whose file names lie beside it.
        annotations: Content of a COCO file; then `images` is the folder or prefix of its file
            names.
        storage: Where to look.
        choice: Which of the images that are found are taken.
        threads: Prefixes that are listed at once, or tars whose headers are read.

    Yields:
        Images in the order of the COCO file or of the list, else sorted by URI, those of a tar in
        its order. Ids are the COCO file's or the list's, else they count from 1 over the images
        that are taken.

    Raises:
        ConfigError: If the choice asks for lengths or dates and there is no listing that knows
            them.
        DatasetError: If there is no image, none is left, or a list or tar is malformed.
        StorageError: If the location cannot be read.
    """
    sieve = SourceSieve(choice, images)
    if annotations is not None:
        sieve.expect_no_details("a COCO file")
        found = _list_coco(images, annotations)
    elif images.lower().endswith(".json"):
        sieve.expect_no_details("a COCO file")
        content = _parse_json(storage.read_bytes(images), images)
        found = _list_coco(folder_of(images), content)
    elif is_table(images):
        sieve.expect_no_details("a list of images")
        found = open_shards(list_table(images, storage), storage, threads=threads)
    elif is_shard(images):
        sieve.expect_no_dates("a tar that is named")
        found = open_shards(list_named_shards(images, sieve), storage, threads=threads)
    else:
        listed = list_folder(images, storage, sieve, threads=threads)
        found = open_shards(listed, storage, threads=threads)
    return _refuse_empty(_number(sieve.choose(found)), images)


def source_root(images: str, annotations: Mapping[str, Any] | None = None) -> str:
    """The folder or prefix that the images of `list_sources` lie in, as far as one is known.

    URIs below it become file names of a COCO data set that is written from the results.
    """
    is_folder = annotations is not None or not (
        images.lower().endswith(".json") or is_table(images) or is_shard(images)
    )
    return images.rstrip("/") if is_folder else folder_of(images)


def _number(found: Iterable[FoundImage]) -> Iterator[ImageSource]:
    for number, image in enumerate(found, start=1):
        image_id = number if image.image_id is None else image.image_id
        yield ImageSource(image_id, image.uri, image.member, image.columns)


def _refuse_empty(sources: Iterator[ImageSource], images: str) -> Iterator[ImageSource]:
    first = next(sources, None)
    if first is None:
        hint = _hint_at_empty(images)
        raise DatasetError(
            f"{images}: no images found; expected a folder, an S3 prefix, a .tar, a list of URIs "
            "(.txt, .csv, .jsonl, .parquet) or a COCO .json "
            f"(image files end in {', '.join(sorted(IMAGE_SUFFIXES)[:6])}, ...)"
            + (f"; {hint}" if hint else "")
        )
    yield first
    yield from sources


def _hint_at_empty(images: str) -> str:
    if is_s3(images):
        return ""
    path = local_path(images)
    if path.suffix.lower() in _VIDEOS:
        return "this is a video: cut it into images first (ffmpeg -i FILE frames/%06d.jpg)"
    if path.is_dir():
        return hint_at_folder(path)
    return hint_at_missing(path) or ("" if path.exists() else "there is no such folder")


def _list_coco(root: str, content: Any) -> Iterator[FoundImage]:
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
    return (_make_coco_image(root, record) for record in records)


def _make_coco_image(root: str, record: Mapping[str, Any]) -> FoundImage:
    uri = resolve_image_uri(root, record["file_name"])
    secret = find_secret(uri)
    if secret:
        raise DatasetError(
            f"COCO file for {root}: file_name {hide_secret(uri)!r} holds {secret}, which the "
            "results would repeat; write the name of the file alone"
        )
    return FoundImage(name_below(root, uri), make_writable(uri), image_id=record["id"])


def _is_complete(record: Any) -> bool:
    return (
        isinstance(record, Mapping)
        and type(record.get("id")) in (int, str)
        and isinstance(record.get("file_name"), str)
    )


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


def count_images(
    numbers: Iterable[int], *, part_size: int | None, num_parts: int, num_images: int
) -> int:
    """Images in some parts of a cut, without reading the manifest.

    Args:
        numbers: Of the parts, each once.
        part_size: As the cut was made with.
        num_parts: Parts of the whole cut.
        num_images: Images of the whole cut.
    """
    last = num_parts - 1
    count = 0
    for number in numbers:
        count += part_size or _size_of(number)
        if number == last:
            # The last part holds what was left.
            count -= _end_of(last, part_size) - num_images
    return count


def _end_of(number: int, part_size: int | None) -> int:
    """Images up to the end of a part, were it full."""
    if part_size is not None:
        return (number + 1) * part_size
    end, first = 0, 0
    for count, size in _GROWTH:
        taken = min(count, number + 1 - first)
        end += taken * size
        first += taken
    return end + (number + 1 - first) * _LARGEST


def _size_of(number: int) -> int:
    for count, size in _GROWTH:
        if number < count:
            return size
        number -= count
    return _LARGEST
