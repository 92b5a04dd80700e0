from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

from retinaray.cli import VERBS
from retinaray.config.loading import load_from_argv, load_from_dict, to_dict
from retinaray.config.nodes import Job
from retinaray.config.schema import JOBS

REPOSITORY = Path(__file__).parents[2]
JOBS_FOLDER = REPOSITORY / "jobs"
CONFIGS = JOBS_FOLDER / "configs"
ALL_YAMLS = sorted(CONFIGS.rglob("*.y*ml"))
ALL_SCRIPTS = sorted(JOBS_FOLDER.glob("*.py"))
JOB_CLASSES = {job_class.verb: job_class for job_class in JOBS}


def _find_verb(path: Path) -> str:
    """The folder's name, or what the file's name begins with."""
    return path.relative_to(CONFIGS).with_suffix("").parts[0].partition("_")[0]


def _job_class(path: Path) -> type[Job]:
    return JOB_CLASSES[_find_verb(path)]


def test_all_files_are_seen() -> None:
    assert len(ALL_YAMLS) == 9
    assert [path.stem for path in ALL_SCRIPTS] == ["evaluate", "export", "infer", "train", "tune"]


@pytest.mark.parametrize("path", ALL_YAMLS, ids=lambda path: path.name)
def test_yaml_loads_as_it_is(path: Path) -> None:
    job = load_from_argv(_job_class(path), ["--config", str(path)])
    assert load_from_dict(_job_class(path), to_dict(job)) == job


@pytest.mark.parametrize("path", ALL_YAMLS, ids=lambda path: path.name)
def test_yaml_begins_with_the_command_that_uses_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    verb, name = _find_verb(path), path.relative_to(REPOSITORY).as_posix()
    comment = [line for line in text.splitlines()[:5] if line.startswith("#")]
    assert any(
        line.startswith(f"# retinaray {verb} ") and f"--config {name}" in line for line in comment
    )


@pytest.mark.parametrize("path", ALL_SCRIPTS, ids=lambda path: path.name)
def test_script_calls_the_verb_of_its_name(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    verbs = [
        ast.literal_eval(call.args[0])
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "run_verb"
    ]
    assert verbs == [path.stem]
    assert path.stem in VERBS
    docstring = ast.get_docstring(tree) or ""
    assert "ray job submit" in docstring
    assert f"python jobs/{path.stem}.py" in docstring


@pytest.mark.parametrize("path", ALL_SCRIPTS, ids=lambda path: path.name)
def test_script_hides_no_package(path: Path) -> None:
    # A script's own folder comes first on the import path.
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(path.stem)
