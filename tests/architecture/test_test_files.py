"""Tests are found by pytest, are named after what they show, and can fail."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

# Benchmarks are run by hand, assets are data.
FOLDERS = ("architecture", "distributed", "docs", "gpu", "jobs", "unit")
CHECKING_CALLS = re.compile(r"(^|\.)(raises|warns|fail|assert_\w+)$")


def find_faults(source: str) -> list[str]:
    """What keeps a test file from finding a fault, or a reader from finding the test."""
    tree = ast.parse(source)
    functions = [
        (owner, node)
        for owner in ast.walk(tree)
        for node in ast.iter_child_nodes(owner)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    tests = [(owner, node) for owner, node in functions if node.name.startswith("test")]
    faults = []
    if not tests:
        faults.append("has no test")
    if not any(_checks(node) for node in ast.walk(tree)):
        faults.append("has no assert and no pytest.raises")
    for name, count in Counter((id(owner), node.name) for owner, node in tests).items():
        if count > 1:
            faults.append(f"defines {name[1]} {count} times: only the last one runs")
    for _, node in tests:
        if not re.fullmatch(r"test(_[a-z0-9]+){2,}", node.name):
            faults.append(f"{node.name}: expected test_<function>_<behaviour>")
    for _, node in functions:
        marks = [ast.unparse(decorator) for decorator in node.decorator_list]
        if any(mark.startswith("pytest.mark.") for mark in marks) and (
            not node.name.startswith("test")
        ):
            faults.append(f"{node.name} has a mark but is no test")
    return faults


def _checks(node: ast.AST) -> bool:
    return isinstance(node, ast.Assert) or (
        isinstance(node, ast.Call) and bool(CHECKING_CALLS.search(ast.unparse(node.func)))
    )


def test_test_files_can_fail(repository: Path) -> None:
    paths = [path for folder in FOLDERS for path in (repository / "tests" / folder).rglob("*.py")]
    assert paths
    faults = [
        f"{path.relative_to(repository)}: {fault}"
        for path in sorted(paths)
        if path.name != "conftest.py"
        for fault in find_faults(path.read_text("utf-8"))
    ]
    assert not faults, "\n" + "\n".join(faults)


def test_python_files_below_tests_are_tests_or_fixtures(repository: Path) -> None:
    strays = [
        str(path.relative_to(repository))
        for folder in FOLDERS
        for path in (repository / "tests" / folder).rglob("*.py")
        if not re.fullmatch(r"conftest\.py|test_\w+\.py", path.name)
    ]
    assert not strays, f"helpers belong into conftest.py: {strays}"


def test_tests_are_no_packages(repository: Path) -> None:
    # A package `tests.platform` or `tests.data` could be imported in place of another one.
    assert not list((repository / "tests").rglob("__init__.py"))
    assert not (repository / "tests" / "platform").exists()


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("def helper():\n    assert True", "has no test"),
        ("def test_a_b():\n    print(1)", "has no assert"),
        ("def test_a_b(): assert 1\ndef test_a_b(): assert 2", "only the last one runs"),
        ("def test_a(): assert 1", "test_a: expected"),
        ("def test_a_B(): assert 1", "test_a_B: expected"),
        ("def testing(): assert 1\ndef test_a_b(): assert 1", "testing: expected"),
        ("@pytest.mark.gpu\ndef check(): assert 1\ndef test_a_b(): assert 1", "check has a mark"),
    ],
)
def test_find_faults_names_the_fault(source: str, fault: str) -> None:
    faults = find_faults(source)
    assert len(faults) == 1
    assert fault in faults[0]


@pytest.mark.parametrize(
    "check",
    ["assert 1", "with pytest.raises(ValueError): f()", "torch.testing.assert_close(a, b)"],
)
def test_find_faults_accepts_every_way_of_checking(check: str) -> None:
    assert find_faults(f"def test_a_b():\n    {check}") == []
    assert find_faults(f"class TestA:\n    def test_a_b(self):\n        {check}") == []
