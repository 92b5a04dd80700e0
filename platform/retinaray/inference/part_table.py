"""The parts of a run as Parquet: one row per part, which one worker takes.

Written once, before any worker starts; memory holds one part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from retinaray.inference.hash_choice import HashTally
from retinaray.inference.manifest import Part
from retinaray.inference.pipeline import ImageSource, TarMember
from retinaray.storage import Storage, join_uri

PART_SCHEMA = pa.schema(
    [
        ("part", pa.int64()),
        # JSON texts, because ids may be numbers or strings and columns anything.
        ("sources", pa.list_(pa.string())),
    ]
)
_PARTS_PER_FILE = 500
_IMAGES_PER_FILE = 500_000
_LARGEST_INTEGER = 2**63 - 1


@dataclass(frozen=True)
class PartTotals:
    """What was cut.

    Attributes:
        num_parts: Rows of the table.
        num_images: Images in them.
        has_integer_ids: Whether every image id is a whole number of 64 bits.
        draw_limit: The limit for `hash_choice.is_chosen` that draws so many images as were asked.
    """

    num_parts: int
    num_images: int
    has_integer_ids: bool
    draw_limit: int


def write_parts(
    parts: Iterable[Part],
    folder: str,
    storage: Storage,
    *,
    num_drawn: int = 0,
    draw_seed: int = 0,
) -> PartTotals:
    """Write parts as Parquet files with one row group per part.

    Args:
        parts: In their order.
        folder: Folder or S3 prefix of the files.
        storage: Where it is.
        num_drawn: Images of the run that pictures are wanted of.
        draw_seed: Another seed draws others.

    Raises:
        StorageError: If they cannot be written.
    """
    remaining = iter(parts)
    tally = HashTally(num_drawn, draw_seed)
    num_parts = num_images = 0
    has_integer_ids = True
    for first in remaining:
        name = f"parts-{first.number:09}.parquet"
        with (
            storage.open_writer(join_uri(folder, name)) as out,
            pq.ParquetWriter(out, PART_SCHEMA) as writer,
        ):
            for part in _take_file(chain([first], remaining)):
                texts = [encode_source(source) for source in part.sources]
                row = {"part": [part.number], "sources": [texts]}
                # One row group per part, so that a reader of one part need not hold the others.
                writer.write_table(pa.Table.from_pydict(row, schema=PART_SCHEMA))
                num_parts += 1
                num_images += len(part.sources)
                has_integer_ids &= all(map(_is_integer, part.sources))
                for source in part.sources:
                    tally.add(source)
    return PartTotals(num_parts, num_images, has_integer_ids, tally.limit)


def _take_file(parts: Iterator[Part]) -> Iterator[Part]:
    """The parts that make one file."""
    num_parts = num_images = 0
    while num_parts < _PARTS_PER_FILE and num_images < _IMAGES_PER_FILE:
        part = next(parts, None)
        if part is None:
            return
        yield part
        num_parts += 1
        num_images += len(part.sources)


def _is_integer(source: ImageSource) -> bool:
    return isinstance(source.image_id, int) and abs(source.image_id) <= _LARGEST_INTEGER


def read_part(row: Mapping[str, Any]) -> list[ImageSource]:
    """The images of one row of the table, in their order."""
    return [decode_source(text) for text in row["sources"]]


def encode_source(source: ImageSource) -> str:
    """An image as one line of JSON."""
    values: dict[str, Any] = {"image_id": source.image_id, "uri": source.uri}
    if source.member is not None:
        values["member"] = asdict(source.member)
    if source.columns is not None:
        values["columns"] = source.columns
    return json.dumps(values)


def decode_source(text: str) -> ImageSource:
    """The image that `encode_source` wrote."""
    values = json.loads(text)
    member = values.get("member")
    return ImageSource(
        values["image_id"],
        values["uri"],
        TarMember(**member) if member else None,
        values.get("columns"),
    )
