from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from retinaray.config.loading import load_from_argv
from retinaray.config.nodes import Job
from retinaray.errors import ConfigError

MINIMAL = {
    "train": ["model.pth", "--annotations", "train.json"],
    "tune": ["sweep", "--annotations", "train.json", "--val-annotations", "val.json"],
    "evaluate": ["model.pth", "--annotations", "test.json"],
    "thresholds": ["model.pth", "--annotations", "val.json"],
    "anchors": ["--annotations", "train.json"],
    "export": ["model.pth", "model.onnx"],
    "parity": ["model.pth", "model.onnx", "--images", "photos"],
    "bundle": ["model.pth", "handover", "--target", "jetpack6"],
    "plan": ["--job", "job.yaml"],
    "infer": ["model.onnx", "--images", "photos"],
    "doctor": ["--annotations", "train.json"],
    "report": ["model_run"],
    "convert": ["labels", "train.json", "--from", "voc"],
    "import-odtk": ["old.pth", "new.pth"],
    "demo": [],
}


SPACE = """\
space:
  anchors.base_scale: {loguniform: [1.5, 4.0]}
  anchors.ratios: [[1.0, 2.0, 0.5], [1, 3]]
  model.backbone_weights: [none, DEFAULT]
  run.batch: {quniform: [4, 16, 4]}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> dict[str, list[str]]:
    """The shortest valid command line of each verb; a space is in a file only."""
    (tmp_path / "space.yaml").write_text(SPACE, encoding="utf-8")
    argvs = {verb: list(argv) for verb, argv in MINIMAL.items()}
    argvs["tune"] += ["--config", str(tmp_path / "space.yaml")]
    return argvs


@pytest.fixture
def faults_of() -> Callable[[type[Job], list[str]], list[str]]:
    """Give the lines of the error that a wrong command line raises."""

    def load(job_class: type[Job], argv: list[str]) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load_from_argv(job_class, argv)
        return str(caught.value).splitlines()

    return load


@pytest.fixture
def write_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a job file into an empty working folder and give its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        (tmp_path / "job.yaml").write_text(text, encoding="utf-8")
        return "job.yaml"

    return write
