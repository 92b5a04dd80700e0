"""`bundle`: a folder for a device, with the file that it takes and a self-test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retinaray.assembly.bundle import run_bundle
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import BundleJob
from retinaray.errors import ExportError
from retinaray.export.edge_bundle.manifest import check_bundle
from retinaray.export.targets import read_file_kind

pytestmark = pytest.mark.usefixtures("one_thread", "remembered_export")


@pytest.fixture
def make_job(tmp_path: Path, tiny_weights: bytes, image_set: Any) -> Callable[..., BundleJob]:
    """Bundles of the tiny model into tmp_path/bundle."""
    (tmp_path / "model.pth").write_bytes(tiny_weights)
    tree = {
        "model": str(tmp_path / "model.pth"),
        "output": str(tmp_path / "bundle"),
        "target": "jetpack6",
        "gate": {"nvidia": "skip", "images": str(image_set.folder)},
        "samples": 2,
    }

    def make(**changes: object) -> BundleJob:
        return load_from_dict(BundleJob, tree, changes)

    return make


def test_run_bundle_writes_a_folder_that_checks_itself(
    make_job: Callable[..., BundleJob], tmp_path: Path
) -> None:
    outcome = run_bundle(make_job())
    folder = tmp_path / "bundle"
    facts = check_bundle(folder)
    assert facts["target"] == "jetpack6"
    assert read_file_kind((folder / "model.onnx").read_bytes()) == "fp16"
    expected = json.loads((folder / "selftest" / "expected.json").read_text("utf-8"))
    assert len(expected["samples"]) == 2
    assert set(outcome.files) == {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    }
    assert json.loads(outcome.to_json())["parity"]["precision"] == "fp16"
    assert "follow its README.md" in outcome.to_text()


def test_run_bundle_writes_the_same_bytes_again(
    make_job: Callable[..., BundleJob], tmp_path: Path
) -> None:
    job = make_job(precision="fp32")
    run_bundle(job)
    first = {path: path.read_bytes() for path in (tmp_path / "bundle").rglob("*") if path.is_file()}
    run_bundle(job)
    assert {path: path.read_bytes() for path in first} == first


def test_run_bundle_writes_a_repository_for_triton(
    make_job: Callable[..., BundleJob], tmp_path: Path
) -> None:
    outcome = run_bundle(make_job(target="triton", batch=[1, 4, 8]))
    assert (tmp_path / "bundle" / "bundle" / "config.pbtxt").is_file()
    assert "max_batch_size: 8" in (tmp_path / "bundle/bundle/config.pbtxt").read_text("utf-8")
    assert outcome.target == "triton"


def test_run_bundle_leaves_a_folder_that_is_no_bundle(
    make_job: Callable[..., BundleJob], tmp_path: Path
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ExportError, match="expected no such folder, or an earlier bundle"):
        run_bundle(make_job())
    assert [path.name for path in (tmp_path / "bundle").iterdir()] == ["notes.txt"]


def test_run_bundle_refuses_a_place_that_is_not_local(make_job: Callable[..., BundleJob]) -> None:
    with pytest.raises(ExportError, match="expected a local folder"):
        run_bundle(make_job(output="s3://bucket/bundle"))


def test_run_bundle_refuses_a_deepstream_that_the_target_has_not(
    make_job: Callable[..., BundleJob],
) -> None:
    with pytest.raises(ExportError, match=r"jetpack6 has DeepStream 7\.1, asked for 9\.0"):
        run_bundle(make_job(deepstream="9.0"))
