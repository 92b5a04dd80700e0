"""How a command ends when it does not end well: its exit code, and what is said to whom.

Knows no command. A fault that a person can mend is told in words; a defect keeps its traceback.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from retinaray.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    ImageError,
    RetinarayError,
    UnreadableFileError,
)
from retinaray.path_hints import hint_at_error
from retinaray.terminal import configure_logging, write_to

if TYPE_CHECKING:
    from retinaray.log_format import LogFormat
    from retinaray.terminal import Verbosity

FAILED = 1
NOTHING_TO_RUN = 2
INTERRUPTED = 130
TERMINATED = 143
EXIT_CODES = """\
exit codes:
  0    done
  1    the job failed (cluster, storage, export, runtime, disk, memory), or doctor, plan or parity
       found faults, or infer could not read a single image
  2    nothing to run: wrong settings, or an input that cannot be read
  130  stopped by Ctrl-C
  143  stopped by SIGTERM

output:
  The last line of stdout is one JSON object; everything else goes to stderr. --json leaves the
  tables out and writes a JSON object when the command fails, too (verb, exit_code, error, message).
  --log-format json (or RETINARAY_LOG_FORMAT=json) makes each line of stderr a JSON object, too.
  Bars and colours are for terminals: NO_COLOR=1 takes the colours, FORCE_COLOR=1 gives them to a
  pipe, TERM=dumb takes both."""

_USERS_INPUT = (ConfigError, DatasetError, CheckpointError, ImageError, UnreadableFileError)
# What the machine refuses, as opposed to what a program does wrong with files.
_MACHINE_FAULTS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOMEM),
        *(errno.EMFILE, errno.ENFILE, errno.EFBIG),
    }
)
_PATH_FAULTS = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG}
)
_NO_MEMORY = (
    *("out of memory", "can't allocate memory", "cannot allocate memory", "std::bad_alloc"),
    "failed to map segment",
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fault:
    """Why a command ends.

    Attributes:
        exit_code: As in `EXIT_CODES`.
        kind: What machines go by: the class of the error, "Interrupted" or "Terminated".
        text: What a person reads.
    """

    exit_code: int
    kind: str
    text: str


def judge_error(error: BaseException, *, stopped_by: int | None = None) -> Fault | None:
    """What ends a command by this error; None where it is a defect of the program.

    Args:
        error: What left the command.
        stopped_by: Signal that the process got, if any: what it cuts short may fail in many ways.
    """
    if stopped_by == signal.SIGINT or _is_interrupted(error):
        return Fault(INTERRUPTED, "Interrupted", "stopped by Ctrl-C")
    is_ours = isinstance(error, SystemExit) and error.code == TERMINATED
    if stopped_by == signal.SIGTERM or is_ours:
        return Fault(TERMINATED, "Terminated", "stopped by SIGTERM")
    kind = type(error).__name__
    if isinstance(error, RetinarayError):
        is_input = isinstance(error, _USERS_INPUT)
        hint = hint_at_error(error)
        text = f"{error}; {hint}" if hint else str(error)
        return Fault(NOTHING_TO_RUN if is_input else FAILED, kind, text)
    if _is_about_memory(error):
        return Fault(
            FAILED,
            kind,
            f"not enough memory ({_first_line(error)}): lower --batch, the size of the images "
            "(--resize, --max-size, --size) or --read-threads, or take a larger machine; "
            "`retinaray plan` says what a job takes",
        )
    if isinstance(error, OSError):
        return _judge_system_error(error)
    return None


def _judge_system_error(error: OSError) -> Fault | None:
    kind = type(error).__name__
    where = "" if error.filename is None else f"{error.filename}: "
    if error.errno in _MACHINE_FAULTS:
        remedy = "make room, or name another place"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            remedy = "raise the limit on open files (ulimit -n)"
        return Fault(FAILED, kind, f"{where}{error.strerror}; {remedy}")
    if error.errno in _PATH_FAULTS and error.filename is not None:
        text = f"{where}{error.strerror}; check the path and its permissions"
        return Fault(FAILED, kind, text)
    return None


def _is_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is at the root of it: what it cuts short may fail in ways of its own."""
    seen = 0
    while error is not None and seen < 20:
        if isinstance(error, KeyboardInterrupt):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def _is_about_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    # torch's own allocators raise RuntimeErrors; a library that finds no room is an ImportError.
    is_telling = isinstance(error, RuntimeError | ImportError | OSError)
    return is_telling and any(words in str(error).lower() for words in _NO_MEMORY)


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


@dataclass
class Ending:
    """Says why a command ends, in the form that was asked for.

    Attributes:
        verb: The command.
        hint: Command that shows its help.
        is_json: A JSON object is written to standard output, too.
        log_format: Of standard error.
        verbosity: "verbose" shows the traceback.
    """

    verb: str
    hint: str
    is_json: bool = False
    log_format: LogFormat = "text"
    verbosity: Verbosity = "normal"

    def tell(self, fault: Fault, error: BaseException) -> int:
        """Say it; gives the exit code."""
        if self.log_format == "json":
            _log_last(self.verb, fault.text, error)
        elif fault.exit_code in (INTERRUPTED, TERMINATED):
            write_to(sys.stderr, f"{fault.text}\n")
        else:
            if self.verbosity == "verbose":
                write_to(sys.stderr, "".join(traceback.format_exception(error)))
            write_to(sys.stderr, self._describe(fault, error))
        self._answer(fault)
        return fault.exit_code

    def tell_defect(self, error: BaseException) -> None:
        """Leave a JSON object for machines; the traceback is Python's to show."""
        if not isinstance(error, SystemExit):
            self._answer(Fault(FAILED, type(error).__name__, str(error)))

    def _answer(self, fault: Fault) -> None:
        if self.is_json:
            values: dict[str, object] = {"verb": self.verb, "exit_code": fault.exit_code}
            values |= {"error": fault.kind, "message": fault.text}
            write_to(sys.stdout, f"{json.dumps(values)}\n")

    def _describe(self, fault: Fault, error: BaseException) -> str:
        text = fault.text
        if isinstance(error, ConfigError):
            faults = text.splitlines()
            if len(faults) > 1:
                text = "\n  ".join([f"{len(faults)} settings are wrong:", *faults])
            text += f"\nsee: {self.hint}"
        return f"error: {text}\n"


@dataclass
class StopNote:
    """What is known of a stop by a signal.

    Attributes:
        number: Of the first signal; None before.
        is_importing: Nothing has been begun that would have to be put away.
    """

    number: int | None = None
    is_importing: bool = False


@contextmanager
def note_signals(ending: Ending) -> Iterator[StopNote]:
    """Leave the block in order when Ctrl-C or SIGTERM comes; a second one ends the process at once.

    In any thread but the main one, and where somebody else handles Ctrl-C, that is left as it is.

    Args:
        ending: Says why, where a signal comes while modules are imported: an exception there may
            turn into any other, or abort the process.

    Raises:
        KeyboardInterrupt: At Ctrl-C.
        SystemExit: At SIGTERM, with code 143.
    """
    note = StopNote()
    if threading.current_thread() is not threading.main_thread():
        yield note
        return

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        note.number = number
        error = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(TERMINATED)
        fault = judge_error(error)
        if note.is_importing and fault is not None:
            os._exit(ending.tell(fault, error))
        raise error

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    earlier = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield note
    finally:
        for number, handler in earlier.items():
            # None = what was installed by other means than Python.
            signal.signal(number, handler or signal.SIG_DFL)


def _log_last(verb: str, text: str, error: BaseException) -> None:
    """Say in a JSON line why the command ends; with the traceback where debugging is logged."""
    from retinaray.log_format import describe_worker_log

    # A wrong setting ends the command before its log is set up.
    if describe_worker_log() is None:
        configure_logging("normal", "json", verb=verb)
    is_debugged = logger.isEnabledFor(logging.DEBUG)
    logger.error("%s", text, exc_info=error if is_debugged else None)
