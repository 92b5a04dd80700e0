"""JSON lines: each record on one line, with the fields of its process."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from retinaray.log_format import (
    JsonFormatter,
    describe_worker_log,
    log_fields,
    make_json_handler,
    start_worker_log,
)

LOGGER = logging.getLogger("retinaray.fake")
Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def _no_handlers() -> None:
    logging.getLogger().handlers[:] = []


@pytest.fixture
def read_lines(capsys: pytest.CaptureFixture[str]) -> Lines:
    """What was written to standard error since the last call; fails on what is no JSON object."""

    def read() -> list[dict[str, Any]]:
        return [json.loads(line) for line in capsys.readouterr().err.splitlines()]

    return read


def _start(**fields: object) -> None:
    logging.getLogger().addHandler(make_json_handler(fields))
    logging.getLogger("retinaray").setLevel(logging.INFO)


def test_json_formatter_writes_time_level_logger_and_message() -> None:
    record = logging.LogRecord("retinaray.x", logging.WARNING, "f", 3, "%d of %s", (2, "é"), None)
    record.created = 1_700_000_000.25
    line = JsonFormatter({"verb": "train"}).format(record)
    assert list(json.loads(line).items()) == [
        # 1,700,000,000 s after 1970 is 2023-11-14 22:13:20 UTC.
        ("time", "2023-11-14T22:13:20.250+00:00"),
        ("level", "WARNING"),
        ("logger", "retinaray.x"),
        ("message", "2 of é"),
        ("run_id", None),
        ("verb", "train"),
    ]
    assert datetime.fromisoformat(json.loads(line)["time"]).tzinfo == UTC
    assert line.isascii()


def test_json_formatter_keeps_a_record_on_one_line_when_it_has_several(read_lines: Lines) -> None:
    _start(verb="train")
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        LOGGER.exception("a\nb\u2028c")
    (line,) = read_lines()
    assert line["message"] == "a\nb\u2028c"
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: first\nsecond")


def test_json_formatter_writes_a_name_that_is_no_utf8_in_ascii() -> None:
    # Not logged: those who collect the output of tests could not pass it on.
    line = JsonFormatter({}).format(logging.makeLogRecord({"msg": "x \udce9"}))
    assert line.isascii()
    assert json.loads(line)["message"] == "x \udce9"


def test_json_formatter_writes_fields_that_json_does_not_know(read_lines: Lines) -> None:
    _start(worker={1})
    LOGGER.info("x")
    assert read_lines()[0]["worker"] == "{1}"


def test_log_fields_are_in_the_lines_of_the_block_only(read_lines: Lines) -> None:
    _start(verb="train")
    LOGGER.info("before")
    with log_fields(run_id="r1", rank=0):
        LOGGER.info("inside")
    LOGGER.info("after")
    assert [(line["message"], line["run_id"], line.get("rank")) for line in read_lines()] == [
        ("before", None, None),
        ("inside", "r1", 0),
        ("after", None, None),
    ]


def _fail_in_run(run_id: str) -> None:
    with log_fields(run_id=run_id):
        raise KeyError(run_id)


def test_log_fields_stay_when_the_block_fails(read_lines: Lines) -> None:
    _start(verb="train")
    with pytest.raises(KeyError, match="r1"):
        _fail_in_run("r1")
    LOGGER.error("why")
    assert read_lines()[0]["run_id"] == "r1"


def test_describe_worker_log_gives_nothing_when_lines_are_plain() -> None:
    logging.getLogger().addHandler(logging.StreamHandler())
    assert describe_worker_log() is None


def test_start_worker_log_writes_as_the_driver_does(read_lines: Lines) -> None:
    _start(verb="train")
    logging.getLogger("retinaray").setLevel(logging.DEBUG)
    with log_fields(run_id="r1"):
        settings = pickle.loads(pickle.dumps(describe_worker_log()))
    # The worker's process, as Ray prepares it: a console, and a higher level.
    logging.getLogger().handlers[:] = [logging.StreamHandler()]
    logging.getLogger("retinaray").setLevel(logging.WARNING)
    start_worker_log(settings, rank=3)
    LOGGER.debug("deep")
    (line,) = read_lines()
    assert (line["message"], line["run_id"], line["verb"]) == ("deep", "r1", "train")
    assert line["rank"] == 3


def test_start_worker_log_leaves_everything_when_the_driver_writes_plain_lines() -> None:
    console = logging.StreamHandler()
    logging.getLogger().handlers[:] = [console]
    start_worker_log(None, rank=3)
    assert logging.getLogger().handlers == [console]


def test_start_worker_log_keeps_one_handler_when_called_again(read_lines: Lines) -> None:
    _start(verb="infer")
    settings = describe_worker_log()
    for worker in ("a:1", "a:2"):
        start_worker_log(settings, worker=worker)
    LOGGER.info("x")
    assert [line["worker"] for line in read_lines()] == ["a:2"]
