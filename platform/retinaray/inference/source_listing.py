"""Images in a folder or below an S3 prefix, one by one or packed in tars, as they are listed.

Nothing here grows with the number of files, nor with the number of images in a tar.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from itertools import groupby, product
from pathlib import Path
from urllib.parse import unquote_to_bytes

from retinaray.errors import DatasetError
from retinaray.inference.read_ahead import chain_ahead
from retinaray.inference.repeat_check import RepeatCheck
from retinaray.inference.source_filters import FoundImage, SourceSieve
from retinaray.inference.tar_shards import TarIndex
from retinaray.storage import FileEntry, Storage, is_s3, join_uri

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
_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_COMPRESSED_TAR = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4|z))$", re.IGNORECASE)
_MOST_NAMES = 1_000_000
_SURROGATE = re.compile("[\ud800-\udfff]")


def is_image(name: str) -> bool:
    """Whether a file's name ends as those of images do."""
    # pathlib does the same in ten times the time.
    dot = name.rfind(".")
    return name[dot:].lower() in IMAGE_SUFFIXES and dot > 0 and name[dot - 1] != "/"


def is_shard(name: str) -> bool:
    """Whether a file's name is that of a tar.

    Raises:
        DatasetError: If it is that of a compressed tar, whose members cannot be read singly.
    """
    if _COMPRESSED_TAR.search(name):
        raise DatasetError(
            f"{name}: members of a compressed tar cannot be read singly; unpack it to a plain "
            ".tar (images do not shrink any further)"
        )
    return ends_as_tar(name)


def ends_as_tar(name: str) -> bool:
    """Whether a name ends in .tar."""
    return name[-4:].lower() == ".tar"


def list_folder(
    place: str, storage: Storage, sieve: SourceSieve, *, threads: int = 8
) -> Iterator[FoundImage]:
    """Image files below a folder or prefix, or the tars there, sorted by URI.

    Args:
        place: Folder, prefix, or the URI of one image.
        storage: Where it is.
        sieve: Tars that it does not admit are left out; of images it only decides whether their
            lengths and dates are looked up.
        threads: Prefixes right below an S3 prefix that are listed at once.

    Raises:
        DatasetError: If there are images and tars side by side.
        StorageError: If the place cannot be listed.
    """
    entries: Iterator[FileEntry] | Iterator[tuple[str, None, None]]
    if is_s3(place):
        entries = _list_prefixes(place, storage, threads=threads)
    elif sieve.choice.needs_details:
        entries = storage.list_entries(place)
    else:
        entries = ((uri, None, None) for uri in storage.list_files(place))
    first: dict[bool, str] = {}
    for uri, num_bytes, modified_s in entries:
        is_tar = ends_as_tar(uri)
        if not is_tar and not is_image(uri):
            continue
        name = name_below(place, uri)
        if is_tar and not sieve.admits_shard(name):
            continue
        first.setdefault(is_tar, uri)
        if len(first) == 2:
            raise DatasetError(
                f"{place}: image files ({first[False]}) and tars ({first[True]}) lie side by side; "
                "name one kind: exclude '*.tar', or give the tars' own folder or names"
            )
        yield FoundImage(name, make_writable(uri), None, num_bytes, modified_s)


def _list_prefixes(place: str, storage: Storage, *, threads: int) -> Iterator[FileEntry]:
    """All objects below a prefix in the order of one listing, made of several at once.

    A page of a listing holds a thousand keys and takes a tenth of a second on AWS, however fast
    this machine is.
    """
    level = storage.list_level(place)
    while level is not None and len(level) == 1 and isinstance(level[0], str):
        level = storage.list_level(level[0])
    if level is None or sum(isinstance(item, str) for item in level) < 2:
        return storage.list_entries(place)

    def expand(item: FileEntry | str) -> Generator[FileEntry, None, None]:
        if isinstance(item, str):
            yield from storage.list_entries(item)
        else:
            yield item

    return chain_ahead(level, expand, threads=threads)


def name_below(place: str, uri: str) -> str:
    """The path of a file below a place, without percent signs for `file://`; else its whole URI."""
    prefix = place if place.endswith("/") else f"{place}/"
    if uri == place:
        name = uri.rpartition("/")[2]
    elif uri.startswith(prefix):
        name = uri[len(prefix) :]
    else:
        return uri
    is_quoted = place.startswith("file://")
    return unquote_to_bytes(name).decode("utf-8", "replace") if is_quoted else name


def make_writable(uri: str) -> str:
    """A local name that is no UTF-8 as a `file://` URI, because results are text."""
    if _SURROGATE.search(uri) and not is_s3(uri):
        return Path(uri).absolute().as_uri()
    return uri


def expand_names(pattern: str) -> Iterator[str]:
    """The names of numbered tars: `a-{000..012}.tar` as WebDataset writes them; others are one.

    Raises:
        DatasetError: If a range runs backwards, or there are more than a million names.
    """
    ranges: list[list[str]] = []
    num_names = 1
    for start, end in _RANGE.findall(pattern):
        if int(start) > int(end):
            raise DatasetError(f"{pattern}: expected a range upwards, found {{{start}..{end}}}")
        num_names *= int(end) - int(start) + 1
        if num_names > _MOST_NAMES:
            raise DatasetError(f"{pattern}: expected up to {_MOST_NAMES} tars, found {num_names}")
        ranges.append([f"{n:0{len(start)}}" for n in range(int(start), int(end) + 1)])
    texts = _RANGE.sub("\0", pattern).split("\0")
    for numbers in product(*ranges):
        yield texts[0] + "".join(n + text for n, text in zip(numbers, texts[1:], strict=True))


def list_named_shards(pattern: str, sieve: SourceSieve) -> Iterator[FoundImage]:
    """The tars that one name or a numbered range of names gives."""
    for uri in expand_names(pattern):
        name = uri.rpartition("/")[2]
        if sieve.admits_shard(name):
            yield FoundImage(name, uri)


def open_shards(
    found: Iterator[FoundImage], storage: Storage, *, threads: int
) -> Iterator[FoundImage]:
    """Put in place of each tar the images in it; everything else passes as it is.

    Args:
        found: Images and tars.
        storage: Where they are.
        threads: Tars that are read at once; their headers, and of members up to 4 MiB also what
            lies between.

    Raises:
        DatasetError: If a tar is damaged, or holds two members of one name.
        StorageError: If a tar cannot be read.
    """

    def open_one(shard: FoundImage) -> Generator[FoundImage, None, None]:
        return _list_members(shard, storage)

    def pass_on(is_tar: bool, images: Iterator[FoundImage]) -> Iterator[FoundImage]:
        return chain_ahead(images, open_one, threads=threads) if is_tar else images

    for is_tar, group in groupby(found, key=lambda image: ends_as_tar(image.uri)):
        yield from pass_on(is_tar, group)


def _list_members(shard: FoundImage, storage: Storage) -> Generator[FoundImage, None, None]:
    num_bytes, modified_s = shard.num_bytes, shard.modified_s
    if num_bytes is None:
        num_bytes = storage.size(shard.uri)
    repeats = RepeatCheck()
    with storage.open_reader(shard.uri) as reader:
        for member in TarIndex(reader, num_bytes, shard.uri).members():
            if not is_image(member.name):
                continue
            name = member.name.removeprefix("./").lstrip("/")
            repeats.add(name.encode())
            yield FoundImage(
                f"{shard.name}/{name}",
                join_uri(shard.uri, name),
                member,
                member.num_bytes,
                modified_s,
                None,
                shard.columns,
            )
    pair = repeats.find()
    if pair is not None:
        raise DatasetError(
            f"{shard.uri}: its images number {pair[0] + 1} and {pair[1] + 1} have one name; "
            "write the tar again with a name for each"
        )
