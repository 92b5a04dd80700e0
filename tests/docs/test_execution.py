"""The pages as a reader follows them: their commands one after another, in one fresh folder each.

What a page's directives leave out is left out here. One local Ray serves all pages.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from retinaray import cli

pytestmark = pytest.mark.local_ray

# Needs neither Ray nor a model.
SHORT_PAGE = "docs/explanation/anchors.md"
# They bring about what later commands need.
RUN_BY_SHELL = ("cat", "cp", "head", "ls", "mkdir", "mv", "python", "rm", "tail", "unzip")


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("retinaray")
    handlers, level = list(root.handlers), own.level
    yield
    root.handlers[:] = handlers
    own.setLevel(level)


@pytest.fixture
def follow(
    page_folder: Path,
    prepare: Callable[..., tuple[str, ...]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Any], list[tuple[str, dict[str, Any]]]]:
    """Run the commands of a page; gives verb and JSON line of each that ended well."""

    def run(page: Any) -> list[tuple[str, dict[str, Any]]]:
        done = []
        for command in page.commands:
            if command.needs:
                continue
            more = prepare(command, page)
            if command.argv is None:
                if command.words[0] in RUN_BY_SHELL:
                    run_in_shell(command.words, page_folder)
                continue
            capsys.readouterr()
            argv = [*command.argv, *command.extra, *more]
            with monkeypatch.context() as patch:
                for name, value in command.environment:
                    patch.setenv(name, value)
                code = cli.main(argv)
            heard = capsys.readouterr()
            said = f"{command.place}: retinaray {' '.join(argv)}\n{heard.err[-3000:]}"
            assert code == command.exit_code, said
            if command.output:
                (page_folder / command.output).write_text(heard.out, encoding="utf-8")
            if code != 2 and argv[0] in cli.VERBS and "--print-config" not in argv:
                done.append((argv[0], json.loads(heard.out.splitlines()[-1])))
        return done

    return run


def run_in_shell(words: tuple[str, ...], folder: Path) -> None:
    program = sys.executable if words[0] == "python" else words[0]
    answer = subprocess.run(
        [program, *words[1:]], cwd=folder, env=os.environ, capture_output=True, check=False
    )
    assert answer.returncode == 0, (words, answer.stderr.decode())


def test_short_page_does_what_it_says(
    follow: Callable[..., Any], read_file: Callable[[str], Any]
) -> None:
    page = read_file(SHORT_PAGE)
    done = follow(page)
    assert [verb for verb, _ in done] == [c.argv[0] for c in page.commands if c.argv]
    assert all(line for _, line in done)


@pytest.mark.slow
def test_page_does_what_it_says(
    page: Any, ray_cluster: object, follow: Callable[..., Any], list_keys: Callable[[str], set[str]]
) -> None:
    done = follow(page)
    expected = [c for c in page.commands if c.argv and not c.needs and c.exit_code != 2]
    assert len(done) == len([c for c in expected if "--print-config" not in c.argv])
    unsaid = {verb: keys for verb, line in done if (keys := set(line) - list_keys(verb))}
    assert unsaid == {}, "docs/hooks/contracts.py does not know these keys"


@pytest.mark.slow
def test_wrong_page_is_noticed(follow: Callable[..., Any], read_text: Callable[[str], Any]) -> None:
    absent = "```sh\nretinaray doctor --annotations absent.json\n```\n"
    with pytest.raises(AssertionError, match=r"page\.md:2: retinaray doctor"):
        follow(read_text(absent))
    assert follow(read_text(f"<!-- expect: exit 2 -->\n{absent}")) == []
