from __future__ import annotations

import pytest

from retinaray.config.loading import load_from_argv
from retinaray.config.training_schema import TrainJob
from retinaray.errors import ConfigError

TRAIN = ["model.pth", "--annotations", "train.json"]


def test_tracking_is_off_by_default() -> None:
    tracking = load_from_argv(TrainJob, TRAIN).tracking
    assert (tracking.mlflow, tracking.wandb, tracking.experiment) == (False, False, "retinaray")


def test_tracking_flags_choose_both_trackers() -> None:
    argv = [*TRAIN, "--mlflow", "--wandb", "--mlflow-uri", "http://h:5000", "--experiment", "cars"]
    tracking = load_from_argv(TrainJob, [*argv, "--no-upload-model"]).tracking
    assert tracking.model_dump() == {
        "mlflow": True,
        "mlflow_uri": "http://h:5000",
        "wandb": True,
        "experiment": "cars",
        "upload_model": False,
    }


def test_tracking_refuses_an_address_that_would_not_be_used() -> None:
    with pytest.raises(ConfigError, match=r"tracking\.mlflow_uri=http://h.*add --mlflow"):
        load_from_argv(TrainJob, [*TRAIN, "--mlflow-uri", "http://h"])
