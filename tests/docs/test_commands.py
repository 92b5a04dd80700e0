"""Every command of README.md, cluster/README.md and docs/, read by the real parser; none starts."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from retinaray import cli
from retinaray.config.command_line import read_command_line
from retinaray.config.nodes import Job
from retinaray.config.odtk_flags import list_odtk_flags
from retinaray.config.options import OptionTable


@dataclass
class Judge:
    """Stands for every runner: takes a validated job and starts nothing."""

    jobs: list[Job] = field(default_factory=list)
    exit_code: int = 0

    def run(self, job: Job) -> Judge:
        self.jobs.append(job)
        return self

    def to_json(self) -> str:
        return json.dumps({})

    def to_text(self) -> str:
        return "taken\n"


@pytest.fixture
def judge(put_runner: Callable[[Callable[[Any], object]], None]) -> Judge:
    """A runner that every verb calls instead of its own."""
    made = Judge()
    put_runner(made.run)
    return made


@pytest.fixture
def standing_place(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which the files that pages name can be read: those of the repository."""
    for name in ("jobs", "cluster"):
        (tmp_path / name).symlink_to(repository / name, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def find_missing_config(argv: tuple[str, ...]) -> str:
    """The file of `--config` or `--job` when it is not there: an earlier command makes it."""
    for option, value in itertools.pairwise(argv):
        if option in ("--config", "--job") and not Path(value).exists():
            return value
    return ""


def check_spelling(argv: tuple[str, ...]) -> list[str]:
    """Faults of a command line whose settings cannot be completed."""
    job_class = cli._import(cli.VERBS[argv[0]].job)
    line = read_command_line(argv[1:], OptionTable(job_class), list_odtk_flags(argv[0]))
    return line.faults


def test_commands_of_the_page_are_understood(
    page: Any, judge: Judge, standing_place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = list(page.faults)
    for name, text in page.files.items():
        (standing_place / name).write_text(text, encoding="utf-8")
    for command in page.commands:
        argv = command.argv
        if argv is None or command.exit_code == 2:
            continue
        for extra in ((), command.extra):
            whole = (*argv, *extra)
            missing = find_missing_config(whole)
            if missing.startswith(("jobs/", "cluster/")):
                faults.append(f"{command.place}: {missing} is not in the repository")
            elif missing and whole[0] in cli.VERBS:
                faults += [f"{command.place}: {fault}" for fault in check_spelling(whole)]
            elif cli.main(whole) != 0:
                faults.append(f"{command.place}: {' '.join(whole)}\n{capsys.readouterr().err}")
    assert not faults, "\n" + "\n".join(faults)


def test_commands_that_are_expected_to_fail_are_commands(page: Any) -> None:
    wrong = [
        command.place
        for command in page.commands
        if command.exit_code and (command.argv is None or command.argv[0] not in cli.VERBS)
    ]
    assert wrong == []


def test_commands_are_run_or_say_what_they_need(page: Any) -> None:
    # What `make` does is this test run, and the tests of its targets.
    unmarked = [
        f"{command.place}: {command.words[0]}"
        for command in page.commands
        if not command.needs and command.argv is None and not command.is_for_shell
        if command.words[0] != "make"
    ]
    assert unmarked == [], "a line `<!-- needs: cloud -->` before the block says why it is not run"


def test_targets_of_make_are_in_the_makefile(page: Any, repository: Path) -> None:
    makefile = (repository / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    targets |= set(re.search(r"^\.PHONY:(.*)$", makefile, re.MULTILINE)[1].split())
    named = {
        word
        for command in page.commands
        if command.words[0] == "make"
        for word in command.words[1:]
        if "=" not in word
    }
    assert named <= targets


PIP_INSTALL = re.compile(r"\bpip install ([^`&]*)")


def test_pip_installs_what_is_on_an_index_or_in_the_checkout(
    page_name: str, repository: Path
) -> None:
    pyproject = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))
    arguments = " ".join(PIP_INSTALL.findall((repository / page_name).read_text("utf-8")))
    assert "retinaray" not in arguments, "the package is on no index"
    named = {
        extra for group in re.findall(r"\.\[([\w,]+)\]", arguments) for extra in group.split(",")
    }
    assert named <= set(pyproject["project"]["optional-dependencies"])


NAMED_FILE = re.compile(r"(?<![\w./-])(?:jobs|cluster|tests|platform|docs)/[\w./-]*\w")


def test_files_that_the_page_names_are_in_the_repository(page_name: str, repository: Path) -> None:
    text = (repository / page_name).read_text("utf-8")
    missing = [name for name in NAMED_FILE.findall(text) if not (repository / name).exists()]
    assert missing == []


def test_pages_hold_commands_of_every_verb(
    repository: Path, read_text: Callable[[str], Any]
) -> None:
    texts = [path.read_text("utf-8") for path in (repository / "docs").rglob("*.md")]
    texts.append((repository / "README.md").read_text("utf-8"))
    commands = [command for text in texts for command in read_text(text).commands]
    verbs = {command.argv[0] for command in commands if command.argv}
    # `make demo` is `retinaray demo`.
    verbs |= {command.words[1] for command in commands if command.words[:2] == ("make", "demo")}
    assert set(cli.VERBS) - verbs == set()


def test_read_page_reads_words_as_a_shell_does(read_text: Callable[[str], Any]) -> None:
    page = read_text(
        "Text\n\n"
        "<!-- test: --iters 2 run.seed=1 -->\n<!-- expect: exit 1 -->\n"
        "```sh\n# a comment\nretinaray train 'my model.pth' \\\n    --classes 3  # three\n"
        "A=1 retinaray doctor --annotations a.json > found.json && ls\n```\n"
        "```text\nretinaray train ... --lr 1\n```\n```\ncost = price * hours\n```\n"
    )
    assert page.faults == []
    train, doctor, listing = page.commands
    assert train.place == "page.md:7"
    assert train.argv == ("train", "my model.pth", "--classes", "3")
    assert (train.extra, train.exit_code) == (("--iters", "2", "run.seed=1"), 1)
    assert doctor.argv == ("doctor", "--annotations", "a.json")
    assert (doctor.extra, doctor.output, doctor.environment) == ((), "found.json", (("A", "1"),))
    assert (listing.words, listing.argv) == (("ls",), None)


@pytest.mark.parametrize(
    ("line", "argv"),
    [
        ("python -m retinaray plan", ("plan",)),
        (".venv/bin/retinaray demo", ("demo",)),
        ("python jobs/infer.py a.onnx --gpus 8", ("infer", "a.onnx", "--gpus", "8")),
        (
            "ray job submit --working-dir . -- python jobs/tune.py --trials 4",
            ("tune", "--trials", "4"),
        ),
        ("source <(retinaray completion bash)", ("completion", "bash")),
        ("python tests/benchmarks/run.py decode", None),
        ("ray job submit --working-dir . -- python other.py", None),
    ],
)
def test_read_page_finds_retinaray_however_it_is_started(
    read_text: Callable[[str], Any], line: str, argv: tuple[str, ...] | None
) -> None:
    assert read_text(f"```sh\n{line}\n```\n").commands[-1].argv == argv


def test_read_page_takes_untagged_blocks_for_commands_when_they_begin_with_one(
    read_text: Callable[[str], Any],
) -> None:
    page = read_text("```\n# first\nmake demo\n```\n```\nnodes: 3\n```\n")
    assert [command.words for command in page.commands] == [("make", "demo")]


def test_read_page_appends_arguments_to_one_verb_only(read_text: Callable[[str], Any]) -> None:
    block = "```sh\nretinaray train a.pth\nretinaray report a_run\nretinaray train b.pth\n```\n"
    commands = read_text(f"<!-- test: --iters 2 -->\n{block}").commands
    assert [command.extra for command in commands] == [("--iters", "2"), (), ("--iters", "2")]
    named = "<!-- test report: --gallery 1 -->\n<!-- test: --iters 2 -->\n"
    commands = read_text(named + block).commands
    assert [command.extra for command in commands][1] == ("--gallery", "1")


@pytest.mark.parametrize(
    "line",
    [
        "retinaray convert SOURCE [--images DIR]",
        "retinaray train ... --lr 1",
        "versions: retinaray 1",
        "see: retinaray train --help",
    ],
)
def test_read_page_lets_text_show_a_synopsis(read_text: Callable[[str], Any], line: str) -> None:
    page = read_text(f"```text\n{line}\n```\n")
    assert (page.faults, page.commands) == ([], [])


def test_read_page_takes_the_block_above_for_a_file(read_text: Callable[[str], Any]) -> None:
    text = (
        "```yaml\na: 1\n```\n<!-- setup: s.yaml -->\n```sh\nretinaray tune --config s.yaml\n```\n"
    )
    page = read_text(text)
    assert (page.faults, page.files) == ([], {"s.yaml": "a: 1\n"})


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<!-- needs: moon -->\n```sh\nls\n```", "page.md:1: needs: moon: expected one of"),
        ("<!-- need: gpu -->\n```sh\nls\n```", "page.md:1: `need: gpu` directs nothing"),
        ("<!-- expect: failure -->\n```sh\nls\n```", "`expect: failure` directs nothing"),
        ("<!-- test: --iters 2 -->\n```sh\nls\n```", "`test: --iters 2` directs nothing"),
        ("<!-- test tune: -v -->\n```sh\nretinaray demo\n```", "test tune: no such command"),
        ("<!-- needs: gpu -->\nText.\n```sh\nls\n```", "`needs:` stands directly before no block"),
        ("<!-- needs: gpu -->", "`needs:` stands directly before no block"),
        ("<!-- needs: gpu -->\n```text\nls\n```", "`needs:` stands directly before no block"),
        ("<!-- setup: a.yaml -->\n```sh\nls\n```", "setup: a.yaml: expected"),
        ("```bash\nls\n```", "page.md:2: commands are tagged sh, not bash"),
        ("```sh\nfrobnicate now\n```", "page.md:2: frobnicate: a program that no page has used"),
        ("```sh\nls 'a\n```", "page.md:2: no shell reads this"),
        (
            "```text\nAP 0.5\nretinaray train a.pth --objective AP\n```",
            "page.md:3: a command that no test reads; tag its block sh",
        ),
    ],
)
def test_read_page_names_what_is_wrong(
    read_text: Callable[[str], Any], text: str, fault: str
) -> None:
    faults = read_text(text).faults
    assert len(faults) == 1
    assert fault in faults[0]


def test_commands_with_a_wrong_option_are_found(
    judge: Judge, standing_place: Path, read_text: Callable[[str], Any]
) -> None:
    commands = read_text(
        "```sh\nretinaray train a.pth --annotations a.json --bach 3\n"
        "retinaray train a.pth --annotations a.json --config absent.yaml --bach 3\n```\n"
    ).commands
    assert cli.main(commands[0].argv) == 2
    assert judge.jobs == []
    assert find_missing_config(commands[1].argv) == "absent.yaml"
    assert check_spelling(commands[1].argv) == [
        "--bach 3: no such option; nearest: --batch (run.batch)"
    ]
