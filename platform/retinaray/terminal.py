"""What a person's terminal can show: bars, colours, plain lines, or nothing any more.

Bars and cursor movements go to a terminal only, and never to TERM=dumb. Colours go there too, and
elsewhere when FORCE_COLOR asks for them; NO_COLOR takes them everywhere. It knows no command.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from retinaray.log_format import LogFormat

Verbosity = Literal["quiet", "normal", "verbose"]
LOG_HANDLER = "retinaray-cli"
"""Name of the handler that writes a command's log."""

_DUMB = ("dumb", "unknown")
_NARROWEST_WITH_TIME = 60
_COLORS = {logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "31"}


def is_drawable(stream: TextIO) -> bool:
    """Whether bars can be drawn there: it is a terminal, and one that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in _DUMB


def has_colors(stream: TextIO) -> bool:
    """Whether colours are wanted there.

    NO_COLOR, if it is not empty, says no. FORCE_COLOR, if it is neither empty nor 0, says yes, also
    for a pipe. Without both a terminal that is not dumb has them.
    """
    if os.environ.get("NO_COLOR"):
        return False
    return os.environ.get("FORCE_COLOR", "") not in ("", "0") or is_drawable(stream)


def line_width(stream: TextIO | None = None) -> int | None:
    """Characters that fit into a line.

    Args:
        stream: Where the line goes; None = standard error.

    Returns:
        Columns of the terminal, or what COLUMNS says of it; None = any number, as in a pipe.
    """
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        return None
    told = os.environ.get("COLUMNS", "")
    if told.isdecimal() and int(told) > 0:
        return int(told)
    try:
        # Terminals that do not know their size say 0.
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):
        return None


def make_console() -> Console:
    """Standard error as rich draws on it; `is_terminal` says whether anything may be drawn."""
    from rich.console import Console

    return Console(
        stderr=True,
        force_terminal=is_drawable(sys.stderr),
        no_color=not has_colors(sys.stderr),
        # rich knows COLUMNS, too; but not that a terminal may not know its size.
        width=line_width(),
    )


def find_console() -> Console:
    """The console to draw a bar on: the log's own, so that lines stand above the bar.

    One that draws nothing where the log is JSON, plain lines, or without information (--quiet).
    """
    from rich.console import Console
    from rich.logging import RichHandler

    handlers = [entry for entry in logging.getLogger().handlers if entry.get_name() == LOG_HANDLER]
    is_quiet = not logging.getLogger("retinaray").isEnabledFor(logging.INFO)
    for handler in handlers:
        if isinstance(handler, RichHandler) and not is_quiet:
            return handler.console
    # A program that has set up no log of ours may still draw.
    return Console(stderr=True, force_terminal=False) if handlers or is_quiet else make_console()


def configure_logging(
    verbosity: Verbosity, log_format: LogFormat = "text", *, verb: str = ""
) -> None:
    """Send the log to stderr: drawn on a terminal, as plain lines elsewhere, or as JSON.

    Args:
        verbosity: "quiet" shows warnings and errors, "normal" also retinaray's information,
            "verbose" also its debugging lines. Other packages log warnings and errors only.
        log_format: "json" writes one object per line, on a terminal too, also for what Python's
            `warnings` says.
        verb: The command, for the JSON lines.
    """
    if log_format == "json":
        from retinaray.log_format import make_json_handler

        handler = make_json_handler({"verb": verb})
        logging.captureWarnings(True)
    else:
        handler = _make_handler()
    handler.set_name(LOG_HANDLER)
    root = logging.getLogger()
    for earlier in [entry for entry in root.handlers if entry.get_name() == LOG_HANDLER]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    levels = {"quiet": logging.WARNING, "normal": logging.INFO, "verbose": logging.DEBUG}
    logging.getLogger("retinaray").setLevel(levels[verbosity])


def _make_handler() -> logging.Handler:
    if is_drawable(sys.stderr):
        from rich.logging import RichHandler

        console = make_console()
        return RichHandler(
            console=console,
            show_path=False,
            show_time=console.width >= _NARROWEST_WITH_TIME,
            log_time_format="[%X]",
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter(is_colored=has_colors(sys.stderr)))
    return handler


def write_to(stream: TextIO, text: str) -> None:
    """Write and flush; a reader that has gone away, as `head` does, is no failure."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        # Python flushes its streams once more at exit and would complain then.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class _LineFormatter(logging.Formatter):
    def __init__(self, *, is_colored: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._is_colored = is_colored

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        color = _COLORS.get(record.levelno)
        if not self._is_colored or color is None:
            return line
        level = record.levelname
        return line.replace(f" {level} ", f" \x1b[{color}m{level}\x1b[0m ", 1)
