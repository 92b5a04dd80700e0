"""The command line of a report gives the job that it came from."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from retinaray.assembly.report_command import (
    add_settings,
    flatten_settings,
    format_command,
    list_changed,
)
from retinaray.config.loading import load_from_argv, load_from_dict, to_dict
from retinaray.config.schema import InferJob, Job, ParityJob, TrainJob, TuneJob
from retinaray.reporting.report.contents import ReportedRun

TRAIN: dict[str, Any] = {"output": "my models/m.pth", "data": {"annotations": "a.json"}}


@pytest.mark.parametrize(
    ("job_class", "tree"),
    [
        (TrainJob, TRAIN),
        (
            TrainJob,
            {
                "output": "m.pth",
                "data": {"annotations": "it's.json", "size": [480, 640]},
                "anchors": {"scales": [2.0, 2.52], "ratios": [0.5]},
                "loss": {"keep_best_anchor": False},
                "optim": {"milestones": [10, 20], "weight_decay": 0.0},
                "run": {"strict_anchors": True, "epochs": 3},
            },
        ),
        (
            InferJob,
            {
                "model": "m.onnx",
                "images": "s3://bucket/a",
                "output": "out",
                "select": {"include": ["*.jpg", "a/**"]},
                "detection": {"score_threshold": 0.25},
            },
        ),
        (
            ParityJob,
            {"model": "m.pth", "files": ["a.onnx", "b.onnx"], "images": "i", "limit": None},
        ),
    ],
    ids=["few", "many", "patterns", "several files"],
)
def test_format_command_gives_the_same_job_when_it_is_read(
    job_class: type[Job], tree: dict[str, Any]
) -> None:
    job = load_from_dict(job_class, tree)
    # A shell takes a backslash at the end of a line away with the end.
    words = shlex.split(format_command(job).replace("\\\n", ""))
    assert words[:2] == ["retinaray", job_class.verb]
    assert load_from_argv(job_class, words[2:]) == job


def test_format_command_writes_only_what_is_not_the_default() -> None:
    job = load_from_dict(TrainJob, TRAIN, {"optim.peak_lr": 0.002})
    assert format_command(job) == (
        "retinaray train 'my models/m.pth' \\\n    --annotations a.json \\\n    --lr 0.002"
    )
    assert list_changed(job) == {"output", "data.annotations", "optim.peak_lr"}


def test_format_command_writes_a_file_when_no_flag_takes_a_setting() -> None:
    tree = {
        "output": "sweep",
        "data": {"annotations": "a.json", "val_annotations": "b.json"},
        "space": {"optim.peak_lr": [0.1, 0.2]},
    }
    text = format_command(load_from_dict(TuneJob, tree))
    assert text.startswith("retinaray tune --config tune.yaml\n\n# tune.yaml\n")
    assert "\nspace:\n  optim.peak_lr:\n" in text


def test_flatten_settings_joins_keys_and_keeps_empty_sections() -> None:
    tree = {"a": {"b": 1, "c": {"d.e": [1, 2]}}, "f": {}, "g": None}
    assert flatten_settings(tree) == {"a.b": 1, "a.c.d.e": [1, 2], "f": {}, "g": None}


def test_add_settings_keeps_the_values_when_this_version_does_not_understand_them() -> None:
    run = ReportedRun(name="old", kind="train", source="old")
    tree = {**TRAIN, "loss": {"forgotten": 3}}
    found, job = add_settings(run, TrainJob, tree, {"torch": "1.0"})
    assert job is None
    assert found.settings["loss.forgotten"] == 3
    assert found.command == ""
    assert found.versions == {"torch": "1.0"}
    assert "reads its settings differently: loss.forgotten" in found.gaps[0]
    job = load_from_dict(TrainJob, TRAIN)
    found, again = add_settings(run, TrainJob, to_dict(job), {})
    assert again == job
    assert found.gaps == ()
