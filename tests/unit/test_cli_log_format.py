"""The option --log-format, and what the end of a command looks like in JSON."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from retinaray import cli, errors
from retinaray.log_format import log_fields

TRAIN = ["train", "model.pth", "--annotations", "train.json"]


@dataclass
class FakeOutcome:
    exit_code: int = 0

    def to_json(self) -> str:
        return '{"map": 0.5}'

    def to_text(self) -> str:
        return "mAP  0.500\n"


class FakeRunner:
    """Logs a line with a run's id, then ends as a test wants."""

    error: BaseException | None = None
    job: object = None

    def run(self, job: object) -> FakeOutcome:
        self.job = job
        with log_fields(run_id="r1"):
            logging.getLogger("retinaray.fake").info("working")
            if self.error is not None:
                raise self.error
        return FakeOutcome()


@pytest.fixture
def runner(
    put_runner: Callable[[Callable[[Any], object]], None], monkeypatch: pytest.MonkeyPatch
) -> FakeRunner:
    fake = FakeRunner()
    put_runner(fake.run)
    monkeypatch.delenv("RETINARAY_LOG_FORMAT", raising=False)
    return fake


@pytest.fixture(autouse=True)
def _no_handlers() -> None:
    logging.getLogger().handlers[:] = []


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    "argv",
    [
        [*TRAIN, "--log-format", "json"],
        [*TRAIN, "--log-format=json"],
        ["train", "--log-format", "json", *TRAIN[1:]],
    ],
)
def test_main_writes_json_lines_when_asked(
    runner: FakeRunner, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    assert cli.main(argv) == 0
    printed = capsys.readouterr()
    assert printed.out == '{"map": 0.5}\n'
    # No table for people in between.
    (line,) = _lines(printed.err)
    assert (line["message"], line["run_id"], line["verb"]) == ("working", "r1", "train")
    assert line["level"] == "INFO"


@pytest.mark.parametrize(("value", "is_json"), [("json", True), ("text", False), ("", False)])
def test_main_takes_the_format_of_the_environment(
    runner: FakeRunner,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    value: str,
    is_json: bool,
) -> None:
    monkeypatch.setenv("RETINARAY_LOG_FORMAT", value)
    assert cli.main(TRAIN) == 0
    assert capsys.readouterr().err.startswith("{") is is_json


def test_main_prefers_the_option_to_the_environment(
    runner: FakeRunner, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETINARAY_LOG_FORMAT", "json")
    assert cli.main([*TRAIN, "--log-format", "text"]) == 0
    assert capsys.readouterr().err.endswith("mAP  0.500\n")


@pytest.mark.parametrize(
    ("argv", "variable", "message"),
    [
        (["--log-format", "xml"], "", "--log-format=xml: expected one of text, json"),
        (["--log-format"], "", "--log-format=: expected one of text, json"),
        ([], "xml", "RETINARAY_LOG_FORMAT=xml: expected one of text, json"),
    ],
)
def test_main_refuses_a_format_that_there_is_not(
    runner: FakeRunner,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    variable: str,
    message: str,
) -> None:
    monkeypatch.setenv("RETINARAY_LOG_FORMAT", variable)
    assert cli.main([*TRAIN, *argv]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}\n")


def test_main_takes_a_file_of_that_name_after_two_dashes(
    runner: FakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--annotations", "a.json", "--print-config", "--", "--log-format"]
    assert cli.main(argv) == 0
    assert "output: --log-format\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.ClusterError("no node left\nnot one"), 1, "no node left\nnot one"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    ],
)
def test_main_ends_in_a_json_line_with_the_runs_id_when_the_run_fails(
    runner: FakeRunner,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    runner.error = error
    assert cli.main([*TRAIN, "--log-format", "json"]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    last = _lines(printed.err)[-1]
    assert (last["level"], last["message"], last["run_id"]) == ("ERROR", message, "r1")
    assert "exception" not in last


def test_main_adds_the_traceback_to_the_json_line_when_verbose(
    runner: FakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.error = errors.ClusterError("no node left")
    assert cli.main([*TRAIN, "--log-format", "json", "-v"]) == 1
    assert _lines(capsys.readouterr().err)[-1]["exception"].startswith("Traceback")


def test_main_reports_wrong_settings_in_a_json_line(
    runner: FakeRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*TRAIN, "--log-format", "json", "--resize", "12"]) == 2
    (line,) = _lines(capsys.readouterr().err)
    assert line["message"] == "data.resize=12 (--resize): expected a whole number from 32 to 8192"
    assert (line["verb"], line["run_id"]) == ("train", None)


def test_configure_logging_writes_warnings_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    cli.configure_logging("normal", "json", verb="train")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old file", UserWarning, stacklevel=1)
    (line,) = _lines(capsys.readouterr().err)
    assert (line["logger"], line["level"]) == ("py.warnings", "WARNING")
    assert "UserWarning: old file" in line["message"]
