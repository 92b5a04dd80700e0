"""What is drawn, what is coloured and how wide a line is, by stream and environment."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import pty
import re
import struct
import sys
import termios

import pytest
from rich.logging import RichHandler

from retinaray.terminal import (
    LOG_HANDLER,
    configure_logging,
    find_console,
    has_colors,
    is_drawable,
    line_width,
    write_to,
)

LOGGER = logging.getLogger("retinaray.fake")


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    logging.getLogger().handlers[:] = []


@pytest.mark.parametrize(
    ("stream", "changes", "drawn", "colored"),
    [
        (Screen(), {}, True, True),
        (Screen(), {"NO_COLOR": "1"}, True, False),
        (Screen(), {"NO_COLOR": ""}, True, True),
        (Screen(), {"TERM": "dumb"}, False, False),
        (Screen(), {"TERM": "unknown"}, False, False),
        (Screen(), {"TERM": "dumb", "FORCE_COLOR": "1"}, False, True),
        (io.StringIO(), {}, False, False),
        (io.StringIO(), {"FORCE_COLOR": "1"}, False, True),
        (io.StringIO(), {"FORCE_COLOR": "0"}, False, False),
        (io.StringIO(), {"FORCE_COLOR": ""}, False, False),
        (io.StringIO(), {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_is_drawable_and_has_colors_go_by_stream_and_environment(
    monkeypatch: pytest.MonkeyPatch,
    stream: io.StringIO,
    changes: dict[str, str],
    drawn: bool,
    colored: bool,
) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    assert (is_drawable(stream), has_colors(stream)) == (drawn, colored)


def test_line_width_has_no_limit_off_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert line_width(io.StringIO()) is None


@pytest.mark.parametrize(("columns", "width"), [("40", 40), ("0", None), ("wide", None)])
def test_line_width_takes_columns_and_survives_a_terminal_without_a_size(
    monkeypatch: pytest.MonkeyPatch, columns: str, width: int | None
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert line_width(Screen()) == width


def test_line_width_is_that_of_the_terminal() -> None:
    master, slave = pty.openpty()
    try:
        with os.fdopen(slave, "w") as stream:
            assert line_width(stream) is None
            # struct winsize: rows, columns, and pixels that nobody fills in.
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 57, 0, 0))
            assert line_width(stream) == 57
    finally:
        os.close(master)


def test_configure_logging_shares_its_console_with_the_bars(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", Screen())
    configure_logging("normal")
    handler = logging.getLogger().handlers[-1]
    assert isinstance(handler, RichHandler)
    assert find_console() is handler.console
    assert find_console().is_terminal


@pytest.mark.parametrize(
    ("verbosity", "log_format"), [("quiet", "text"), ("normal", "json")], ids=["quiet", "json"]
)
def test_find_console_draws_nothing_when_nobody_wants_to_see_it(
    monkeypatch: pytest.MonkeyPatch, verbosity: str, log_format: str
) -> None:
    monkeypatch.setattr(sys, "stderr", Screen())
    configure_logging(verbosity, log_format)  # type: ignore[arg-type]
    assert not find_console().is_terminal


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_find_console_draws_nothing_into_a_pipe(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    logging.getLogger("retinaray").setLevel(logging.INFO)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not find_console().is_terminal


def test_find_console_draws_for_a_program_without_a_log_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logging.getLogger("retinaray").setLevel(logging.INFO)
    monkeypatch.setattr(sys, "stderr", Screen())
    assert find_console().is_terminal


@pytest.mark.parametrize(("columns", "has_time"), [("100", True), ("50", False)])
def test_configure_logging_leaves_the_time_out_when_the_terminal_is_narrow(
    monkeypatch: pytest.MonkeyPatch, columns: str, has_time: bool
) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("NO_COLOR", "1")
    configure_logging("normal")
    LOGGER.info("working")
    # Colours are numbers from 30 on; dim text is none.
    assert "\x1b[3" not in screen.getvalue()
    plain = re.sub(r"\x1b\[\d+m", "", screen.getvalue())
    assert plain.startswith("[") is has_time
    assert "working" in plain


@pytest.mark.parametrize(
    ("color", "level"), [("1", " \x1b[33mWARNING\x1b[0m "), ("0", " WARNING ")]
)
def test_configure_logging_colours_the_level_in_a_pipe_when_forced(
    monkeypatch: pytest.MonkeyPatch, color: str, level: str
) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    monkeypatch.setenv("FORCE_COLOR", color)
    configure_logging("normal")
    LOGGER.warning("odd %s", "image")
    LOGGER.info("working")
    first, second = pipe.getvalue().splitlines()
    assert first.endswith(f"{level}odd image")
    assert second.endswith(" INFO working")


def test_configure_logging_writes_plain_lines_to_a_dumb_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "dumb")
    configure_logging("normal")
    LOGGER.warning("odd image")
    assert screen.getvalue().endswith(" WARNING odd image\n")
    assert "\x1b" not in screen.getvalue()
    assert logging.getLogger().handlers[-1].get_name() == LOG_HANDLER


def test_write_to_goes_on_when_the_reader_has_gone() -> None:
    reading_end, writing_end = os.pipe()
    os.close(reading_end)
    with os.fdopen(writing_end, "w") as stream:
        write_to(stream, "first\n")
        write_to(stream, "second\n")
        assert not stream.closed
