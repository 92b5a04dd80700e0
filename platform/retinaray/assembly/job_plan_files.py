"""What is known of a job's image files before it runs: their number and their lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from retinaray.assembly.reading import read_json
from retinaray.assembly.run_plan import make_choice
from retinaray.config.schema import InferJob
from retinaray.data.coco import CocoDataset, resolve_image_uri
from retinaray.errors import MissingFileError
from retinaray.inference.image_sources import ImageSource
from retinaray.inference.manifest import cut_parts, list_sources
from retinaray.inference.source_listing import is_image
from retinaray.storage import Storage, is_s3

# The cut is the same for all parts behind these; see `cut_parts`.
_CUT_IN_FULL = 100_000


@dataclass(frozen=True)
class FileFacts:
    """Some image files.

    Attributes:
        num_files: How many there are; at least so many if `is_cut_off`.
        mean_bytes: Of those that were looked at, or as assumed.
        largest_bytes: Likewise.
        is_assumed: No file was looked at.
        is_cut_off: The listing was ended early.
        absent: URIs that were expected and are not there, the first few.
        num_absent: How many.
    """

    num_files: int
    mean_bytes: float
    largest_bytes: int
    is_assumed: bool = False
    is_cut_off: bool = False
    absent: tuple[str, ...] = ()
    num_absent: int = 0


def assume_files(num_files: int, image_bytes: int) -> FileFacts:
    """Files that nobody has looked at."""
    return FileFacts(num_files, float(image_bytes), image_bytes, is_assumed=True)


def inspect_training_files(
    dataset: CocoDataset, root: str, storage: Storage, *, limit: int, image_bytes: int
) -> FileFacts:
    """The files of a data set.

    Args:
        dataset: Names them; at least one image.
        root: Their folder or prefix.
        storage: Where it is.
        limit: Files that are looked at, at most.
        image_bytes: Taken where none can be.

    Raises:
        StorageError: If the place cannot be listed.
    """
    uris = [resolve_image_uri(root, record.file_name) for record in dataset.images]
    if is_s3(root):
        entries = list(islice(storage.list_entries(root), limit + 1))
        sizes = {entry.uri: entry.num_bytes for entry in entries[:limit]}
        found = [sizes[uri] for uri in uris if uri in sizes]
        # Behind the end of the listing everything may be there.
        absent = [uri for uri in uris if uri not in sizes] if len(entries) <= limit else []
    else:
        looked_at = [(uri, _find_size(uri, storage)) for uri in uris[:limit]]
        found = [size for _, size in looked_at if size is not None]
        absent = [uri for uri, size in looked_at if size is None]
    facts = _summarise(found, len(uris), image_bytes)
    return replace(facts, absent=tuple(absent[:3]), num_absent=len(absent))


def inspect_inference_files(
    job: InferJob, storage: Storage, *, num_images: int | None, limit: int, image_bytes: int
) -> FileFacts:
    """The images that a batch inference would take.

    Args:
        job: Says where and which.
        storage: Where they are.
        num_images: How many there are, if they need not be counted.
        limit: Files that are looked at, at most.
        image_bytes: Taken where no length is known.

    Raises:
        ConfigError, DatasetError: If the choice cannot be made, or there is no image.
        StorageError: If the place cannot be read.
    """
    if num_images is not None:
        return assume_files(num_images, image_bytes)
    truth = read_json(job.annotations, job.reading) if job.annotations else None
    sources = list_sources(job.images, truth, storage, choice=make_choice(job.select))
    taken = list(islice(sources, limit + 1))
    sizes = [size for size in _find_sizes(job, taken[:limit], storage, limit) if size is not None]
    facts = _summarise(sizes, min(len(taken), limit), image_bytes)
    return replace(facts, is_cut_off=len(taken) > limit)


def count_parts(num_images: int, part_size: int | None) -> int:
    """Parts that so many images are cut into; as `cut_parts` does it, without cutting them all.

    Args:
        num_images: At least 1.
        part_size: Images per part; none = 16 at first, growing.
    """
    if part_size is not None:
        return -(-num_images // part_size)
    image = ImageSource(0, "")
    sizes = [
        len(part.sources) for part in cut_parts([image] * min(num_images, _CUT_IN_FULL), part_size)
    ]
    if num_images <= _CUT_IN_FULL:
        return len(sizes)
    whole = sizes[:-1]
    return len(whole) + -(-(num_images - sum(whole)) // whole[-1])


def _find_sizes(
    job: InferJob, taken: Sequence[ImageSource], storage: Storage, limit: int
) -> Iterator[int | None]:
    members = [source.member.num_bytes for source in taken if source.member is not None]
    if members:
        yield from members
    elif all(not is_s3(source.uri) for source in taken):
        for source in taken:
            yield _find_size(source.uri, storage)
    elif not job.annotations and not job.images.lower().endswith((".json", ".txt", ".csv")):
        listed = (entry for entry in storage.list_entries(job.images) if is_image(entry.uri))
        yield from (entry.num_bytes for entry in islice(listed, limit))


def _find_size(uri: str, storage: Storage) -> int | None:
    try:
        return storage.size(uri)
    except MissingFileError:
        return None


def _summarise(sizes: Iterable[int], num_files: int, image_bytes: int) -> FileFacts:
    sizes = list(sizes)
    if not sizes:
        return assume_files(num_files, image_bytes)
    return FileFacts(num_files, sum(sizes) / len(sizes), max(sizes))


def describe_absent(facts: FileFacts, root: str) -> str:
    """One line on files that are not there; see `FileFacts.absent`."""
    return (
        f"{facts.num_absent:,} of {facts.num_files:,} images are not in {root}, the first: "
        f"{', '.join(facts.absent)}: give the right --images, or `retinaray doctor --fix`"
    )
