"""What a report reads of the JSON that `evaluate` and `parity` write: settings, command, boxes."""

from __future__ import annotations

import copy
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from retinaray.assembly.evaluation import run_evaluation
from retinaray.assembly.parity import run_parity
from retinaray.assembly.report_reading import open_run
from retinaray.config.loading import load_from_argv, load_from_dict
from retinaray.config.parity_schema import ParityJob
from retinaray.config.report_schema import ReportJob
from retinaray.config.schema import EvaluateJob
from retinaray.storage import Storage

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def evaluated(tmp_path: Path, tiny_weights: bytes, image_set: Any) -> EvaluateJob:
    """An evaluation of the tiny model that keeps its detections."""
    truth = copy.deepcopy(image_set.coco)
    truth["categories"].append({"id": 27, "name": "class 2"})
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "model.pth").write_bytes(tiny_weights)
    tree = {
        "model": str(tmp_path / "model.pth"),
        "annotations": str(tmp_path / "truth.json"),
        "images": str(image_set.folder),
        "output": str(tmp_path / "found.json"),
        "batch": 2,
    }
    return load_from_dict(EvaluateJob, tree)


def read_command(command: str) -> list[str]:
    """The words of a command line over several lines, without `retinaray` and the verb."""
    return shlex.split(command.replace("\\\n", " "))[2:]


def test_open_run_finds_all_that_an_evaluation_was_made_of(
    evaluated: EvaluateJob, tmp_path: Path
) -> None:
    (tmp_path / "scores.json").write_text(run_evaluation(evaluated).to_json())
    job = load_from_dict(ReportJob, {"runs": [str(tmp_path / "scores.json")]})
    opened = open_run(job.runs[0], job, Storage())
    assert load_from_argv(EvaluateJob, read_command(opened.run.command)) == evaluated
    assert opened.run.settings["batch"] == 2
    assert "torch" in opened.run.versions
    assert opened.run.gaps == ()
    source = opened.detections
    assert source is not None
    assert source.results == json.loads((tmp_path / "found.json").read_text())
    assert source.images_root == evaluated.images
    # Those of the model's card.
    assert set((source.thresholds or {}).values()) == {0.3}


@pytest.mark.parametrize("missing", ["found.json", "truth.json"])
def test_open_run_says_what_an_evaluation_lacks(
    evaluated: EvaluateJob, tmp_path: Path, missing: str
) -> None:
    (tmp_path / "scores.json").write_text(run_evaluation(evaluated).to_json())
    (tmp_path / missing).unlink()
    job = load_from_dict(ReportJob, {"runs": [str(tmp_path / "scores.json")]})
    opened = open_run(job.runs[0], job, Storage())
    assert opened.detections is None
    (gap,) = opened.run.gaps
    assert "evaluate --output" in gap
    assert opened.run.command


def test_open_run_chooses_thresholds_anew_for_detections_that_were_scored_as_they_are(
    evaluated: EvaluateJob, tmp_path: Path
) -> None:
    run_evaluation(evaluated)
    again = evaluated.model_copy(update={"model": evaluated.output, "output": None})
    (tmp_path / "scores.json").write_text(run_evaluation(again).to_json())
    job = load_from_dict(ReportJob, {"runs": [str(tmp_path / "scores.json")]})
    source = open_run(job.runs[0], job, Storage()).detections
    assert source is not None
    assert source.results == json.loads((tmp_path / "found.json").read_text())
    assert not source.thresholds


def test_open_run_says_how_a_parity_check_is_made_again(
    tmp_path: Path, tiny_weights: bytes, tiny_onnx: bytes, image_set: Any
) -> None:
    (tmp_path / "model.pth").write_bytes(tiny_weights)
    (tmp_path / "model.onnx").write_bytes(tiny_onnx)
    tree = {
        "model": str(tmp_path / "model.pth"),
        "files": [str(tmp_path / "model.onnx")],
        "images": str(image_set.folder),
        "backend": "onnxruntime",
        "threads": 1,
        "limit": 1,
        "output": str(tmp_path / "parity.json"),
    }
    checked = load_from_dict(ParityJob, tree)
    run_parity(checked)
    job = load_from_dict(ReportJob, {"runs": [str(tmp_path / "parity.json")]})
    run = open_run(job.runs[0], job, Storage()).run
    assert load_from_argv(ParityJob, read_command(run.command)) == checked
    assert "torch" in run.versions
    assert run.gaps == ()
