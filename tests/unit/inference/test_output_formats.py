"""Merged formats against hand-written files and pycocotools; names of outputs."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable
from typing import Any

import pytest
from pycocotools.coco import COCO

from retinaray.data.coco import load_coco
from retinaray.errors import ConfigError
from retinaray.inference.output_formats import (
    OutputFormat,
    OutputName,
    read_output_name,
    write_coco_dataset,
    write_coco_results,
    write_json_lines,
    write_odtk,
)

CATEGORIES = [{"id": 7, "name": "car"}, {"id": 17, "name": "bus"}]
ROWS: list[dict[str, Any]] = [
    {
        "image_id": 1,
        "uri": "s3://b/photos/s/é#1.jpg",
        "height": 20,
        "width": 30,
        "columns": {"camera": "left"},
        "detections": [
            {"category_id": 7, "bbox": [1.5, 2.0, 10.25, 4.01], "score": 0.75},
            {"category_id": 17, "bbox": [0.0, 0.0, 30.0, 20.0], "score": 0.5},
        ],
    },
    {"image_id": 2, "uri": "s3://b/photos/empty.jpg", "height": 5, "width": 6, "detections": []},
    {
        "image_id": 3,
        "uri": "s3://other/x.jpg",
        "height": 7,
        "width": 8,
        "detections": [{"category_id": 7, "bbox": [1.0, 1.0, 2.0, 3.0], "score": 0.25}],
    },
]


def copy_rows() -> Iterable[dict[str, Any]]:
    return iter(json.loads(json.dumps(ROWS)))


def no_rows() -> Iterable[dict[str, Any]]:
    return iter(())


def dataset(rows: Any = copy_rows) -> dict[str, Any]:
    out = io.BytesIO()
    write_coco_dataset(out, rows, categories=CATEGORIES, images_root="s3://b/photos")
    return dict(json.loads(out.getvalue()))


def test_write_coco_results_gives_a_flat_list_and_the_images() -> None:
    detections, images = io.BytesIO(), io.BytesIO()
    write_coco_results(detections, images, copy_rows)
    assert detections.getvalue() == (
        b'[\n{"image_id": 1, "category_id": 7, "bbox": [1.5, 2.0, 10.25, 4.01], "score": 0.75}, '
        b'{"image_id": 1, "category_id": 17, "bbox": [0.0, 0.0, 30.0, 20.0], "score": 0.5},\n'
        b'{"image_id": 3, "category_id": 7, "bbox": [1.0, 1.0, 2.0, 3.0], "score": 0.25}\n]\n'
    )
    wanted = [{key: row[key] for key in row if key != "detections"} for row in ROWS]
    assert json.loads(images.getvalue()) == wanted


def test_write_coco_dataset_gives_annotations_with_ids_areas_and_scores() -> None:
    content = dataset()
    assert list(content) == ["info", "licenses", "categories", "images", "annotations"]
    assert content["categories"] == CATEGORIES
    assert content["images"][0] == {
        "id": 1,
        "file_name": "s/é#1.jpg",
        "height": 20,
        "width": 30,
        "coco_url": "s3://b/photos/s/é#1.jpg",
        "columns": {"camera": "left"},
    }
    # What does not lie below the root keeps its whole URI.
    assert [image["file_name"] for image in content["images"][1:]] == [
        "empty.jpg",
        "s3://other/x.jpg",
    ]
    assert content["annotations"] == [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 7,
            "bbox": [1.5, 2.0, 10.25, 4.01],
            "area": 41.1025,  # 10.25 * 4.01
            "score": 0.75,
            "iscrowd": 0,
            "segmentation": [],
        },
        {
            "id": 2,
            "image_id": 1,
            "category_id": 17,
            "bbox": [0.0, 0.0, 30.0, 20.0],
            "area": 600.0,
            "score": 0.5,
            "iscrowd": 0,
            "segmentation": [],
        },
        {
            "id": 3,
            "image_id": 3,
            "category_id": 7,
            "bbox": [1.0, 1.0, 2.0, 3.0],
            "area": 6.0,
            "score": 0.25,
            "iscrowd": 0,
            "segmentation": [],
        },
    ]


def test_a_coco_dataset_is_one_for_pycocotools_and_for_our_reader(tmp_path: Any) -> None:
    content = dataset(lambda: iter(ROWS[:2]))
    path = tmp_path / "set.json"
    path.write_text(json.dumps(content))
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCO(str(path))
    assert judge.getAnnIds(imgIds=[1], catIds=[17]) == [2]
    assert judge.getAnnIds(imgIds=[2]) == []
    own = load_coco(path.read_bytes(), source="set.json")
    assert own.categories.names == ("car", "bus")
    assert [image.file_name for image in own.images] == ["s/é#1.jpg", "empty.jpg"]


def test_write_odtk_wraps_results_images_and_categories() -> None:
    out = io.BytesIO()
    write_odtk(out, copy_rows, categories=CATEGORIES, images_root="s3://b/photos")
    content = json.loads(out.getvalue())
    assert list(content) == ["annotations", "images", "categories"]
    assert content["annotations"] == [
        {"image_id": 1, "score": 0.75, "category_id": 7, "bbox": [1.5, 2.0, 10.25, 4.01]},
        {"image_id": 1, "score": 0.5, "category_id": 17, "bbox": [0.0, 0.0, 30.0, 20.0]},
        {"image_id": 3, "score": 0.25, "category_id": 7, "bbox": [1.0, 1.0, 2.0, 3.0]},
    ]
    assert content["images"] == dataset()["images"]
    assert content["categories"] == CATEGORIES


def test_write_json_lines_gives_one_line_per_image() -> None:
    out = io.BytesIO()
    write_json_lines(out, copy_rows)
    assert [json.loads(line) for line in out.getvalue().splitlines()] == ROWS


def test_formats_are_valid_when_there_is_no_image() -> None:
    detections, images, wrapper = io.BytesIO(), io.BytesIO(), io.BytesIO()
    write_coco_results(detections, images, no_rows)
    write_odtk(wrapper, no_rows, categories=CATEGORIES, images_root="x")
    assert json.loads(detections.getvalue()) == json.loads(images.getvalue()) == []
    wanted = {"annotations": [], "images": [], "categories": CATEGORIES}
    assert json.loads(wrapper.getvalue()) == wanted
    assert dataset(no_rows)["annotations"] == []


@pytest.mark.parametrize(
    ("output", "output_format", "wanted"),
    [
        ("d.json", "coco-results", OutputName("d_run", "d.json", "none")),
        ("s3://b/d.json.gz", "odtk", OutputName("s3://b/d_run", "s3://b/d.json.gz", "gzip")),
        ("/x/d.json.zst", "coco-dataset", OutputName("/x/d_run", "/x/d.json.zst", "zstd")),
        ("a.b.jsonl.gz", "jsonl", OutputName("a.b_run", "a.b.jsonl.gz", "gzip")),
        ("s3://b/run", "coco-results", OutputName("s3://b/run", None, "none")),
        ("s3://b/run.d", "parquet", OutputName("s3://b/run.d", None, "none")),
        ("runs/json", "jsonl", OutputName("runs/json", None, "none")),
    ],
)
def test_read_output_name_tells_files_from_folders(
    output: str, output_format: OutputFormat, wanted: OutputName
) -> None:
    assert read_output_name(output, output_format) == wanted


@pytest.mark.parametrize(
    ("output", "output_format", "text"),
    [
        (
            "d.jsonl",
            "coco-results",
            r"output=d\.jsonl: format coco-results writes NAME\.json, NAME",
        ),
        (
            "d.json",
            "jsonl",
            r"format jsonl writes NAME\.jsonl, NAME\.jsonl\.gz or NAME\.jsonl\.zst",
        ),
        ("d.gz", "coco-results", r"output=d\.gz: format coco-results writes"),
        (".json", "coco-results", r"output=\.json: format"),
        ("d.parquet", "coco-results", r"output=d\.parquet: format coco-results writes"),
        ("d.parquet", "parquet", "format parquet writes a file per part; give the folder"),
        ("d.json", "parquet", "format parquet writes a file per part"),
    ],
)
def test_read_output_name_refuses_a_name_that_does_not_fit(
    output: str, output_format: OutputFormat, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        read_output_name(output, output_format)
