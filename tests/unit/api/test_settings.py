"""Keywords of the Python API mean what flags mean on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retinaray.api.settings import make_job
from retinaray.config.loading import load_from_argv, read_request
from retinaray.config.schema import AnchorsJob, EvaluateJob, InferJob, Job, TrainJob, TuneJob
from retinaray.errors import ConfigError

TRAIN: dict[str, Any] = {"output": "model.pth", "annotations": "train.json"}
TRAIN_ARGV = ["model.pth", "--annotations", "train.json"]


@pytest.mark.parametrize(
    ("job_class", "given", "argv"),
    [
        (TrainJob, TRAIN, TRAIN_ARGV),
        (
            TrainJob,
            {**TRAIN, "batch": 16, "lr": 0.02, "anchor_scales": (2, 2.52, 3.17)},
            [*TRAIN_ARGV, "--batch", "16", "--lr", "0.02", "--anchor-scales", "2", "2.52", "3.17"],
        ),
        (
            TrainJob,
            {"output": "model.pth", "data": {"annotations": "train.json", "size": [64, 96]}},
            [*TRAIN_ARGV, "--size", "64", "96"],
        ),
        (TrainJob, {**TRAIN, "loss__focal_gamma": 1.5}, [*TRAIN_ARGV, "loss.focal_gamma=1.5"]),
        (TrainJob, {**TRAIN, "loss.focal_gamma": 1.5}, [*TRAIN_ARGV, "loss.focal_gamma=1.5"]),
        (
            TrainJob,
            {**TRAIN, "anchors": {"convention": "odtk"}, "patience": 0},
            [*TRAIN_ARGV, "--anchors", "odtk", "--patience", "0"],
        ),
        (TrainJob, {**TRAIN, "lr": None}, [*TRAIN_ARGV, "--lr", "none"]),
        (
            EvaluateJob,
            {"model": Path("m.pth"), "annotations": Path("a") / "t.json", "nms": "agnostic"},
            ["m.pth", "--annotations", "a/t.json", "--nms", "agnostic"],
        ),
        (
            InferJob,
            {"model": "m.onnx", "images": "photos", "tile": np.array([64, 96]), "overlap": 0.3},
            ["m.onnx", "--images", "photos", "--tile", "64", "96", "--overlap", "0.3"],
        ),
        (
            AnchorsJob,
            {"annotations": "t.json", "fit": True, "scales": np.int64(2)},
            ["--annotations", "t.json", "--fit", "--scales", "2"],
        ),
    ],
    ids=[
        *("plain", "flags", "section", "underscores", "dotted", "section-and-flag", "none"),
        *("paths", "array", "numpy-scalar"),
    ],
)
def test_make_job_reads_keywords_as_the_command_line_reads_flags(
    job_class: type[Job], given: dict[str, Any], argv: list[str]
) -> None:
    assert make_job(job_class, given) == load_from_argv(job_class, argv)


def test_make_job_keeps_the_mapping_of_a_search_space_whole() -> None:
    space = {"anchors.base_scale": {"uniform": [2, 4]}, "optim.peak_lr": (0.01, 0.02)}
    job = make_job(TuneJob, {**TRAIN, "val_annotations": "val.json", "space": space, "trials": 4})
    assert job.space == {"anchors.base_scale": {"uniform": [2, 4]}, "optim.peak_lr": [0.01, 0.02]}
    assert job.sweep.trials == 4


def test_make_job_gives_all_faults_of_the_command_line_at_once() -> None:
    with pytest.raises(ConfigError) as by_keyword:
        make_job(TrainJob, {"output": "m.pth", "batch": "many", "resize": 600, "max_size": 500})
    with pytest.raises(ConfigError) as by_flag:
        read_request(TrainJob, ["m.pth", "--batch", "many", "--resize", "600", "--max-size", "500"])
    faults = str(by_keyword.value).splitlines()
    assert set(faults) == set(str(by_flag.value).splitlines())
    assert len(faults) > 1
    assert any("data.annotations" in fault and "required" in fault for fault in faults)
    assert "run.batch=many (--batch): expected a whole number from 1 to 65536" in faults


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"batch_size": 4}, r"batch_size=4: no such key; nearest: run\.batch \(--batch\)"),
        ({"data": {"imges": "x"}}, r"data\.imges=x: no such key; nearest: data\.images"),
        ({"run__bach": 4}, r"run\.bach=4: no such key; nearest: run\.batch"),
        ({"batch": 4, "run": {"batch": 8}}, r"run\.batch is given twice, the second time by run"),
        ({"data": 3}, r"data=3: expected a section with keys of images, annotations"),
    ],
    ids=["flag", "section", "path", "twice", "no-section"],
)
def test_make_job_names_what_was_meant_when_a_keyword_is_wrong(
    given: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ConfigError, match=fault) as caught:
        make_job(TrainJob, {"output": "m.pth", "annotations": "t.json", "epochs": 0, **given})
    assert "run.epochs=0 (--epochs): expected a whole number >= 1" in str(caught.value)


def test_make_job_lets_keywords_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("output: a.pth\ndata: {annotations: t.json, resize: 500}\nrun: {batch: 4}\n")
    job = make_job(TrainJob, {"data": {"max_size": 900}, "batch": 2}, config=file)
    assert job == load_from_argv(
        TrainJob, ["--config", str(file), "--max-size", "900", "--batch", "2"]
    )
    assert (job.data.resize, job.data.max_size, job.run.batch) == (500, 900, 2)


def test_make_job_takes_content_and_finished_settings_as_config() -> None:
    first = make_job(TrainJob, {"batch": 4}, config={"output": Path("a.pth"), "data": {
        "annotations": "t.json"}})  # fmt: skip
    second = make_job(TrainJob, {"batch": 2}, config=first)
    assert (first.output, first.run.batch, first.data.annotations) == ("a.pth", 4, "t.json")
    assert (second.output, second.run.batch, second.data.annotations) == ("a.pth", 2, "t.json")


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("model.pth", "", r"config=.*model\.pth: expected a file that ends in \.yaml"),
        ("absent.yaml", None, r"config file .*absent\.yaml: No such file"),
        ("broken.yaml", "a: [1", r"broken\.yaml, line .*: not YAML"),
    ],
)
def test_make_job_says_so_when_the_file_is_none_of_settings(
    tmp_path: Path, name: str, content: str | None, fault: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=fault):
        make_job(TrainJob, TRAIN, config=tmp_path / name)


def test_make_job_gives_faults_of_file_and_keywords_together(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("output: a.pth\noutput: b.pth\n")
    with pytest.raises(ConfigError) as caught:
        make_job(TrainJob, {"batch": 0, "annotations": "t.json"}, config=file)
    first, second = str(caught.value).splitlines()
    assert "output is given twice" in first
    assert second.startswith("run.batch=0")


def test_make_job_refuses_an_output_that_would_go_with_the_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "x"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=r"output=model\.pth: lies in the copy"):
        make_job(TrainJob, TRAIN)
