"""What `infer` writes, opened by pycocotools and by `convert`."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retinaray.inference.output_formats import write_coco_dataset, write_coco_results

Document = dict[str, list[dict[str, Any]]]


@pytest.fixture
def rows(street: Document) -> list[dict[str, Any]]:
    """A run over `street` that found every box, rows as parts hold them."""
    return [
        {
            "image_id": image["id"],
            "uri": f"s3://photos/{image['file_name']}",
            "height": image["height"],
            "width": image["width"],
            "detections": [
                {"category_id": a["category_id"], "bbox": a["bbox"], "score": 0.5 + a["id"] / 100}
                for a in street["annotations"]
                if a["image_id"] == image["id"]
            ],
        }
        for image in street["images"]
    ]


def write_dataset(path: Path, rows: list[dict[str, Any]], street: Document) -> Path:
    with path.open("wb") as out:
        write_coco_dataset(
            out,
            lambda: rows,
            categories=street["categories"],
            images_root="s3://photos",
        )
    return path


def test_coco_results_score_full_marks_in_pycocotools(
    rows: list[dict[str, Any]], street_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "detections.json"
    with path.open("wb") as out:
        write_coco_results(out, io.BytesIO(), lambda: json.loads(json.dumps(rows)))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(street_file))
        judge = COCOeval(truth, truth.loadRes(str(path)), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    # Every box is found where it is: AP over all thresholds is 1.
    assert judge.stats[0] == pytest.approx(1.0)


def test_coco_dataset_opens_in_pycocotools_and_converts_with_its_scores(
    rows: list[dict[str, Any]], street: Document, tmp_path: Path, convert: Callable[..., Any]
) -> None:
    path = write_dataset(tmp_path / "found.json", rows, street)
    with contextlib.redirect_stdout(io.StringIO()):
        opened = COCO(str(path))
    assert sorted(opened.getImgIds()) == [7, 42, 99]
    assert len(opened.getAnnIds()) == 4
    convert(path, tmp_path / "review", "--to", "label-studio")
    tasks = json.loads((tmp_path / "review/tasks.json").read_text())
    scores = [r["score"] for t in tasks for p in t.get("predictions", []) for r in p["result"]]
    assert scores == [0.51, 0.52, 0.53, 0.54]
    assert tasks[1]["data"]["file_name"] == "sub/b.png"


def test_detections_come_back_from_kitti_and_open_images_with_their_scores(
    rows: list[dict[str, Any]], street: Document, tmp_path: Path, convert: Callable[..., Any]
) -> None:
    path = write_dataset(tmp_path / "found.json", rows, street)
    for name in ("kitti", "open-images", "voc", "labelme"):
        out = convert(path, tmp_path / name, "--to", name)
        assert "scores are not held" not in out.losses
        convert(tmp_path / name, tmp_path / f"{name}.json", "--from", name, "--reference", path)
        back = json.loads((tmp_path / f"{name}.json").read_text())
        assert [a["score"] for a in back["annotations"]] == [0.51, 0.52, 0.53, 0.54]
