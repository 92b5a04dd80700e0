"""Merged results as files: COCO results, a COCO data set, ODTK's wrapper, JSON lines.

Every writer streams rows, the images of a run in their order. A row is what a part holds of one
image: image_id, uri, height, width, detections (category_id, bbox xywh, score), and, if there are
any, `member` (its name in a tar) and `columns` (from a manifest).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

from retinaray.errors import ConfigError
from retinaray.inference.part_codec import Compression, Row, compression_of
from retinaray.inference.source_listing import name_below

OutputFormat = Literal["coco-results", "coco-dataset", "jsonl", "parquet", "odtk"]

_FILE_NAME = re.compile(r"(?P<stem>.*[^/])\.(?P<kind>jsonl?)(?P<suffix>|\.gz|\.zst)", re.DOTALL)
_NO_RUN = re.compile(r"\.(gz|zst|parquet|jsonl?)$")

# Gives the rows from the first to the last; may be called again.
Rows = Callable[[], Iterable[Row]]

# Boxes are rounded to hundredths.
_AREA_DIGITS = 4


@dataclass(frozen=True)
class OutputSettings:
    """What a run writes; the same for all who work on it.

    Attributes:
        format: Of the merged result; see the writers here. `parquet` leaves the parts as they are.
        compression: Of the parts; with `parquet` inside the files.
        merged_compression: Of the merged result and of images.json.
        categories: `[{"id": ..., "name": ...}, ...]` in the order of the class index; needed by
            `coco-dataset`, `odtk` and `parquet`.
        images_root: Folder or prefix that file names in `coco-dataset` and `odtk` are relative to.
        has_integer_ids: Whether all image ids are whole numbers of 64 bits; for `parquet`.
    """

    format: OutputFormat = "coco-results"
    compression: Compression = "none"
    merged_compression: Compression = "none"
    categories: tuple[Mapping[str, Any], ...] = ()
    images_root: str = ""
    has_integer_ids: bool = True


@dataclass(frozen=True)
class OutputName:
    """What a user's output stands for.

    Attributes:
        root: Folder or prefix of the run.
        file: The one file that was asked for, or none.
        merged_compression: As the file's name says.
    """

    root: str
    file: str | None
    merged_compression: Compression


def read_output_name(output: str, output_format: OutputFormat) -> OutputName:
    """Tell a file (NAME.json, .jsonl, also with .gz or .zst) from the folder of a whole run.

    Args:
        output: A path or URI; of NAME.json the run is NAME_run beside it.
        output_format: What will be written.

    Raises:
        ConfigError: If the name does not fit the format.
    """
    named = _FILE_NAME.fullmatch(output)
    kind = "jsonl" if output_format == "jsonl" else "json"
    if output_format == "parquet" and _NO_RUN.search(output):
        raise ConfigError(
            f"output={output}: format parquet writes a file per part; give the folder of the run"
        )
    if named is None and not _NO_RUN.search(output):
        return OutputName(output, None, "none")
    if named is None or named["kind"] != kind:
        raise ConfigError(
            f"output={output}: format {output_format} writes NAME.{kind}, NAME.{kind}.gz or "
            f"NAME.{kind}.zst, or a whole run into a folder; rename it, or give another format"
        )
    return OutputName(f"{named['stem']}_run", output, compression_of(output))


class JsonListWriter:
    """A JSON list that is written piece by piece, one line each.

    Args:
        out: Where it goes; nothing else may be written there before `end`.
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._separator = "["

    def extend(self, values: Sequence[object]) -> None:
        """Write the next entries on one line; none write nothing."""
        if values:
            # One call for many entries takes half the time of a call for each.
            self._out.write(f"{self._separator}\n{json.dumps(values)[1:-1]}".encode())
            self._separator = ","

    def end(self) -> None:
        """Write the end of the list."""
        opening = "[" if self._separator == "[" else ""
        self._out.write(f"{opening}\n]".encode())


def write_coco_results(detections: BinaryIO, images: BinaryIO, rows: Rows) -> None:
    """COCO results (image_id, category_id, bbox, score), and beside them the table of images."""
    found, table = JsonListWriter(detections), JsonListWriter(images)
    for row in rows():
        image_id = row["image_id"]
        found.extend([{"image_id": image_id, **detection} for detection in row.pop("detections")])
        table.extend([row])
    for writer, out in ((found, detections), (table, images)):
        writer.end()
        out.write(b"\n")


def write_coco_dataset(
    out: BinaryIO, rows: Rows, *, categories: Sequence[Mapping[str, Any]], images_root: str
) -> None:
    """A COCO data set whose annotations are the detections; each keeps its score.

    Args:
        out: Where it goes.
        rows: Read twice.
        categories: `[{"id": ..., "name": ...}, ...]`.
        images_root: Folder or prefix that file names are relative to; a URI outside stays whole.
    """
    _write_object(
        out,
        {
            "info": {"description": "detections of retinaray"},
            "licenses": [],
            "categories": [dict(category) for category in categories],
            "images": ([_describe_image(row, images_root)] for row in rows()),
            "annotations": _number_annotations(rows),
        },
    )


def write_odtk(
    out: BinaryIO, rows: Rows, *, categories: Sequence[Mapping[str, Any]], images_root: str
) -> None:
    """What `odtk infer` writes: annotations with scores, then images and categories.

    Args:
        out: Where it goes.
        rows: Read twice.
        categories: `[{"id": ..., "name": ...}, ...]`.
        images_root: As in `write_coco_dataset`.
    """
    _write_object(
        out,
        {
            "annotations": (
                [
                    {
                        "image_id": row["image_id"],
                        "score": detection["score"],
                        "category_id": detection["category_id"],
                        "bbox": detection["bbox"],
                    }
                    for detection in row["detections"]
                ]
                for row in rows()
            ),
            "images": ([_describe_image(row, images_root)] for row in rows()),
            "categories": [dict(category) for category in categories],
        },
    )


def write_json_lines(out: BinaryIO, rows: Rows) -> None:
    """One line per image, with its detections."""
    for row in rows():
        out.write((json.dumps(row) + "\n").encode())


def _write_object(out: BinaryIO, sections: Mapping[str, object]) -> None:
    """A JSON object; values that are generators of lists become one list, piece by piece."""
    separator = "{"
    for key, value in sections.items():
        out.write(f"{separator}\n{json.dumps(key)}: ".encode())
        separator = ","
        if isinstance(value, Generator):
            entries = JsonListWriter(out)
            for piece in value:
                entries.extend(piece)
            entries.end()
        else:
            out.write(json.dumps(value).encode())
    out.write(b"\n}\n")


def _describe_image(row: Row, images_root: str) -> Row:
    """An image as COCO's tables have it; `coco_url` tells its whole URI."""
    image = {
        "id": row["image_id"],
        "file_name": name_below(images_root, row["uri"]),
        "height": row["height"],
        "width": row["width"],
        "coco_url": row["uri"],
    }
    return image | ({"columns": row["columns"]} if "columns" in row else {})


def _number_annotations(rows: Rows) -> Generator[list[Row], None, None]:
    next_id = 1
    for row in rows():
        yield [
            {
                "id": number,
                "image_id": row["image_id"],
                "category_id": detection["category_id"],
                "bbox": detection["bbox"],
                "area": round(detection["bbox"][2] * detection["bbox"][3], _AREA_DIGITS),
                "score": detection["score"],
                "iscrowd": 0,
                # Empty, not absent: readers such as CVAT's refuse a box without it.
                "segmentation": [],
            }
            for number, detection in enumerate(row["detections"], start=next_id)
        ]
        next_id += len(row["detections"])
