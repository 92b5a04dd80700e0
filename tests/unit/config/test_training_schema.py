"""Settings of a training's optimizer, network and steps that contradict each other."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from retinaray.config.loading import load_from_argv
from retinaray.config.schema import (
    ModelConfig,
    OptimConfig,
    TrainDataConfig,
    TrainJob,
    TrainRunConfig,
)


@pytest.mark.parametrize(
    ("node", "values", "match"),
    [
        (OptimConfig, {"momentum": 0.8}, r"momentum=0\.8 would not be used by .*=adamw"),
        (OptimConfig, {"optimizer": "sgd", "momentum": 1.0}, "less than 1"),
        (OptimConfig, {"max_skipped_steps": 0}, "greater than or equal to 1"),
        (TrainRunConfig, {"checkpoint_minutes": 0}, "greater than 0"),
        (TrainRunConfig, {"batch": 8, "workers": 4, "min_workers": 5}, "most run.workers=4, and"),
        (TrainRunConfig, {"batch": 8, "workers": 4, "min_workers": 3}, "=8 a multiple of it"),
        (
            TrainRunConfig,
            {"batch": 8, "accumulate": 3},
            r"accumulate=3 parts each: .*multiple of 3",
        ),
        (
            TrainRunConfig,
            {"batch": 8, "workers": 4, "accumulate": 4},
            r"batch=8 of run\.workers=4 does not divide .* multiple of 16, or lower --accumulate",
        ),
        (TrainRunConfig, {"batch": 8, "workers": 3, "accumulate": 2}, "multiple of 6"),
        (
            TrainDataConfig,
            {"annotations": "a", "two_canvases": True, "size": (64, 96)},
            r"two_canvases=true with data\.size=\(64, 96\)",
        ),
        (
            TrainDataConfig,
            {"annotations": "a", "windows": (96, 64), "size": (64, 96)},
            r"windows=\(96, 64\) is larger than data\.size=\(64, 96\)",
        ),
        (
            TrainDataConfig,
            {"annotations": "a", "windows": (64, 64), "two_canvases": True},
            r"windows=\(64, 64\) with data\.two_canvases=true",
        ),
        (ModelConfig, {"freeze_at": 5}, "less than or equal to 4"),
    ],
)
def test_node_refuses_values_that_contradict_each_other(
    node: Any, values: dict[str, object], match: str
) -> None:
    with pytest.raises(ValidationError, match=match):
        node.model_validate(values)


def test_train_job_reports_all_that_random_weights_forbid() -> None:
    tree = {
        "output": "m.pth",
        "data": {"annotations": "a"},
        "model": {"norm": "frozen_bn", "freeze_at": 2},
    }
    with pytest.raises(ValidationError, match=r"(?s)norm=frozen_bn .*freeze_at=2 .*drop --freeze"):
        TrainJob.model_validate(tree)


def test_load_from_argv_takes_the_flags_of_a_training_step() -> None:
    line = (
        "m.pth --annotations a --optimizer sgd --momentum 0.95 --batch 16 --workers 2 "
        "--accumulate 4 --precision fp16 --max-skipped 5 --freeze 2 --backbone-weights DEFAULT "
        "--norm sync_bn --compile --two-canvases"
    )
    job = load_from_argv(TrainJob, line.split())
    assert (job.optim.momentum, job.optim.max_skipped_steps) == (0.95, 5)
    assert (job.run.accumulate, job.run.precision, job.run.compile) == (4, "fp16", True)
    assert (job.model.freeze_at, job.model.norm) == (2, "sync_bn")
    assert job.data.two_canvases
    plain = load_from_argv(TrainJob, ["m.pth", "--annotations", "a"])
    assert (plain.run.accumulate, plain.run.compile, plain.optim.max_skipped_steps) == (
        1,
        False,
        20,
    )
    assert (plain.model.freeze_at, plain.data.two_canvases, plain.optim.momentum) == (
        0,
        False,
        None,
    )


def test_train_run_takes_fewer_workers_that_share_the_batch() -> None:
    assert TrainRunConfig(batch=8, workers=4, min_workers=2).min_workers == 2
