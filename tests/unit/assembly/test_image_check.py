"""What is said before a training whose images lie elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retinaray.assembly.image_check import check_images
from retinaray.assembly.training import read_inputs
from retinaray.config.schema import TrainJob
from retinaray.errors import DatasetError

JobFactory = Callable[..., TrainJob]


def test_check_images_is_silent_when_they_are_there(
    make_train_job: JobFactory, image_set: Any
) -> None:
    job = make_train_job({"data.val_annotations": str(image_set.annotations)})
    assert check_images(job, read_inputs(job)) is None


def test_check_images_refuses_a_folder_that_is_misspelt(
    make_train_job: JobFactory, image_set: Any
) -> None:
    wrong = f"{image_set.folder}s"
    job = make_train_job({"data.images": wrong})
    with pytest.raises(DatasetError, match=rf"{wrong}/1\.png: no such image \(3 were looked for"):
        check_images(job, read_inputs(job))


def test_check_images_names_the_option_of_the_validation_set(
    make_train_job: JobFactory, image_set: Any, tmp_path: Path
) -> None:
    changes = {"val_annotations": str(image_set.annotations), "val_images": str(tmp_path)}
    job = make_train_job({f"data.{key}": value for key, value in changes.items()})
    with pytest.raises(DatasetError, match=r"--val-images is the folder .*the folder is empty$"):
        check_images(job, read_inputs(job))


def test_check_images_lets_single_gaps_pass(
    make_train_job: JobFactory, image_set: Any, tmp_path: Path
) -> None:
    # Of six the first, the third and the last are asked for; here only the last is there.
    (tmp_path / "6.png").write_bytes((image_set.folder / "6.png").read_bytes())
    job = make_train_job({"data.images": str(tmp_path)})
    assert check_images(job, read_inputs(job)) is None


def test_check_images_takes_a_set_of_one_image(
    make_train_job: JobFactory, image_set: Any, tmp_path: Path
) -> None:
    one = {**image_set.coco, "images": image_set.coco["images"][:1], "annotations": []}
    (tmp_path / "one.json").write_text(json.dumps(one), encoding="utf-8")
    job = make_train_job({"data.annotations": str(tmp_path / "one.json")})
    assert check_images(job, read_inputs(job)) is None
