"""DeepStream's KITTI dump as COCO results, so that what runs on a device can be scored.

deepstream-app writes one text file per frame, `00_000_000012.txt` (application, stream, frame), one
line per object: label, truncated, occluded, alpha, left, top, right, bottom, seven more numbers
that say nothing about a flat box, score. Coordinates are pixels of the muxer's frame. This module
opens no file.

Source: deepstream_app.c of DeepStream 9.1, `write_kitti_output`, `write_kitti_track_output`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retinaray.data.coco import CategoryTable
from retinaray.data.coco_results import BOX_DIGITS, SCORE_DIGITS
from retinaray.data.label_lines import label_lines
from retinaray.errors import DatasetError

_FILE_NAME = re.compile(r"(\d+)_(\d+)_(\d+)\.txt")
# After the label: truncated, occluded, alpha, four corners, seven numbers, score.
_NUM_NUMBERS = 15
_EXPECTED = "label truncated occluded alpha left top right bottom h w l x y z ry score"


@dataclass(frozen=True)
class _Frame:
    """One frame: the image it shows, and how its pixels become the image's."""

    image_id: int | str
    width: float
    height: float
    scale_x: float
    scale_y: float


def read_kitti_dump(
    files: Mapping[str, bytes],
    categories: CategoryTable,
    images: Sequence[Mapping[str, Any]],
    *,
    order: Sequence[str] | None = None,
    frame: tuple[int, int] | None = None,
    has_track_ids: bool = False,
    stream: int | None = None,
    source: str = "kitti",
) -> list[dict[str, object]]:
    """Read the dump of a run over a set of images.

    Args:
        files: File name, without folders, to content; names that begin with a dot are passed over.
        categories: The model's; their names stand in the dump as `label_lines` writes them.
        images: The annotations' `images`: id, file_name, width, height.
        order: File names in the order in which the device saw them, frame 0 first; none = all
            images, by rising file name.
        frame: Height and width of the muxer's frames; none = those of each image.
        has_track_ids: The dump is that of `kitti-track-output-dir`, where an identity follows the
            label. The scores there are the tracker's.
        stream: Which stream of the dump; none = there is only one.
        source: What messages call the folder.

    Returns:
        COCO results: image_id, category_id, bbox xywh in original pixels, cut to the image and
        rounded as `coco_results` does, score; frame by frame, best first.

    Raises:
        DatasetError: If a line cannot be read, named by file and line; if a label is unknown; if
            frames and images do not match one to one.
    """
    numbered = _number_files(files, stream, source)
    frames = _match_frames(sorted(numbered), _order_images(images, order, source), frame, source)
    ids = dict(zip(label_lines(categories), categories.ids, strict=True))
    results: list[dict[str, object]] = []
    for number, target in enumerate(frames):
        name = numbered[number]
        place = f"{source}/{name}"
        found = [
            {"image_id": target.image_id, **result}
            for line_number, line in _split_lines(files[name], place)
            if (
                result := _read_line(
                    line,
                    place=f"{place}, line {line_number}",
                    target=target,
                    ids=ids,
                    has_track_ids=has_track_ids,
                )
            )
        ]
        results += sorted(found, key=lambda entry: -float(str(entry["score"])))
    return results


def _number_files(files: Mapping[str, bytes], stream: int | None, source: str) -> dict[int, str]:
    """Frame number to file name, of one stream."""
    streams: dict[int, dict[int, str]] = {}
    for name in sorted(files):
        if name.startswith("."):
            continue
        match = _FILE_NAME.fullmatch(name)
        if match is None:
            raise DatasetError(
                f"{source}/{name}: expected files named as deepstream-app names them, such as "
                "00_000_000012.txt; give the folder of gie-kitti-output-dir alone"
            )
        streams.setdefault(int(match[2]), {})[int(match[3])] = name
    if not streams:
        raise DatasetError(
            f"{source}: expected a text file per frame, found none; deepstream-app does not create "
            "the folder of gie-kitti-output-dir: make it before the run"
        )
    if stream is None and len(streams) > 1:
        raise DatasetError(
            f"{source}: holds the streams {sorted(streams)}: say which one these annotations are of"
        )
    chosen = min(streams) if stream is None else stream
    if chosen not in streams:
        raise DatasetError(f"{source}: has no stream {chosen}, only {sorted(streams)}")
    return streams[chosen]


def _order_images(
    images: Sequence[Mapping[str, Any]], order: Sequence[str] | None, source: str
) -> list[Mapping[str, Any]]:
    by_name = {str(image["file_name"]): image for image in images}
    if len(by_name) < len(images):
        raise DatasetError(f"{source}: the annotations name two images alike")
    if order is None:
        return [by_name[name] for name in sorted(by_name)]
    unknown = [name for name in order if name not in by_name]
    if unknown:
        raise DatasetError(
            f"{source}: the list of frames names {len(unknown)} images that the annotations do not "
            f"have, first {unknown[0]!r}"
        )
    return [by_name[name] for name in order]


def _match_frames(
    numbers: list[int],
    images: list[Mapping[str, Any]],
    frame: tuple[int, int] | None,
    source: str,
) -> list[_Frame]:
    missing = sorted(set(range(len(images))) - set(numbers))
    surplus = [number for number in numbers if number >= len(images)]
    if missing or surplus:
        parts = [
            f"{label} {_shorten(found)}"
            for label, found in (("no file for frame", missing), ("no image for frame", surplus))
            if found
        ]
        raise DatasetError(
            f"{source}: {len(numbers)} frames for {len(images)} images: {'; '.join(parts)}; the "
            "run must show each image once, in order, and drop none (drop-frame-interval=0, "
            "interval=0, sync=0)"
        )
    return [_place_frame(image, frame, source) for image in images]


def _shorten(numbers: Iterable[int]) -> str:
    listed = list(numbers)
    return ", ".join(map(str, listed[:5])) + (", ..." if len(listed) > 5 else "")


def _place_frame(image: Mapping[str, Any], frame: tuple[int, int] | None, source: str) -> _Frame:
    width, height = image.get("width"), image.get("height")
    if not isinstance(width, int) or not isinstance(height, int) or width < 1 or height < 1:
        raise DatasetError(
            f"{source}: image {image['file_name']} has width {width!r} and height {height!r} in "
            "the annotations: boxes cannot be translated into its pixels"
        )
    frame_height, frame_width = frame or (height, width)
    return _Frame(image["id"], width, height, width / frame_width, height / frame_height)


def _split_lines(content: bytes, place: str) -> list[tuple[int, str]]:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{place}: expected text: {error}") from error
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _read_line(
    line: str,
    *,
    place: str,
    target: _Frame,
    ids: Mapping[str, int | str],
    has_track_ids: bool,
) -> dict[str, object] | None:
    """One result without its image_id; None where nothing of the box lies in the image.

    Of a box in the padding nvinfer writes a right edge before its left one.
    """
    # Labels may hold blanks, numbers do not: cut from the right.
    label, *words = line.rsplit(maxsplit=_NUM_NUMBERS + has_track_ids)
    numbers = _read_numbers(words[has_track_ids:]) if len(words) > has_track_ids else None
    if label not in ids or numbers is None or len(numbers) != _NUM_NUMBERS:
        raise DatasetError(f"{place}: {_explain(line, ids, has_track_ids=has_track_ids)}")
    left, top, right, bottom = numbers[3:7]
    score = numbers[-1]
    if not 0 <= score <= 1:
        raise DatasetError(
            f"{place}: expected a score in 0..1, found {score}; nvinfer gives none with "
            "cluster-mode=0, and trackers give their own"
        )
    corners = np.array([left, top, right, bottom]) * (
        [target.scale_x, target.scale_y, target.scale_x, target.scale_y]
    )
    limits = np.array([target.width, target.height, target.width, target.height])
    x1, y1, x2, y2 = np.clip(corners, 0, limits).round(BOX_DIGITS).tolist()
    if x2 <= x1 or y2 <= y1:
        return None
    bbox = [x1, y1, round(x2 - x1, BOX_DIGITS), round(y2 - y1, BOX_DIGITS)]
    return {"category_id": ids[label], "bbox": bbox, "score": round(score, SCORE_DIGITS)}


def _read_numbers(words: Sequence[str]) -> list[float] | None:
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _explain(line: str, ids: Mapping[str, int | str], *, has_track_ids: bool) -> str:
    """What is wrong with a line that could not be read, as far as can be told."""
    expected = _EXPECTED.replace("label ", "label id ") if has_track_ids else _EXPECTED
    shown = line if len(line) <= 120 else line[:117] + "..."
    hint = f"labels are {', '.join(list(ids)[:10])}"
    words = line.split()
    if len(line) > 0 and line[0].isspace():
        hint = "it has no label: nvinfer could not read labelfile-path"
    elif " ".join(words[: len(words) - _NUM_NUMBERS + 1]) in ids:
        hint = "it has no score: this deepstream-app writes none, and AP needs it"
    elif " ".join(words[: len(words) - _NUM_NUMBERS - 1]) in ids and not has_track_ids:
        hint = "an identity seems to follow the label: is it the dump of kitti-track-output-dir?"
    elif " ".join(words[: len(words) - _NUM_NUMBERS]) in ids and has_track_ids:
        hint = "no identity follows the label: is it the dump of gie-kitti-output-dir?"
    return f"expected `{expected}`, found {shown!r}; {hint}"
