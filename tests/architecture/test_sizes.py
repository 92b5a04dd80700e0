"""The size budget: files, functions, branches, line lengths of package, jobs and benchmarks.

Tests are long by their tables; for them only the length of lines counts.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import pytest

MAX_FILE_LINES = 400
MAX_JOB_LINES = 80
MAX_FUNCTION_LINES = 60
MAX_BRANCHES = 10
MAX_LINE_CHARACTERS = 100
# As ruff does it: a note to a tool cannot be broken, and does not count.
PRAGMA = re.compile(r"\s+# (type: ignore|noqa|fmt: skip).*$")

BUDGETED = ("platform/retinaray", "jobs", "tests/benchmarks")
CHECKED_FOR_LINE_LENGTH = ("platform", "jobs", "tests")
BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case, ast.IfExp)

# Name of a thing, and its size.
Size = tuple[str, int]


def list_sources(repository: Path, folders: Sequence[str]) -> list[Path]:
    return sorted(path for folder in folders for path in (repository / folder).rglob("*.py"))


def walk_functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def count_code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body after the docstring; 0 when there is only a docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]


def count_branches(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Statements and expressions that choose or repeat, those of inner functions included."""
    return sum(isinstance(node, BRANCHES) for node in ast.walk(function))


def describe_excess(sizes: list[Size], limit: int) -> str:
    """Empty when all keep the limit; else the distribution, and what is over it, largest first."""
    over = sorted((size for size in sizes if size[1] > limit), key=lambda size: -size[1])
    if not over:
        return ""
    values = sorted(value for _, value in sizes)
    p95 = values[math.ceil(0.95 * len(values)) - 1]
    lines = [f"  {value} {name}" for name, value in over]
    head = f"{len(over)} of {len(values)} over {limit} (median {median(values):g}, p95 {p95}):"
    return "\n".join(["", head, *lines])


@pytest.fixture(scope="module")
def functions(repository: Path) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of the budgeted folders with its place."""
    found = [
        (f"{path.relative_to(repository)}:{function.lineno} {function.name}", function)
        for path in list_sources(repository, BUDGETED)
        for function in walk_functions(ast.parse(path.read_text("utf-8")))
    ]
    assert found, f"no functions below {BUDGETED}"
    return found


def test_files_keep_their_length(repository: Path) -> None:
    sizes = [
        (str(path.relative_to(repository)), len(path.read_text("utf-8").splitlines()))
        for path in list_sources(repository, BUDGETED)
    ]
    assert not describe_excess(sizes, MAX_FILE_LINES), describe_excess(sizes, MAX_FILE_LINES)


def test_job_scripts_keep_their_length(repository: Path) -> None:
    sizes = [
        (path.name, len(path.read_text("utf-8").splitlines()))
        for path in list_sources(repository, ["jobs"])
    ]
    assert sizes
    assert not describe_excess(sizes, MAX_JOB_LINES), describe_excess(sizes, MAX_JOB_LINES)


def test_functions_keep_their_length(
    functions: list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]],
) -> None:
    sizes = [(name, count_code_lines(function)) for name, function in functions]
    excess = describe_excess(sizes, MAX_FUNCTION_LINES)
    assert not excess, excess


def test_functions_keep_their_branches(
    functions: list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]],
) -> None:
    sizes = [(name, count_branches(function)) for name, function in functions]
    excess = describe_excess(sizes, MAX_BRANCHES)
    assert not excess, excess


def test_lines_keep_their_length(repository: Path) -> None:
    sizes = [
        (f"{path.relative_to(repository)}:{number}", len(PRAGMA.sub("", line)))
        for path in list_sources(repository, CHECKED_FOR_LINE_LENGTH)
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
    ]
    excess = describe_excess(sizes, MAX_LINE_CHARACTERS)
    assert not excess, excess


def test_count_code_lines_leaves_out_signature_and_docstring() -> None:
    source = """
def f(
    a,
):
    "One.

    Two."
    x = (
        1
    )
    return x
""".replace('"', "'''")
    function = next(walk_functions(ast.parse(source)))
    assert count_code_lines(function) == 4  # x = ( / 1 / ) / return x
    assert count_code_lines(next(walk_functions(ast.parse('def f():\n    """Doc."""')))) == 0


def test_count_branches_counts_choices_and_loops() -> None:
    source = """
def f(a):
    for x in a:                 # 1
        if x:                   # 2
            pass
        elif a:                 # 3
            pass
    while a:                    # 4
        try:
            a = 1 if x else 2   # 5
        except ValueError:      # 6
            pass
    match a:
        case 1:                 # 7
            pass
        case _:                 # 8
            pass
"""
    assert count_branches(next(walk_functions(ast.parse(source)))) == 8


def test_describe_excess_gives_median_and_p95_when_something_is_over() -> None:
    sizes = [(f"f{value}", value) for value in range(1, 21)]
    # Of 1..20 the median is 10.5 and the 19th value is the first at or above 95 %.
    assert describe_excess(sizes, 18) == (
        "\n2 of 20 over 18 (median 10.5, p95 19):\n  20 f20\n  19 f19"
    )
    assert describe_excess(sizes, 20) == ""
