"""Names that would shadow something, or say nothing; `print` only where a user reads it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

# Names under which anything could hide.
EMPTY_NAMES = {"base", "common", "core", "helper", "helpers", "misc", "util", "utils"}
# Import names of dependencies that differ from their distribution's.
IMPORT_NAMES = {"PIL", "cv2", "google", "skimage", "sklearn", "yaml"}
FOLDERS_ON_THE_IMPORT_PATH = ("jobs", "tests/benchmarks")
MAY_PRINT = {"cli.py"}


def find_bad_names(stems: set[str], taken: set[str]) -> set[str]:
    """Module names that say nothing or belong to somebody else."""
    return {stem for stem in stems if stem in EMPTY_NAMES | taken and not stem.startswith("__")}


def find_prints(tree: ast.AST) -> list[int]:
    """Lines that call the built-in print."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]


@pytest.fixture(scope="module")
def taken_names(declared_distributions: set[str]) -> set[str]:
    """Top-level import names of the standard library and of all dependencies."""
    modules = {name.replace("-", "_") for name in declared_distributions}
    return set(sys.stdlib_module_names) | modules | IMPORT_NAMES


def test_package_modules_have_names_of_their_own(
    package_trees: dict[str, ast.Module], taken_names: set[str]
) -> None:
    stems = {part.removesuffix(".py") for path in package_trees for part in path.split("/")}
    # Inside the package such a name shadows nothing, but reads as if it were the other.
    assert find_bad_names(stems, taken_names) == set()


@pytest.mark.parametrize("folder", FOLDERS_ON_THE_IMPORT_PATH)
def test_scripts_shadow_no_import(folder: str, repository: Path, taken_names: set[str]) -> None:
    stems = {path.stem for path in (repository / folder).glob("*.py")}
    assert stems, f"{folder} holds scripts"
    assert find_bad_names(stems, taken_names | {"retinaray"}) == set()


def test_source_root_is_no_package(repository: Path) -> None:
    # `platform/__init__.py` would replace the standard library's module of that name.
    assert (repository / "platform" / "retinaray" / "__init__.py").is_file()
    assert not (repository / "platform" / "__init__.py").exists()
    assert not (repository / "platform.py").exists()


def test_import_platform_gives_the_standard_library_when_run_from_the_root(
    repository: Path,
) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.system(), platform.__file__)"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    system, _, file = answer.stdout.strip().partition(" ")
    assert system
    assert not Path(file).is_relative_to(repository / "platform")


def test_package_never_prints(package_trees: dict[str, ast.Module]) -> None:
    faults = [
        f"{path}:{line}"
        for path, tree in package_trees.items()
        if path not in MAY_PRINT
        for line in find_prints(tree)
    ]
    assert not faults, f"print in the package, log instead: {faults}"


def test_find_bad_names_sees_what_shadows_or_says_nothing() -> None:
    stems = {"anchors", "utils", "types", "ray", "__init__", "base", "training_state"}
    assert find_bad_names(stems, {"types", "ray", "json"}) == {"utils", "types", "ray", "base"}


def test_find_prints_sees_calls_only() -> None:
    source = "print(1)\ndef f():\n    print('a')\nconsole.print('b')\nx = print\n"
    assert find_prints(ast.parse(source)) == [1, 3]
