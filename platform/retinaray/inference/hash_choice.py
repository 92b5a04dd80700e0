"""Which images a hash of their URI chooses: the same for one seed, whoever asks, in any order.

Nobody needs to see the other images: one whose hash lies below a limit is chosen.
"""

from __future__ import annotations

import heapq
from hashlib import blake2b

from retinaray.inference.pipeline import ImageSource

_HASH_BYTES = 8
NUM_HASHES = 1 << 8 * _HASH_BYTES
"""Hashes are whole numbers in [0, NUM_HASHES); a limit of NUM_HASHES chooses every image."""


def hash_uri(uri: str, seed: int) -> int:
    """An evenly distributed number of a URI.

    Args:
        uri: Of any length.
        seed: Another seed gives unrelated numbers; at most 64 bits.
    """
    key = (seed % NUM_HASHES).to_bytes(_HASH_BYTES, "big")
    # Surrogates stand for bytes of file names that are not text.
    data = uri.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=_HASH_BYTES, key=key).digest(), "big")


def limit_for_share(share: float) -> int:
    """The limit below which a share of all hashes lies.

    Args:
        share: In [0, 1].

    Raises:
        ValueError: If it is outside.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"expected a share from 0 to 1, got {share}")
    return round(share * NUM_HASHES)


def is_chosen(source: ImageSource, *, limit: int, seed: int) -> bool:
    """Whether an image is among the chosen ones; see `HashTally` and `limit_for_share`."""
    return hash_uri(source.uri, seed) < limit


class HashTally:
    """Finds, while images pass by, the limit that chooses so many of them.

    Args:
        number: How many images are wanted, at least 0; so many hashes are held in memory.
        seed: As it is given to `is_chosen` later.
    """

    def __init__(self, number: int, seed: int = 0) -> None:
        self._number, self._seed = number, seed
        # The smallest hashes so far, negative, so that the largest of them is on top.
        self._smallest: list[int] = []

    def add(self, source: ImageSource) -> None:
        """Let an image pass."""
        if self._number <= 0:
            return
        key = -hash_uri(source.uri, self._seed)
        if len(self._smallest) < self._number:
            heapq.heappush(self._smallest, key)
        elif key > self._smallest[0]:
            heapq.heapreplace(self._smallest, key)

    @property
    def limit(self) -> int:
        """The limit for `is_chosen`: of the images so far it chooses the number, or all if fewer.

        A file that was listed more than once is chosen each time.
        """
        if len(self._smallest) < self._number:
            return NUM_HASHES
        return 1 - self._smallest[0] if self._smallest else 0
