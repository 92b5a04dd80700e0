"""What became of earlier attempts at a part: how an image that kills its worker is found.

A worker that dies can say nothing any more, so it writes down what it is about to do. The first two
attempts at a part write down that they began, no more: most deaths have nothing to do with an image
(a lost node, a spot instance, memory that somebody else took). Later attempts first read the images
one by one, each written down before; one that twice was the last thing a worker did is recorded as
an error, and the rest of its part goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

from retinaray.errors import ImageError, MissingFileError, StorageError
from retinaray.inference.pipeline import ImageSource
from retinaray.storage import Storage, join_uri

PLAIN_ATTEMPTS = 2
"""Attempts at a part before its images are suspected."""
DEATHS_PER_IMAGE = 2
"""An image with so many workers on its account is given up."""
MAX_ATTEMPTS = 16
"""Enough for seven such images in one part; then the part is reported."""


@dataclass(frozen=True)
class Journal:
    """What attempts at a part have left.

    Attributes:
        attempt: How many began, this one among them.
        reading: Index of the image that is being read; none while nothing is suspected.
        deaths: Workers that died while reading, by index of the image as text.
    """

    attempt: int = 0
    reading: int | None = None
    deaths: dict[str, int] = field(default_factory=dict)


class PartAttempts:
    """The journal of one part, kept beside its run until the part is committed.

    Args:
        root: Folder or S3 prefix of the run.
        number: Of the part.
        storage: Where it is.
    """

    def __init__(self, root: str, number: int, storage: Storage) -> None:
        self._uri = join_uri(root, "attempts", f"part-{number:09}.json")
        self._storage = storage
        self._journal = Journal()

    @property
    def is_suspicious(self) -> bool:
        """Whether the images are to be read one by one before they are used."""
        return self._journal.attempt > PLAIN_ATTEMPTS

    @property
    def is_first(self) -> bool:
        """Whether nobody began this part before."""
        return self._journal.attempt == 1

    def begin(self) -> frozenset[int]:
        """Write down that an attempt begins.

        Returns:
            Indices of the images that are given up.

        Raises:
            StorageError: If the journal cannot be read or written.
        """
        earlier = self._read()
        deaths = dict(earlier.deaths)
        if earlier.reading is not None:
            key = str(earlier.reading)
            deaths[key] = deaths.get(key, 0) + 1
        self._write(Journal(attempt=earlier.attempt + 1, deaths=deaths))
        return frozenset(int(key) for key, count in deaths.items() if count >= DEATHS_PER_IMAGE)

    def probe(
        self,
        sources: Sequence[ImageSource],
        load: Callable[[ImageSource], object],
        given_up: frozenset[int],
    ) -> None:
        """Read the images one by one, each written down before; what they raise comes later again.

        Args:
            sources: Images of the part.
            load: Fetches and decodes one; may raise ImageError or StorageError, or end the process.
            given_up: Indices that are left out.
        """
        for index, source in enumerate(sources):
            if index in given_up:
                continue
            self._write(replace(self._journal, reading=index))
            _try(load, source)
        self._write(replace(self._journal, reading=None))

    def end(self) -> None:
        """The part is committed; nothing needs to be known of it any more."""
        self._storage.delete(self._uri)

    def _read(self) -> Journal:
        try:
            values = json.loads(self._storage.read_bytes(self._uri))
            return Journal(**values)
        except MissingFileError:
            return Journal()
        except (ValueError, TypeError) as error:
            raise StorageError(
                f"{self._uri}: expected the journal of a part, found something else ({error}): "
                "delete it and run the same command again"
            ) from error

    def _write(self, journal: Journal) -> None:
        self._journal = journal
        self._storage.write_bytes(self._uri, json.dumps(asdict(journal)).encode())


def _try(load: Callable[[ImageSource], object], source: ImageSource) -> None:
    try:
        load(source)
    except (ImageError, StorageError):
        # An image that merely fails kills nobody; it fails again where results are collected.
        return


def refuse_given_up(
    read: Callable[[str], bytes], given_up: Sequence[ImageSource]
) -> Callable[[str], bytes]:
    """A reader that raises for the images that killed their workers.

    Args:
        read: Gives the bytes at a URI.
        given_up: Images that are not to be touched any more.

    Returns:
        The reader; of these images it raises ImageError.
    """
    uris = {source.uri for source in given_up}

    def read_others(uri: str) -> bytes:
        if uri in uris:
            raise ImageError(
                f"{uri}: {DEATHS_PER_IMAGE} worker processes ended while they read this file "
                "(memory, or a fault of the decoder); it was left out: look at the file"
            )
        return read(uri)

    return read_others
