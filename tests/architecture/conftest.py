from __future__ import annotations

import ast
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Line, module, name taken from it ("" for a plain import), and when it runs: "module" when the
# file is imported, "function" when a function is called, "typing" never.
Import = tuple[int, str, str, str]

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder with pyproject.toml."""
    return REPOSITORY


@pytest.fixture(scope="session")
def package_trees() -> dict[str, ast.Module]:
    """Every module of the package, parsed, by its path below platform/retinaray."""
    folder = REPOSITORY / "platform" / "retinaray"
    return {
        path.relative_to(folder).as_posix(): ast.parse(path.read_text("utf-8"), str(path))
        for path in sorted(folder.rglob("*.py"))
    }


@pytest.fixture(scope="session")
def read_imports() -> Callable[[ast.Module], list[Import]]:
    """List the imports of a parsed module; relative ones keep their dots."""
    return lambda tree: list(_walk_imports(tree, "module"))


def _walk_imports(node: ast.AST, place: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name, "", place) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            yield from ((child.lineno, module, alias.name, place) for alias in child.names)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _walk_imports(child, "function")
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.body:
                yield from _walk_imports(ast.Module([statement], []), "typing")
            for statement in child.orelse:
                yield from _walk_imports(ast.Module([statement], []), place)
        else:
            yield from _walk_imports(child, place)


@pytest.fixture(scope="session")
def list_git_files() -> Callable[..., list[Path]]:
    """List files by `git ls-files` with the given options, relative to the repository."""

    def list_files(*options: str) -> list[Path]:
        try:
            answer = subprocess.run(
                ["git", "ls-files", "-z", *options],
                cwd=REPOSITORY,
                capture_output=True,
                check=False,
            )
        except FileNotFoundError:
            pytest.skip("needs git, which is not installed")
        if answer.returncode:
            pytest.skip(f"needs a git checkout: {answer.stderr.decode().strip()}")
        names = sorted({Path(name) for name in answer.stdout.decode().split("\0") if name})
        # A file that was deleted but is not yet committed is still listed.
        return [name for name in names if (REPOSITORY / name).is_file()]

    return list_files


@pytest.fixture(scope="session")
def pyproject() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="session")
def requirements_of(pyproject: dict[str, Any]) -> Callable[[str], list[Requirement]]:
    """List the requirements of an extra, or of "" for the plain installation; extras may nest."""
    project = pyproject["project"]

    def collect(extra: str) -> list[Requirement]:
        texts = project["optional-dependencies"][extra] if extra else project["dependencies"]
        found = []
        for requirement in map(Requirement, texts):
            if canonicalize_name(requirement.name) == canonicalize_name(project["name"]):
                found += [inner for name in requirement.extras for inner in collect(name)]
            else:
                found.append(requirement)
        return found

    return collect


@pytest.fixture(scope="session")
def declared_distributions(
    pyproject: dict[str, Any], requirements_of: Callable[[str], list[Requirement]]
) -> set[str]:
    """Normalised names of everything that pyproject.toml asks for, extras included."""
    extras = ["", *pyproject["project"]["optional-dependencies"]]
    return {
        str(canonicalize_name(requirement.name))
        for extra in extras
        for requirement in requirements_of(extra)
    }
