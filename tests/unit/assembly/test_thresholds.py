"""`thresholds`: chosen on one set, reported on another, written into the model."""

from __future__ import annotations

import copy
import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retinaray.artifact import read_weights
from retinaray.assembly import evaluation as evaluation_module
from retinaray.assembly import thresholds as thresholds_module
from retinaray.assembly.evaluation import run_evaluation
from retinaray.assembly.thresholds import run_thresholds
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import EvaluateJob, ThresholdsJob
from retinaray.errors import ConfigError, DatasetError
from retinaray.inference.onnx_contract import read_onnx_card

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
) -> Callable[..., ThresholdsJob]:
    for module in (thresholds_module, evaluation_module):
        monkeypatch.setattr(module, "count_cores", lambda: 1)
    shutil.copytree(image_set.folder, tmp_path / "images")
    (tmp_path / "model.pth").write_bytes(tiny_weights)

    def make(changes: dict[str, object] | None = None) -> ThresholdsJob:
        (tmp_path / "val.json").write_text(json.dumps(truth))
        tree: dict[str, object] = {
            "model": str(tmp_path / "model.pth"),
            "annotations": str(tmp_path / "val.json"),
            "images": str(tmp_path / "images"),
        }
        return load_from_dict(ThresholdsJob, tree, changes or {})

    return make


def test_run_thresholds_writes_a_model_that_evaluates_to_what_it_reports(
    make_job: Callable[..., ThresholdsJob], tmp_path: Path
) -> None:
    outcome = run_thresholds(
        make_job(
            {
                "output": str(tmp_path / "tuned.pth"),
                "table": str(tmp_path / "tables" / "sweep.csv"),
                "plots": str(tmp_path / "plots"),
            }
        )
    )
    card, _ = read_weights((tmp_path / "tuned.pth").read_bytes(), source="tuned.pth")
    best = outcome.best
    assert (card.nms_kind, card.nms_iou) == (best.nms_kind, best.nms_iou)
    assert card.max_detections == best.max_detections
    points = outcome.validation.points
    assert card.score_thresholds == tuple(point.threshold for point in points)
    # An independent path: `evaluate` with the written file finds the same points.
    tree = {
        "model": str(tmp_path / "tuned.pth"),
        "annotations": str(tmp_path / "val.json"),
        "images": str(tmp_path / "images"),
    }
    evaluated = run_evaluation(load_from_dict(EvaluateJob, tree, {}))
    for ours, theirs in zip(points, evaluated.points, strict=True):
        assert (ours.precision, ours.recall, ours.f1) == (
            theirs.precision,
            theirs.recall,
            theirs.f1,
        )
    with (tmp_path / "tables" / "sweep.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == outcome.num_settings > 300
    assert max(float(row["AP"]) for row in rows) == pytest.approx(best.AP)
    pictures = sorted((tmp_path / "plots").iterdir())
    assert [path.name for path in pictures] == ["operating_points.png", "threshold_sweep.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


@pytest.mark.parametrize("kind", ["class", "agnostic", "none"])
def test_run_thresholds_tries_one_kind_of_suppression_when_it_is_told(
    make_job: Callable[..., ThresholdsJob], tmp_path: Path, kind: str
) -> None:
    table = tmp_path / "sweep.csv"
    outcome = run_thresholds(make_job({"detection.nms_kind": kind, "table": str(table)}))
    assert outcome.best.nms_kind == kind
    with table.open() as lines:
        assert {row["nms_kind"] for row in csv.DictReader(lines)} == {kind}


def test_run_thresholds_reports_the_same_thresholds_on_a_test_set(
    make_job: Callable[..., ThresholdsJob], truth: dict[str, Any], write_json: Callable[..., str]
) -> None:
    half = copy.deepcopy(truth)
    half["images"] = half["images"][:3]
    half["annotations"] = [a for a in half["annotations"] if a["image_id"] <= 3]
    outcome = run_thresholds(
        make_job({"rule": "recall=0.3", "test_annotations": write_json("test.json", half)})
    )
    assert outcome.test is not None
    assert (outcome.test.num_images, outcome.validation.num_images) == (3, 6)
    pairs = list(zip(outcome.validation.points, outcome.test.points, strict=True))
    assert all(chosen.threshold == tested.threshold for chosen, tested in pairs)
    assert pairs[2][1].precision is None
    values = json.loads(outcome.to_json())
    assert set(values["classes"]) == set(values["test"]["classes"]) == {f"class {k}" for k in "012"}
    assert values["classes"]["class 0"]["recall"] >= 0.3
    assert values["output"] is None
    text = outcome.to_text()
    assert "validation: 6 images" in text
    assert "test: 3 images" in text
    assert "no ground truth" in text


def test_run_thresholds_rewrites_an_exported_file(
    make_job: Callable[..., ThresholdsJob], tmp_path: Path, tiny_onnx: bytes
) -> None:
    (tmp_path / "model.onnx").write_bytes(tiny_onnx)
    outcome = run_thresholds(
        make_job(
            {
                "model": str(tmp_path / "model.onnx"),
                "backend": "onnxruntime",
                "output": str(tmp_path / "tuned.onnx"),
            }
        )
    )
    card, _ = read_onnx_card((tmp_path / "tuned.onnx").read_bytes(), uri="tuned.onnx")
    assert card.score_thresholds == tuple(p.threshold for p in outcome.validation.points)
    assert card.nms_iou == outcome.best.nms_iou


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "tuned.onnx"}, r"output=tuned\.onnx is another kind of file"),
        ({"test_images": "x"}, "test_images=x is of no use"),
        ({"detection.nms_iou": 0.5}, r"detection\.nms_iou: this is what `thresholds` searches"),
    ],
)
def test_run_thresholds_refuses_settings_that_make_no_sense(
    make_job: Callable[..., ThresholdsJob], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_thresholds(make_job(changes))


def test_run_thresholds_refuses_annotations_without_boxes(
    make_job: Callable[..., ThresholdsJob], truth: dict[str, Any]
) -> None:
    truth["annotations"] = []
    with pytest.raises(DatasetError, match=r"val\.json: has no boxes to choose thresholds by"):
        run_thresholds(make_job())


def test_run_thresholds_refuses_annotations_of_other_classes(
    make_job: Callable[..., ThresholdsJob], truth: dict[str, Any]
) -> None:
    truth["categories"].pop()
    with pytest.raises(DatasetError, match=r"the model has the categories \[7, 17, 27\]"):
        run_thresholds(make_job())


def test_run_thresholds_counts_images_that_cannot_be_read(
    make_job: Callable[..., ThresholdsJob], tmp_path: Path
) -> None:
    job = make_job()
    (tmp_path / "images" / "2.png").write_bytes(b"broken")
    outcome = run_thresholds(job)
    assert outcome.validation.num_errors == 1
    assert "1 UNREADABLE" in outcome.to_text()
    for path in (tmp_path / "images").glob("*.png"):
        path.unlink()
    with pytest.raises(DatasetError, match="none of 6 images could be read"):
        run_thresholds(job)
