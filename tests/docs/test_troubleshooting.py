"""No entry of the troubleshooting page is about a message that the program no longer has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

HEADING = re.compile(r"^#{2,4} `(.+)`\s*$", re.MULTILINE)
PLACEHOLDER = re.compile(r"<[^<>]+>|\.\.\.")
# A message is recognised by more than a word.
SHORTEST_FIXED = 8
HOLE = "\0"


def collect_texts(source: str) -> list[str]:
    """Every string of a module; the holes of f-strings are NUL, neighbours are joined."""
    texts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr | ast.BinOp | ast.Constant):
            text = join_text(node)
            if text:
                texts.append(text)
    return texts


def join_text(node: ast.AST) -> str:
    """The text of an expression; empty when it is none."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(join_text(value) or HOLE for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = join_text(node.left), join_text(node.right)
        return f"{left or HOLE}{right or HOLE}" if left or right else ""
    return ""


def is_said(heading: str, texts: list[str]) -> bool:
    """Whether one string holds all that is fixed in a heading, in its order."""
    parts = PLACEHOLDER.split(heading)
    return len("".join(parts)) >= SHORTEST_FIXED and any(has_all(text, parts) for text in texts)


def has_all(text: str, parts: list[str]) -> bool:
    """Whether the parts stand in a text one behind the other."""
    place = 0
    for part in parts:
        found = text.find(part, place)
        if found < 0:
            return False
        place = found + len(part)
    return True


@pytest.fixture(scope="module")
def texts(repository: Path) -> list[str]:
    """Every string of the package and of the job scripts."""
    return [
        text
        for folder in ("platform/retinaray", "jobs")
        for path in (repository / folder).rglob("*.py")
        for text in collect_texts(path.read_text("utf-8"))
    ]


def test_headings_are_messages_of_the_program(repository: Path, texts: list[str]) -> None:
    page = (repository / "docs" / "troubleshooting.md").read_text("utf-8")
    headings = HEADING.findall(page)
    assert len(headings) >= 30
    lost = [heading for heading in headings if not is_said(heading, texts)]
    assert not lost, "no string of the program holds\n  " + "\n  ".join(lost)


def test_headings_occur_once(repository: Path) -> None:
    page = (repository / "docs" / "troubleshooting.md").read_text("utf-8")
    headings = HEADING.findall(page)
    assert len(headings) == len(set(headings))


def test_collect_texts_joins_what_python_joins() -> None:
    source = 'a = f"{n} of {m} boxes " f"are lost" "; drop"\nb = "one " + f"and {x}"\nc = f"{x}"'
    texts = collect_texts(source)
    assert f"{HOLE} of {HOLE} boxes are lost; drop" in texts
    assert f"one and {HOLE}" in texts
    assert "c" not in texts


@pytest.mark.parametrize(
    ("heading", "is_found"),
    [
        ("<file>: expected a file written by <program>", True),
        ("<file>: expected a <kind> written by retinaray, but", True),
        ("expected a file ... by retinaray", True),
        ("<file>: expected a folder written by", False),
        ("<file>: written by <program>, expected a file", False),
        ("<a> by <b>", False),
    ],
)
def test_is_said_wants_all_parts_in_one_string(heading: str, is_found: bool) -> None:
    texts = [f"{HOLE}: expected a file written by retinaray, but", "folder written by"]
    assert is_said(heading, texts) == is_found
