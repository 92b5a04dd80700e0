"""docs/python_api.md: its code runs, and it names everything that is offered."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import retinaray
from retinaray.config.nodes import Job

PAGE = Path(__file__).parents[3] / "docs" / "python_api.md"
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def _restored_logging() -> Iterator[None]:
    logger = logging.getLogger("retinaray")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("_restored_logging", "one_core")
def test_code_of_the_page_runs(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "train.yaml").write_text("data: {annotations: data/train.json}\n")
    monkeypatch.chdir(tmp_path)
    asked: list[Job] = []

    def take(job: Job) -> SimpleNamespace:
        asked.append(job)
        return SimpleNamespace(to_text=lambda: f"{job.verb} was asked for")

    # What takes long, or needs Ray; their settings are still checked.
    for place in ("train.run_training", "batch_inference.run_inference"):
        monkeypatch.setattr(f"retinaray.distributed.{place}", take)
    monkeypatch.setattr("retinaray.assembly.export.run_export", take)
    monkeypatch.setattr(retinaray, "connect", Untouched, raising=False)
    blocks = FENCE.findall(PAGE.read_text("utf-8"))
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)
    assert len(blocks) >= 8
    assert [job.verb for job in asked] == ["train", "export", "infer", "train", "train"]
    printed = capsys.readouterr().out
    faults = PAGE.read_text("utf-8").partition("```text\n")[2].partition("```")[0]
    assert faults.count("\n") == 2
    assert faults in printed
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


class Untouched:
    """Stands for a cluster: a context that does nothing."""

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        return


def test_page_names_every_export() -> None:
    text = PAGE.read_text("utf-8")
    offered = set(retinaray.__all__) - {"__version__", "DetectedObject"}
    missing = {name for name in offered if not re.search(rf"\b{name}\b", text)}
    assert not missing
    errors = {name for name in vars(retinaray.errors) if name.endswith("Error")}
    assert errors - set(re.findall(r"\w+Error", text)) <= {"UnreadableFileError"}
