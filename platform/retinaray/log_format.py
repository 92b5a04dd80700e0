"""The log as JSON: one object per line, with what tells runs and workers apart.

Knows neither jobs nor Ray. What all lines of a process share (run_id, verb, rank, ...) is kept in
the formatter; without a JSON formatter every function here does nothing, so that callers need not
ask which format was chosen.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["text", "json"]
FORMATS: tuple[LogFormat, ...] = ("text", "json")
VARIABLE = "RETINARAY_LOG_FORMAT"
"""Environment variable with the format where no option names one."""


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object in ASCII, without line breaks.

    Keys: time (UTC, ISO 8601), level, logger, message, run_id (null before there is a run), the
    other fields, and exception (the traceback) where there is one.

    Args:
        fields: What every line has besides.
    """

    def __init__(self, fields: Mapping[str, object]) -> None:
        super().__init__()
        self.fields: dict[str, object] = {"run_id": None, **fields}

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self.fields,
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


@dataclass(frozen=True)
class WorkerLog:
    """How the workers of this process shall log; travels to them.

    Attributes:
        level: Least level of retinaray's own records.
        fields: What every line of theirs has.
    """

    level: int
    fields: Mapping[str, object]


@contextmanager
def log_fields(**fields: object) -> Iterator[None]:
    """Add fields to every JSON line of this process while the block runs.

    They stay when the block fails, so that the line about the failure has them too.
    """
    formatters = _find_formatters()
    before = [dict(formatter.fields) for formatter in formatters]
    for formatter in formatters:
        formatter.fields |= fields
    yield
    for formatter, old in zip(formatters, before, strict=True):
        formatter.fields = old


def describe_worker_log() -> WorkerLog | None:
    """What workers need to log as this process does; None when it does not log JSON."""
    formatters = _find_formatters()
    if not formatters:
        return None
    level = logging.getLogger("retinaray").getEffectiveLevel()
    return WorkerLog(level, dict(formatters[0].fields))


def start_worker_log(settings: WorkerLog | None, **fields: object) -> None:
    """Log as the driver does, from here on; called once at a worker's start.

    The lines go to standard error, which Ray keeps in the session's worker-*.err; Ray's plain lines
    for the same records go, its files stay.

    Args:
        settings: Of the driver; None leaves this process's log as it is.
        fields: What tells this worker apart: worker, rank.
    """
    if settings is None:
        return
    root = logging.getLogger()
    for handler in [entry for entry in root.handlers if _writes_to_console(entry)]:
        root.removeHandler(handler)
    root.addHandler(make_json_handler({**settings.fields, **fields}))
    logging.getLogger("retinaray").setLevel(settings.level)


def make_json_handler(fields: Mapping[str, object]) -> logging.Handler:
    """A handler that writes JSON lines to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(fields))
    return handler


def _find_formatters() -> list[JsonFormatter]:
    formatters = (handler.formatter for handler in logging.getLogger().handlers)
    return [formatter for formatter in formatters if isinstance(formatter, JsonFormatter)]


def _writes_to_console(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not isinstance(
        handler, logging.FileHandler
    )
