"""Nothing that is committed knows the machine it was written on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

# Homes of people and of build machines. The users of public images (Ray's, Ubuntu's on AWS) are no
# secret, and /tmp is on every machine.
MACHINE_PATH = re.compile(
    r"(?<![\w.:}*-])/(?:(?:root|work|Users|builds)/\w|home/(?!ray\b|ubuntu\b)\w)|[A-Z]:\\Users\\"
)


def find_machine_paths(text: str) -> list[str]:
    """The lines of a text that hold an absolute path of one machine, numbered."""
    return [
        f"{number}: {line.strip()[:100]}"
        for number, line in enumerate(text.splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]


def test_tracked_files_hold_no_paths_of_a_machine(
    repository: Path, list_git_files: Callable[..., list[Path]]
) -> None:
    files = list_git_files()
    assert Path("pyproject.toml") in files
    faults = [
        f"{path}:{fault}"
        for path in files
        if b"\0" not in (content := (repository / path).read_bytes())[:8192]
        for fault in find_machine_paths(content.decode("utf-8", errors="replace"))
    ]
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize("folder", ["root", "work", "Users", "builds", "home"])
@pytest.mark.parametrize("before", ["", "see ", '"', "file://", "PYTHONPATH=", "(", "a:b,"])
def test_find_machine_paths_sees_absolute_paths(folder: str, before: str) -> None:
    assert find_machine_paths(f"first\n{before}/{folder}/anna/x.py") != []


@pytest.mark.parametrize(
    "line",
    [
        "s3://bucket/work/train.json",
        "https://example.org/root/x",
        "platform/work/x and ./home/x and ../root/x",
        "/tmp/ray and /mnt/shared and /data/x",
        "/home/ray/model.pth and /home/ubuntu/x",
        "chroot/root/x",
        "{bucket}/work/x",
    ],
)
def test_find_machine_paths_leaves_other_paths_alone(line: str) -> None:
    assert find_machine_paths(line) == []
