"""Settings of reading, what a run records of its origin, and the doctor's outcome."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from retinaray.assembly import provenance
from retinaray.assembly.doctor import run_doctor
from retinaray.assembly.provenance import collect_versions, make_run_id
from retinaray.assembly.reading import (
    absolute_uri,
    make_predictor_settings,
    make_read_settings,
    make_reader,
    read_json,
)
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import DetectionConfig, DoctorJob, ReadingConfig
from retinaray.errors import DatasetError, StorageError
from retinaray.inference.pipeline import ReadSettings
from retinaray.inference.predictor import PredictorSettings


@pytest.mark.parametrize(
    ("changes", "canvas"),
    [
        ({}, None),
        ({"size": (64, 96)}, (64, 96)),
        ({"resize": 640, "max_size": 1280}, (640, 1280)),
    ],
)
def test_make_predictor_settings_takes_everything_over(
    changes: dict[str, Any], canvas: tuple[int, int] | None
) -> None:
    detection = DetectionConfig(
        score_threshold=0.0, nms_iou=0.6, nms_kind="agnostic", max_detections=7, **changes
    )
    assert make_predictor_settings(detection, batch=3, threads=2) == PredictorSettings(
        batch=3,
        threads=2,
        canvas=canvas,
        score_threshold=0.0,
        nms_iou=0.6,
        max_detections=7,
        nms_kind="agnostic",
    )


def test_make_read_settings_takes_everything_over() -> None:
    reading = ReadingConfig(threads=3, max_pixels=100, allow_truncated=True)
    assert make_read_settings(reading) == ReadSettings(3, 100, True)


def test_make_reader_reads_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"bytes")
    assert make_reader(ReadingConfig())(str(tmp_path / "a")) == b"bytes"


def test_read_json_names_the_file_when_it_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[1, 2]")
    assert read_json(str(path), ReadingConfig()) == [1, 2]
    for content in (b"[1, ", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=r"x\.json: expected JSON"):
            read_json(str(path), ReadingConfig())


def test_absolute_uri_is_understood_in_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("a/../b c#1.json") == str(tmp_path / "b c#1.json")
    assert absolute_uri(str(tmp_path)) == str(tmp_path)
    assert absolute_uri("s3://bucket/a/../b") == "s3://bucket/a/../b"
    assert absolute_uri("file:///data/x%20y") == "/data/x y"
    with pytest.raises(StorageError, match=r"https://example\.org/x"):
        absolute_uri("https://example.org/x")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert absolute_uri("~/x") == str(tmp_path / "home" / "x")


def test_collect_versions_names_what_shapes_results() -> None:
    versions = collect_versions()
    assert versions["torch"] == metadata.version("torch")
    assert {"torchvision", "ray", "onnx", "openvino", "pycocotools", "commit"} <= set(versions)
    assert versions["commit"] == "unknown" or re.fullmatch("[0-9a-f]{40}", versions["commit"])


def test_collect_versions_does_without_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(provenance, "_PACKAGES", ("torch", "no-such-package"))
    assert collect_versions()["no-such-package"] == "not installed"


@pytest.mark.parametrize(
    "failure", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 5), 128]
)
def test_collect_versions_does_without_git(
    monkeypatch: pytest.MonkeyPatch, failure: Exception | int
) -> None:
    def run(*arguments: Any, **_: Any) -> subprocess.CompletedProcess[str]:
        if isinstance(failure, Exception):
            raise failure
        return subprocess.CompletedProcess(arguments, failure, stdout="HEAD\n", stderr="fatal")

    monkeypatch.setattr(provenance.subprocess, "run", run)
    assert collect_versions()["commit"] == "unknown"


def test_collect_versions_does_not_take_the_commit_of_another_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As when the package is installed below somebody's own project.
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / ".gitignore").write_text("venv\n")
    (tmp_path / "venv").mkdir()
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "theirs"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "venv" / "provenance.py"))
    assert collect_versions()["commit"] == "unknown"


def test_make_run_id_is_sortable_and_never_the_same() -> None:
    ids = [make_run_id() for _ in range(50)]
    assert len(set(ids)) == 50
    assert all(re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{6}", name) for name in ids)


def test_run_doctor_is_content_with_a_clean_set(image_set: Any) -> None:
    tree = {"annotations": str(image_set.annotations), "images": str(image_set.folder)}
    outcome = run_doctor(load_from_dict(DoctorJob, tree))
    assert outcome.exit_code == 0
    assert json.loads(outcome.to_json())["is_clean"]


def test_run_doctor_repairs_into_a_copy(
    image_set: Any, write_json: Callable[[str, Any], str], tmp_path: Path
) -> None:
    broken = copy.deepcopy(image_set.coco)
    broken["annotations"][3]["image_id"] = "2"  # an id in the wrong JSON type
    broken["annotations"][1]["bbox"][2] = -5
    tree = {"annotations": write_json("broken.json", broken), "images": str(image_set.folder)}
    assert run_doctor(load_from_dict(DoctorJob, tree)).exit_code == 1
    fixed = str(tmp_path / "fixed.json")
    outcome = run_doctor(load_from_dict(DoctorJob, tree | {"fix": fixed}))
    assert outcome.exit_code == 0
    assert outcome.fixed == fixed
    assert not outcome.report.is_clean
    assert outcome.remaining is not None
    assert outcome.remaining.is_clean
    assert "repaired copy" in outcome.to_text()
    assert run_doctor(load_from_dict(DoctorJob, tree | {"annotations": fixed})).exit_code == 0
