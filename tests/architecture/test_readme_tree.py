"""The tree in README.md names every file, and only files that exist."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

LISTED_IN_FULL = ("platform/retinaray", "jobs", "cluster")
# They say nothing of their own; listing them is allowed.
MAY_BE_LEFT_OUT = {"__init__.py", "py.typed"}

_CONNECTORS = "│├└─| \t`+-"


class TreeError(Exception):
    """README.md has no tree that can be read."""


def read_tree(readme: str) -> dict[str, str]:
    """Paths of the tree with their descriptions.

    The tree is the first fenced block after a heading `Tree`. A line is connectors, a name or path,
    blanks, a description; it lies in the nearest line above that begins further left. Lines without
    a name, and the line "." or "./" for the repository itself, are passed over.
    """
    heading = re.search(r"^#+[ \t]+Tree[ \t]*$", readme, re.MULTILINE | re.IGNORECASE)
    if heading is None:
        raise TreeError("README.md: expected a heading `## Tree`, found none; add it with the tree")
    block = re.search(r"^```[^\n]*\n(.*?)^```", readme[heading.end() :], re.MULTILINE | re.DOTALL)
    if block is None:
        raise TreeError("README.md: expected a fenced block (```) after `## Tree`, found none")
    paths: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in block.group(1).splitlines():
        entry = line.lstrip(_CONNECTORS)
        name, _, description = entry.partition(" ")
        if not name or name in (".", "./"):
            continue
        column = len(line.expandtabs(4)) - len(entry.expandtabs(4))
        while parents and parents[-1][0] >= column:
            parents.pop()
        path = "/".join([*(parent for _, parent in parents[-1:]), name.strip("/")])
        path = path.removeprefix("./")
        if path in paths:
            raise TreeError(f"README.md: the tree lists {path} twice")
        paths[path] = description.strip()
        parents.append((column, path))
    return paths


@pytest.fixture
def tree(repository: Path) -> dict[str, str]:
    """The tree of README.md."""
    readme = repository / "README.md"
    if not readme.is_file():
        pytest.fail("README.md: expected at the root with a heading `## Tree`, found no file")
    return read_tree(readme.read_text("utf-8"))


def test_tree_lists_every_file(
    tree: dict[str, str], list_git_files: Callable[..., list[Path]]
) -> None:
    files = {
        path.as_posix()
        for path in list_git_files("--cached", "--others", "--exclude-standard", *LISTED_IN_FULL)
        if path.name not in MAY_BE_LEFT_OUT
    }
    missing = sorted(files - set(tree))
    assert not missing, "README.md: the tree lacks a line for\n  " + "\n  ".join(missing)


def test_tree_lists_only_what_exists(tree: dict[str, str], repository: Path) -> None:
    surplus = sorted(path for path in tree if not (repository / path).exists())
    assert not surplus, "README.md: the tree lists what does not exist:\n  " + "\n  ".join(surplus)


def test_tree_describes_every_file(tree: dict[str, str], repository: Path) -> None:
    silent = sorted(
        path
        for path, description in tree.items()
        if not description and (repository / path).is_file()
    )
    assert not silent, "README.md: the tree says nothing about\n  " + "\n  ".join(silent)


def test_read_tree_joins_names_when_drawn_with_lines() -> None:
    readme = """# A project
## Tree
Words before the block.
```text
.
├── platform/                 a source root
│   └── retinaray/            the package
│       ├── errors.py         the exceptions
│       │
│       ├── data/
│       │   ├── coco.py  reads COCO
│       │   └── schema.yaml
│       └── cli.py            the command
├── jobs/configs/infer.yaml   a job
└── Makefile
```
## Next
"""
    assert read_tree(readme) == {
        "platform": "a source root",
        "platform/retinaray": "the package",
        "platform/retinaray/errors.py": "the exceptions",
        "platform/retinaray/data": "",
        "platform/retinaray/data/coco.py": "reads COCO",
        "platform/retinaray/data/schema.yaml": "",
        "platform/retinaray/cli.py": "the command",
        "jobs/configs/infer.yaml": "a job",
        "Makefile": "",
    }


@pytest.mark.parametrize(
    "block",
    [
        "platform/\n└── retinaray/\n    ├── errors.py  a\n    └── cli.py  b\njobs/train.py  c",
        "platform/\n  retinaray/\n    errors.py  a\n    cli.py  b\njobs/train.py  c",
        "platform/\n`-- retinaray/\n    |-- errors.py a\n    +-- cli.py b\njobs/train.py  c",
        "./\n+-- platform/retinaray/\n|   +-- errors.py\ta\n|   +-- cli.py b\n+-- jobs/train.py c",
    ],
    ids=["roots", "indented", "ascii", "folded"],
)
def test_read_tree_accepts_other_drawings(block: str) -> None:
    found = read_tree(f"## Tree\n\n```\n{block}\n```\n".replace("\t", "  "))
    assert {path: text for path, text in found.items() if text} == {
        "platform/retinaray/errors.py": "a",
        "platform/retinaray/cli.py": "b",
        "jobs/train.py": "c",
    }


@pytest.mark.parametrize(
    ("readme", "message"),
    [
        ("# A project\n", "expected a heading `## Tree`"),
        ("## Tree\nno block\n", "expected a fenced block"),
        ("## Tree\n```\njobs/train.py  a\njobs/train.py  b\n```\n", "jobs/train.py twice"),
    ],
)
def test_read_tree_says_what_is_missing(readme: str, message: str) -> None:
    with pytest.raises(TreeError, match=message):
        read_tree(readme)
