from __future__ import annotations

import ast
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from retinaray import __version__, cli, errors
from retinaray.config.nodes import Job

REPOSITORY = Path(__file__).parents[2]
TRAIN = ["train", "model.pth", "--annotations", "train.json"]


@dataclass
class FakeOutcome:
    exit_code: int = 0
    values: dict[str, float] = field(default_factory=lambda: {"map": 0.5})

    def to_json(self) -> str:
        return json.dumps(self.values)

    def to_text(self) -> str:
        return "mAP  0.500\n"


@dataclass
class FakeRunner:
    """Stands for a runner: answers with an outcome, or raises what a test puts in."""

    outcome: FakeOutcome = field(default_factory=FakeOutcome)
    error: BaseException | None = None
    jobs: list[Job] = field(default_factory=list)

    def run(self, job: Job) -> FakeOutcome:
        self.jobs.append(job)
        logging.getLogger("retinaray.fake").info("working")
        logging.getLogger("retinaray.fake").debug("details")
        logging.getLogger("retinaray.fake").warning("odd image")
        if self.error is not None:
            raise self.error
        return self.outcome


@pytest.fixture
def runner(put_runner: Callable[[Callable[[Any], object]], None]) -> FakeRunner:
    """A runner that every verb calls instead of its own."""
    fake = FakeRunner()
    put_runner(fake.run)
    return fake


@pytest.fixture
def minimal(tmp_path: Path) -> dict[str, list[str]]:
    """A valid command line of each verb."""
    (tmp_path / "space.yaml").write_text("space:\n  run.batch: [4, 8]\n", encoding="utf-8")
    truth = ["--annotations", "a.json"]
    space = ["--val-annotations", "v.json", "--config", str(tmp_path / "space.yaml")]
    return {
        "train": ["model.pth", *truth],
        "tune": ["sweep", *truth, *space],
        "evaluate": ["model.pth", *truth],
        "thresholds": ["model.pth", *truth],
        "export": ["model.pth", "model.onnx"],
        "parity": ["model.pth", "model.onnx", "--images", "photos"],
        "bundle": ["model.pth", "handover", "--target", "jetpack6"],
        "infer": ["model.onnx", "--images", "photos"],
        "plan": ["--job", "job.yaml"],
        "report": ["model_run"],
        "anchors": truth,
        "doctor": truth,
        "convert": ["labels", "train.json", "--from", "voc"],
        "import-odtk": ["old.pth", "new.pth"],
        "demo": [],
    }


def test_main_ends_stdout_with_one_line_of_json(
    runner: FakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*TRAIN, "--resize", "600"]) == 0
    printed = capsys.readouterr()
    assert printed.out == '{"map": 0.5}\n'
    assert printed.err.endswith("mAP  0.500\n")
    (job,) = runner.jobs
    assert job.model_dump()["data"]["resize"] == 600


def test_main_hands_on_the_exit_code_of_the_outcome(runner: FakeRunner) -> None:
    runner.outcome = FakeOutcome(exit_code=1)
    assert cli.main(["doctor", "--annotations", "a.json"]) == 1


@pytest.mark.parametrize(
    ("argv", "shown", "hidden"),
    [
        ([], ["INFO working", "WARNING odd image", "mAP"], ["details"]),
        (["-v"], ["DEBUG details", "INFO working", "WARNING odd image", "mAP"], []),
        (["--quiet"], ["WARNING odd image"], ["working", "details", "mAP"]),
        (["--json"], ["INFO working", "WARNING odd image"], ["details", "mAP"]),
    ],
)
def test_main_logs_plain_lines_on_stderr_when_it_is_no_terminal(
    runner: FakeRunner,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    shown: list[str],
    hidden: list[str],
) -> None:
    assert cli.main([*TRAIN, *argv]) == 0
    text = capsys.readouterr().err
    assert all(words in text for words in shown)
    assert not any(words in text for words in hidden)
    assert "\x1b" not in text


def test_configure_logging_replaces_its_handler_when_called_again() -> None:
    before = len(logging.getLogger().handlers)
    cli.configure_logging("normal")
    cli.configure_logging("verbose")
    assert len(logging.getLogger().handlers) == before + 1


@pytest.mark.parametrize(
    ("error", "code"), [(errors.DatasetError("bad"), 2), (errors.ClusterError("bad"), 1)]
)
def test_main_shows_an_expected_error_as_one_message(
    runner: FakeRunner,
    capsys: pytest.CaptureFixture[str],
    error: errors.RetinarayError,
    code: int,
) -> None:
    runner.error = error
    assert cli.main(TRAIN) == code
    printed = capsys.readouterr()
    assert "error: bad\n" in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_main_answers_in_json_alone_whatever_happens(
    runner: FakeRunner,
    capsys: pytest.CaptureFixture[str],
    minimal: dict[str, list[str]],
    verb: str,
) -> None:
    def answer(*argv: str) -> tuple[int, dict[str, object]]:
        code = cli.main([verb, *argv, "--json"])
        printed = capsys.readouterr()
        assert "mAP" not in printed.err
        return code, json.loads(printed.out)

    assert answer(*minimal[verb]) == (0, {"map": 0.5})
    assert answer(*minimal[verb], "--print-config")[0] == 0
    code, options = answer("--help")
    assert code == 0
    assert {"key", "flags", "expected", "default", "help"} <= set(options[0])  # type: ignore[index]
    code, fault = answer(*minimal[verb], "--no-such-option")
    assert (code, fault["exit_code"], fault["error"], fault["verb"]) == (2, 2, "ConfigError", verb)
    runner.error = KeyboardInterrupt()
    code, fault = answer(*minimal[verb])
    assert (code, fault["error"], fault["message"]) == (130, "Interrupted", "stopped by Ctrl-C")


def test_main_ends_with_143_when_a_runner_was_told_to_stop(
    runner: FakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.error = SystemExit(143)
    assert cli.main([*TRAIN, "--json"]) == 143
    printed = capsys.readouterr()
    assert printed.err.endswith("stopped by SIGTERM\n")
    assert json.loads(printed.out)["error"] == "Terminated"


def test_main_leaves_a_json_line_of_a_defect(
    runner: FakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.error = ZeroDivisionError("a defect")
    with pytest.raises(ZeroDivisionError, match="a defect"):
        cli.main([*TRAIN, "--json"])
    assert json.loads(capsys.readouterr().out)["message"] == "a defect"


def test_main_writes_numbers_that_json_lacks_as_null(
    runner: FakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.outcome = FakeOutcome(values={"loss": float("nan"), "best": float("inf"), "n": 3})
    assert cli.main(TRAIN) == 0
    assert capsys.readouterr().out == '{"loss": null, "best": null, "n": 3}\n'


def test_main_shows_the_traceback_of_an_expected_error_when_verbose(
    runner: FakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.error = errors.ClusterError("no node left")
    assert cli.main([*TRAIN, "-v"]) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert text.endswith("error: no node left\n")


def test_main_does_not_swallow_a_defect(runner: FakeRunner) -> None:
    runner.error = ZeroDivisionError("a defect")
    with pytest.raises(ZeroDivisionError, match="a defect"):
        cli.main(TRAIN)


def test_main_exits_with_130_when_interrupted(
    runner: FakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.error = KeyboardInterrupt()
    assert cli.main(TRAIN) == 130
    assert capsys.readouterr().err.endswith("stopped by Ctrl-C\n")


def test_main_lists_all_wrong_settings_and_starts_nothing(
    runner: FakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "m.pth", "--resize", "12", "--bach", "3"]) == 2
    assert runner.jobs == []
    assert capsys.readouterr().err.splitlines() == [
        "error: 3 settings are wrong:",
        "  --bach 3: no such option; nearest: --batch (run.batch)",
        "  data.annotations (--annotations): required, but not given: COCO JSON of the training "
        "set.",
        "  data.resize=12 (--resize): expected a whole number from 32 to 8192",
        "see: retinaray train --help",
    ]


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_main_prints_help_with_exit_codes_for_each_verb(
    runner: FakeRunner, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    assert cli.main([verb, "--help"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"usage: retinaray {verb} ")
    assert cli.EXIT_CODES in printed.out
    assert printed.err == ""
    assert runner.jobs == []


def test_main_prints_the_settings_without_running(
    runner: FakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*TRAIN, "--print-config", "--lr", "0.5"]) == 0
    assert "  peak_lr: 0.5\n" in capsys.readouterr().out
    assert runner.jobs == []


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"]])
def test_main_lists_every_verb_in_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"retinaray {__version__}: ")
    listed = text.partition("commands:\n")[2].partition("\n\n")[0]
    lines = re.findall(r"^  ([a-z-]+) +(\S.*)$", listed, flags=re.MULTILINE)
    assert lines == [(name, verb.help) for name, verb in cli.VERBS.items()]
    assert len(lines) == 15


def test_main_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"retinaray {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], "trian: no such command; expected one of .*; nearest: train$"),
        (["help", "trian"], "trian: no such command; expected one of .*; nearest: train$"),
        (["Train"], "; nearest: train$"),
        (["predict"], "predict: no such command; .*; nearest: infer$"),
        (["zzz"], "zzz: no such command; expected one of .*demo$"),
        (["--master", "host:29500", "train"], "--master: not needed, Ray connects the workers"),
        (["--hlep"], "--hlep: options stand behind the command; nearest: --help$"),
        (["-v", "train", "m.pth"], "-v: options stand .*; write retinaray train -v ...$"),
        (["--batch", "8"], "; write retinaray COMMAND --batch ...$"),
    ],
)
def test_main_refuses_what_is_no_verb(
    capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    first, last = printed.err.splitlines()
    assert re.search(words, first)
    assert last == "see: retinaray --help"
    assert printed.out == ""


def test_main_shows_all_commands_when_none_came(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "  train " in printed.err
    assert "retinaray demo " in printed.err


@pytest.mark.parametrize("word", ["completion", "help"])
def test_main_helps_with_what_is_no_verb(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help", word]) == 0
    assert "retinaray demo " in capsys.readouterr().out


def test_main_takes_json_before_the_verb_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--json", "doctor", "--annotations", "absent.json"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["verb"] == "doctor"


def test_main_helps_with_a_verb_when_asked_by_the_word(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["help", "doctor"]) == 0
    assert capsys.readouterr().out.startswith("usage: retinaray doctor ")


@pytest.mark.parametrize(
    ("argv", "code", "values"),
    [
        (["--version", "--json"], 0, {"version": __version__}),
        (
            ["--help", "--json"],
            0,
            {"version": __version__, "commands": {n: v.help for n, v in cli.VERBS.items()}},
        ),
    ],
)
def test_main_answers_in_json_without_a_verb(
    capsys: pytest.CaptureFixture[str], argv: list[str], code: int, values: dict[str, object]
) -> None:
    assert cli.main(argv) == code
    assert json.loads(capsys.readouterr().out) == values


@pytest.mark.parametrize("argv", [["--json"], ["--json", "trian"], ["trian", "--json"]])
def test_main_refuses_in_json_what_is_no_verb(
    capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    assert cli.main(argv) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "ConfigError"


def test_main_wraps_the_commands_when_the_terminal_is_narrow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "line_width", lambda _: 40)
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out.partition("commands:\n")[2].partition("to begin:")[0]
    assert max(map(len, text.splitlines())) <= 40
    assert " ".join(text.split()).startswith("train train a RetinaNet with Ray Train and keep")


def test_main_reads_the_arguments_of_the_process_when_given_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["retinaray", "--version"])
    assert cli.main() == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_verbs_name_the_job_class_of_the_verb(verb: str) -> None:
    assert cli._import(cli.VERBS[verb].job).verb == verb


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_verbs_name_a_runner_that_exists(verb: str) -> None:
    # Read, not imported: the runners bring torch and ray.
    module, _, name = cli.VERBS[verb].runner.partition(":")
    source = (REPOSITORY / "platform" / module.replace(".", "/")).with_suffix(".py")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the interpreter in the repository, with the package importable and nothing installed."""

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "platform")}
        return subprocess.run(
            [sys.executable, *argv],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_both_doors_read_the_same_job(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    argv = ["m.pth", "--annotations", "a", "--size", "480", "640", "run.seed=3", "--print-config"]
    package = run_python("-m", "retinaray", "train", *argv)
    script = run_python("jobs/train.py", *argv)
    assert (package.returncode, package.stderr) == (0, "")
    assert (script.returncode, script.stderr) == (0, "")
    assert package.stdout == script.stdout
    assert "  seed: 3\n" in script.stdout


def test_main_is_quiet_when_the_reader_of_stdout_has_gone() -> None:
    # A pipe whose reading end is closed before anything is written.
    reading_end, writing_end = os.pipe()
    os.close(reading_end)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "platform")}
    with os.fdopen(writing_end, "wb") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", "retinaray", "--help"],
            env=environment,
            stdout=stdout,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("shell", "sign"), [("bash", "complete -F"), ("zsh", "#compdef"), ("fish", "complete -c")]
)
def test_main_prints_the_completion_of_a_shell(
    shell: str, sign: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert sign in text
    assert "import-odtk" in text


@pytest.mark.parametrize(
    "argv", [["completion", "bash", "--json"], ["--json", "completion", "bash"]]
)
def test_main_prints_the_completion_as_json_when_asked(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert json.loads(printed) == {"shell": "bash", "script": script}


def test_main_refuses_the_completion_of_an_unknown_shell(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["completion", "tcsh"]) == 2
    assert "expected one of bash, zsh, fish, got tcsh" in capsys.readouterr().err
