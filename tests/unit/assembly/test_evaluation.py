"""`evaluate`: a model or a detections file against ground truth."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retinaray.artifact import dump_weights
from retinaray.assembly import evaluation as evaluation_module
from retinaray.assembly.evaluation import run_evaluation
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import EvaluateJob
from retinaray.errors import DatasetError
from retinaray.evaluation.coco_map import TWELVE, evaluate_detections

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def truth(image_set: Any) -> dict[str, Any]:
    """`image_set` with the third class of the tiny model."""
    content: dict[str, Any] = copy.deepcopy(image_set.coco)
    content["categories"].append({"id": 27, "name": "class 2"})
    return content


@pytest.fixture
def make_job(
    tmp_path: Path,
    tiny_weights: bytes,
    image_set: Any,
    truth: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., EvaluateJob]:
    monkeypatch.setattr(evaluation_module, "count_cores", lambda: 1)
    shutil.copytree(image_set.folder, tmp_path / "images")

    def make(changes: dict[str, object] | None = None) -> EvaluateJob:
        (tmp_path / "model.pth").write_bytes(tiny_weights)
        (tmp_path / "truth.json").write_text(json.dumps(truth))
        tree: dict[str, object] = {
            "model": str(tmp_path / "model.pth"),
            "annotations": str(tmp_path / "truth.json"),
            "images": str(tmp_path / "images"),
        }
        return load_from_dict(EvaluateJob, tree, changes or {})

    return make


def perfect(truth: dict[str, Any]) -> list[dict[str, Any]]:
    keys = ("image_id", "category_id", "bbox")
    return [{**{k: a[k] for k in keys}, "score": 0.9} for a in truth["annotations"]]


def test_run_evaluation_scores_what_it_writes(
    make_job: Callable[..., EvaluateJob], truth: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "found" / "detections.json"
    outcome = run_evaluation(make_job({"output": str(output)}))
    detections = json.loads(output.read_text())
    assert outcome.backend == "torch"
    assert outcome.scores == evaluate_detections(truth, detections)
    assert outcome.scores.num_images == 6
    assert outcome.scores.num_detections == len(detections) > 20
    assert {found["category_id"] for found in detections} <= {7, 17, 27}
    assert outcome.num_errors == 0
    again = run_evaluation(make_job({"model": str(output)}))
    assert again.scores == outcome.scores
    assert (again.backend, again.images_per_s) == ("", 0.0)


def test_run_evaluation_gives_one_line_and_a_table(
    make_job: Callable[..., EvaluateJob], truth: dict[str, Any], write_json: Callable[..., str]
) -> None:
    outcome = run_evaluation(make_job({"model": write_json("found.json", perfect(truth))}))
    values = json.loads(outcome.to_json())
    assert values["AP"] == pytest.approx(1.0)
    assert set(TWELVE) <= set(values)
    assert [row["AP"] for row in values["classes"]] == [
        pytest.approx(1.0),
        pytest.approx(1.0),
        None,
    ]
    text = outcome.to_text()
    assert text.startswith("6 images, 12 detections\nAP 1.000")
    assert text.endswith("absent from the ground truth")


def write_dump(folder: Path, truth: dict[str, Any]) -> None:
    """The ground truth as a device would dump it, frame by frame in the order of file names."""
    folder.mkdir()
    names = {entry["id"]: entry["name"] for entry in truth["categories"]}
    images = sorted(truth["images"], key=lambda image: image["file_name"])
    for number, image in enumerate(images):
        lines = []
        for entry in truth["annotations"]:
            if entry["image_id"] == image["id"]:
                left, top, width, height = entry["bbox"]
                label = names[entry["category_id"]]
                sides = f"{left} {top} {left + width} {top + height}"
                lines.append(f"{label} 0.0 0 0.0 {sides} 0 0 0 0 0 0 0 0.9")
        (folder / f"00_000_{number:06}.txt").write_text("\n".join(lines), encoding="utf-8")


def test_run_evaluation_scores_the_dump_of_a_device(
    make_job: Callable[..., EvaluateJob], truth: dict[str, Any], tmp_path: Path
) -> None:
    write_dump(tmp_path / "dump", truth)
    output = tmp_path / "found.json"
    changes = {"model": None, "kitti.dump": str(tmp_path / "dump"), "output": str(output)}
    outcome = run_evaluation(make_job(changes))
    assert outcome.scores.to_dict()["AP"] == pytest.approx(1.0)
    assert len(json.loads(output.read_text())) == len(truth["annotations"])
    # The device saw them the other way round: nothing fits any more, until it is said.
    order = [image["file_name"] for image in truth["images"]]
    names = sorted(order)[::-1]
    (tmp_path / "order.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    turned = run_evaluation(make_job({**changes, "kitti.order": str(tmp_path / "order.txt")}))
    assert turned.scores.to_dict()["AP"] < 0.9


def test_run_evaluation_says_so_when_there_is_no_dump(
    make_job: Callable[..., EvaluateJob], tmp_path: Path
) -> None:
    (tmp_path / "dump").mkdir()
    with pytest.raises(DatasetError, match=r"expected the \.txt files of a KITTI dump"):
        run_evaluation(make_job({"model": None, "kitti.dump": str(tmp_path / "dump")}))


def test_run_evaluation_counts_unreadable_images_as_images_without_detections(
    make_job: Callable[..., EvaluateJob], tmp_path: Path
) -> None:
    job = make_job()
    (tmp_path / "images" / "2.png").write_bytes(b"broken")
    (tmp_path / "images" / "5.png").unlink()
    outcome = run_evaluation(job)
    assert outcome.num_errors == 2
    assert outcome.scores.num_images == 6
    assert "2 UNREADABLE" in outcome.to_text()


def test_run_evaluation_refuses_a_folder_of_which_no_image_can_be_read(
    make_job: Callable[..., EvaluateJob], tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match=r"none of 6 images could be read, .*check --images"):
        run_evaluation(make_job({"images": str(tmp_path / "elsewhere")}))


def test_run_evaluation_refuses_a_model_of_other_classes(
    make_job: Callable[..., EvaluateJob], truth: dict[str, Any]
) -> None:
    truth["categories"].pop()
    with pytest.raises(DatasetError, match=r"detections against .*truth.json: .*category_id=27"):
        run_evaluation(make_job())


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"annotations": []}, "expected a COCO results list, found dict"),
        ([{"image_id": 99, "category_id": 7, "bbox": [0, 0, 1, 1], "score": 1}], "image_id=99"),
        ([{"image_id": 1, "category_id": 7, "bbox": [0, 0, 1, 1]}], "detection 1: lacks score"),
        (
            [
                {"image_id": 1, "category_id": 7, "bbox": [0, 0, 1, 1], "score": 1},
                {"image_id": 1, "category_id": 7, "bbox": [0, 0], "score": 1},
            ],
            r"found.json: detection 2: bbox: expected four finite numbers, found \[0, 0\]",
        ),
        (
            [{"image_id": 1, "category_id": 7, "bbox": [0, 0, "a", 1], "score": 1}],
            "detection 1: bbox: expected four finite numbers",
        ),
        (
            [{"image_id": None, "category_id": 7, "bbox": [0, 0, 1, 1], "score": 1}],
            "detection 1: image_id: expected a whole number or a text, found None",
        ),
        (
            [{"image_id": 1, "category_id": 7, "bbox": [0, 0, 1, 1], "score": "1"}],
            "detection 1: score: expected a finite number, found '1'",
        ),
        (
            [{"image_id": 1, "category_id": 7, "bbox": [0, 0, 1, 10**400], "score": 1}],
            "detection 1: bbox: expected four finite numbers",
        ),
        (["text"], "detection 1: expected an object, found 'text'"),
    ],
)
def test_run_evaluation_refuses_detections_that_are_none(
    make_job: Callable[..., EvaluateJob], write_json: Callable[..., str], content: Any, text: str
) -> None:
    with pytest.raises(DatasetError, match=text):
        run_evaluation(make_job({"model": write_json("found.json", content)}))


def test_run_evaluation_keeps_the_ap_of_a_model_whose_card_holds_operating_points(
    make_job: Callable[..., EvaluateJob], tmp_path: Path, tiny_card: Any, tiny_model: Any
) -> None:
    job = make_job()
    scored = {}
    for name, thresholds in (("low", (0.05, 0.05, 0.02)), ("high", (0.6, 0.5, 0.02))):
        card = replace(tiny_card, score_thresholds=thresholds)
        (tmp_path / "model.pth").write_bytes(dump_weights(card, tiny_model.state_dict()))
        scored[name] = run_evaluation(job)
    # Its class 2 is at 0.02, below the default: AP goes down to there, too.
    assert scored["high"].scores == scored["low"].scores
    assert scored["low"].points == ()
    assert "operating points" not in scored["low"].to_text()
    points = scored["high"].points
    assert [(point.name, point.threshold) for point in points] == [
        ("class 0", 0.6),
        ("class 1", 0.5),
        ("class 2", 0.02),
    ]
    assert "operating points: the thresholds stored in the model" in scored["high"].to_text()
    block = json.loads(scored["high"].to_json())["operating_points"]
    assert block["class 0"]["threshold"] == 0.6
    assert block["class 2"]["precision"] is None


def test_run_evaluation_counts_operating_points_in_what_inference_gives(
    make_job: Callable[..., EvaluateJob], truth: dict[str, Any], tmp_path: Path
) -> None:
    # The tiny card's own thresholds are 0.3, its classes 0 and 1 have ground truth.
    outcome = run_evaluation(make_job())
    output = tmp_path / "at_0.3.json"
    at_card = run_evaluation(make_job({"output": str(output), "detection.score_threshold": 0.3}))
    assert at_card.points == ()
    assert at_card.scores.num_detections < outcome.scores.num_detections
    detections = json.loads(output.read_text())
    for point, category in zip(outcome.points[:2], (7, 17), strict=True):
        found = [item for item in detections if item["category_id"] == category]
        boxes = sum(item["category_id"] == category for item in truth["annotations"])
        assert point.num_ground_truth == boxes == 6
        assert point.precision is not None
        assert point.recall is not None
        hits = point.recall * boxes
        assert point.precision * len(found) == pytest.approx(hits)
        assert point.false_positives_per_image == pytest.approx((len(found) - hits) / 6)


def test_run_evaluation_refuses_broken_annotations(
    make_job: Callable[..., EvaluateJob], truth: dict[str, Any]
) -> None:
    truth["annotations"][0]["image_id"] = 77
    with pytest.raises(DatasetError, match=r"truth\.json: .*77"):
        run_evaluation(make_job())
