from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from retinaray.config.loading import load_from_argv
from retinaray.config.nodes import Job
from retinaray.errors import ConfigError

MINIMAL = {
    "train": ["model.pth", "--annotations", "train.json"],
    "evaluate": ["model.pth", "--annotations", "test.json"],
    "export": ["model.pth", "model.onnx"],
    "infer": ["model.onnx", "--images", "photos"],
    "doctor": ["--annotations", "train.json"],
    "demo": [],
}


@pytest.fixture
def minimal() -> dict[str, list[str]]:
    """The shortest valid command line of each verb."""
    return {verb: list(argv) for verb, argv in MINIMAL.items()}


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
