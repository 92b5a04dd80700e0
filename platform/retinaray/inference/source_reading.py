"""Bytes of images by their URI, whether they are files of their own or lie in a tar."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from retinaray.inference.pipeline import ImageSource
from retinaray.storage import Storage


def make_source_reader(
    sources: Iterable[ImageSource], storage: Storage, *, max_bytes: int | None = None
) -> Callable[[str], bytes]:
    """A function that gives the bytes at the URI of any of some images.

    Args:
        sources: Images of one part; where those in tars lie is kept.
        storage: Where they are.
        max_bytes: Longer files are refused before they are read; none = of any length.

    Returns:
        The reader; it raises StorageError.
    """
    members = {source.uri: source.member for source in sources if source.member is not None}

    def read(uri: str) -> bytes:
        member = members.get(uri)
        if member is None:
            return storage.read_bytes(uri, max_bytes=max_bytes)
        return storage.read_range(member.shard, member.offset, member.num_bytes)

    return read
