"""deepstream-app's text files become COCO results, or say which line cannot."""

from __future__ import annotations

from typing import Any

import pytest

from retinaray.data.coco import Category, CategoryTable
from retinaray.errors import DatasetError
from retinaray.evaluation.coco_map import evaluate_detections
from retinaray.evaluation.kitti_dump import read_kitti_dump

TABLE = CategoryTable((Category(7, "cell"), Category("w", "white cell"), Category(3, "cell 0")))
IMAGES = [
    {"id": 10, "file_name": "b.jpg", "width": 200, "height": 100},
    {"id": "x", "file_name": "a.jpg", "width": 400, "height": 300},
]
ZEROS = "0.0 0.0 0.0 0.0 0.0 0.0 0.0"


def line(label: str, box: str, score: str = "0.500000", *, identity: str = "") -> str:
    """As write_kitti_output and write_kitti_track_output print it."""
    return f"{label} {identity}0.0 0 0.0 {box} {ZEROS} {score}\n"


def frames(*texts: str) -> dict[str, bytes]:
    return {f"00_000_{number:06d}.txt": text.encode() for number, text in enumerate(texts)}


def read(files: dict[str, bytes], **options: Any) -> list[dict[str, object]]:
    return read_kitti_dump(files, TABLE, IMAGES, **options)


def test_read_kitti_dump_reads_boxes_of_frames_in_the_order_of_names() -> None:
    # a.jpg is frame 0, though it comes second in the annotations.
    files = frames(
        line("cell", "10.5 20.0 30.5 60.0", "0.25") + line("white cell", "1 2 3 4", "0.75"),
        line("cell 0", "0.000000 0.000000 200.000000 100.000000", "1.000000"),
    )
    assert read(files) == [
        {"image_id": "x", "category_id": "w", "bbox": [1.0, 2.0, 2.0, 2.0], "score": 0.75},
        {"image_id": "x", "category_id": 7, "bbox": [10.5, 20.0, 20.0, 40.0], "score": 0.25},
        {"image_id": 10, "category_id": 3, "bbox": [0.0, 0.0, 200.0, 100.0], "score": 1.0},
    ]


def test_read_kitti_dump_follows_a_list_of_frames() -> None:
    files = frames(line("cell", "1 2 3 4"), "")
    (found,) = read(files, order=["b.jpg", "a.jpg"])
    assert found["image_id"] == 10
    (found,) = read({"00_000_000000.txt": line("cell", "1 2 3 4").encode()}, order=["b.jpg"])
    assert found["image_id"] == 10


def test_read_kitti_dump_scales_from_the_muxers_frames() -> None:
    # The muxer stretched 400x300 and 200x100 to 800x400 (width x height).
    files = frames(line("cell", "80 40 160 200"), line("cell", "80 40 160 200"))
    first, second = read(files, frame=(400, 800))
    assert first["bbox"] == [40.0, 30.0, 40.0, 120.0]
    assert second["bbox"] == [20.0, 10.0, 20.0, 40.0]


def test_read_kitti_dump_cuts_boxes_to_the_image() -> None:
    outside = line("cell", "410 10 400 20") + line("cell", "500 10 600 20")
    files = frames(line("cell", "-5 290 50 300.02") + outside, "\n")
    (found,) = read(files)
    assert found["bbox"] == [0.0, 290.0, 50.0, 10.0]


def test_read_kitti_dump_rounds_as_results_are_rounded() -> None:
    # Corners first, so that no box leaves its image by its rounding.
    (found,) = read(frames(line("cell", "0.004 0.006 99.996 50.123456", "0.1234567"), ""))
    assert found["bbox"] == [0.0, 0.01, 100.0, 50.11]
    assert found["score"] == 0.123457


def test_read_kitti_dump_reads_track_identities() -> None:
    files = frames(line("cell", "1 2 3 4", identity="18446744073709551615 "), "")
    (found,) = read(files, has_track_ids=True)
    assert (found["category_id"], found["bbox"]) == (7, [1.0, 2.0, 2.0, 2.0])
    # Only the caller can know: `cell 0` may be a label, or a label and an identity.
    ambiguous = frames(line("cell 0", "1 2 3 4"), "")
    assert read(ambiguous)[0]["category_id"] == 3
    assert read(ambiguous, has_track_ids=True)[0]["category_id"] == 7


def test_read_kitti_dump_takes_one_stream() -> None:
    files = {f"00_{stream:03d}_{n:06d}.txt": b"" for stream in (0, 4) for n in range(2)}
    files["00_004_000001.txt"] = line("cell", "1 2 3 4").encode()
    with pytest.raises(DatasetError, match=r"holds the streams \[0, 4\]: say which one"):
        read(files)
    assert read(files, stream=0) == []
    assert len(read(files, stream=4)) == 1
    with pytest.raises(DatasetError, match=r"has no stream 1, only \[0, 4\]"):
        read(files, stream=1)


def test_read_kitti_dump_passes_over_hidden_files() -> None:
    assert read({".keep": b"", **frames("", "")}) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cell 1 2 3\n", "expected `label truncated occluded alpha left"),
        (line("Cell", "1 2 3 4"), "labels are cell, white cell, cell 0"),
        (line("cell", "1 2 3 x"), "found 'cell 0.0 0 0.0 1 2 3 x"),
        (line("cell", "1 2 nan 4"), "found 'cell 0.0 0 0.0 1 2 nan 4"),
        (line("cell", "1 2 inf 4"), "expected `label"),
        (line("", "1 2 3 4"), "it has no label: nvinfer could not read labelfile-path"),
        (line("cell", "1 2 3 4", ""), "it has no score: this deepstream-app writes none"),
        (line("cell", "1 2 3 4", identity="17 "), "is it the dump of kitti-track-output-dir"),
        (line("cell", "1 2 3 4", "-0.1"), "expected a score in 0..1, found -0.1"),
        (line("cell", "1 2 3 4", "1.5"), "expected a score in 0..1, found 1.5"),
    ],
)
def test_read_kitti_dump_names_file_and_line_of_what_it_cannot_read(
    text: str, message: str
) -> None:
    files = frames("", line("cell", "1 2 3 4") + text)
    with pytest.raises(DatasetError) as raised:
        read(files, source="out/kitti")
    assert str(raised.value).startswith("out/kitti/00_000_000001.txt, line 2: ")
    assert message in str(raised.value)


def test_read_kitti_dump_sees_a_dump_without_identities() -> None:
    with pytest.raises(DatasetError, match="no identity follows the label"):
        read(frames(line("white cell", "1 2 3 4"), ""), has_track_ids=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "expected a text file per frame, found none; deepstream-app does not create"),
        (frames("", "", "", ""), "4 frames for 2 images: no image for frame 2, 3; the run must"),
        (frames(""), "1 frames for 2 images: no file for frame 1"),
        ({"00_000_000001.txt": b"", "00_000_000002.txt": b""}, "for frame 0; no image for frame 2"),
        ({"000001.txt": b""}, "kitti/000001.txt: expected files named as deepstream-app names"),
        ({"a.jpg": b""}, "kitti/a.jpg: expected files named"),
        ({**frames(""), "00_000_000001.txt": b"\xff"}, "00_000_000001.txt: expected text"),
    ],
)
def test_read_kitti_dump_refuses_frames_that_do_not_match_the_images(
    files: dict[str, bytes], message: str
) -> None:
    with pytest.raises(DatasetError) as raised:
        read(files)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("images", "order", "message"),
    [
        (IMAGES, ["a.jpg", "c.jpg"], "names 1 images that the annotations do not have"),
        ([IMAGES[0], IMAGES[0]], None, "name two images alike"),
        ([{"id": 1, "file_name": "a"}], None, "image a has width None and height None"),
        ([{"id": 1, "file_name": "a", "width": 0, "height": 3}], None, "has width 0 and height 3"),
    ],
)
def test_read_kitti_dump_refuses_annotations_that_do_not_tell_enough(
    images: list[dict[str, Any]], order: list[str] | None, message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        read_kitti_dump(frames(""), TABLE, images, order=order)


def test_read_kitti_dump_gives_what_can_be_scored() -> None:
    truth = {
        "images": IMAGES,
        "categories": [{"id": category.id} for category in TABLE.categories],
        "annotations": [{"image_id": "x", "category_id": 7, "bbox": [10, 20, 30, 40]}],
    }
    found = read(frames(line("cell", "10 20 40 60", "0.9"), line("cell", "1 1 9 9", "0.1")))
    assert evaluate_detections(truth, found).summary["AP"] == pytest.approx(1.0)
