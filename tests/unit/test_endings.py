"""Which exit code and which words a command ends with, by error."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from retinaray import errors
from retinaray.endings import EXIT_CODES, Ending, Fault, judge_error, note_signals


def _judge(error: BaseException) -> tuple[int, str]:
    fault = judge_error(error)
    assert fault is not None
    return fault.exit_code, fault.text


EXIT_CODE_OF: dict[type[errors.RetinarayError], int] = {
    errors.ConfigError: 2,
    errors.DatasetError: 2,
    errors.CheckpointError: 2,
    errors.ImageError: 2,
    errors.MissingFileError: 2,
    errors.UnreadableFileError: 2,
    errors.ClusterError: 1,
    errors.DivergenceError: 1,
    errors.StorageError: 1,
    errors.ExportError: 1,
    errors.InferenceError: 1,
}


@pytest.mark.parametrize("kind", EXIT_CODE_OF, ids=lambda kind: kind.__name__)
def test_judge_error_tells_input_from_failure(kind: type[errors.RetinarayError]) -> None:
    assert _judge(kind("bad")) == (EXIT_CODE_OF[kind], "bad")


def test_exit_codes_are_known_of_every_error_class() -> None:
    assert set(errors.RetinarayError.__subclasses__()) <= set(EXIT_CODE_OF)


def test_judge_error_finds_ctrl_c_below_what_it_made_fail() -> None:
    error = errors.ClusterError("a worker did not stop")
    error.__context__ = KeyboardInterrupt()
    assert _judge(error) == (130, "stopped by Ctrl-C")
    assert _judge(KeyboardInterrupt()) == (130, "stopped by Ctrl-C")


def test_judge_error_takes_an_exit_by_sigterm_and_no_other() -> None:
    assert _judge(SystemExit(143)) == (143, "stopped by SIGTERM")
    assert judge_error(SystemExit(0)) is None
    assert judge_error(SystemExit(3)) is None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 64 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        ImportError("libtorch_cpu.so: cannot allocate memory in static TLS block"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_judge_error_knows_every_spelling_of_no_memory(error: BaseException) -> None:
    code, text = _judge(error)
    assert code == 1
    assert text.startswith("not enough memory (")
    assert "lower --batch" in text


@pytest.mark.parametrize(
    ("number", "name", "text"),
    [
        (errno.ENOSPC, "/a/b", "/a/b: No space left on device; make room, or name another place"),
        (errno.EROFS, "/a/b", "/a/b: Read-only file system; make room, or name another place"),
        (errno.EMFILE, None, "Too many open files; raise the limit on open files (ulimit -n)"),
        (errno.EACCES, "/a/b", "/a/b: Permission denied; check the path and its permissions"),
    ],
)
def test_judge_error_words_what_the_machine_refuses(
    number: int, name: str | None, text: str
) -> None:
    assert _judge(OSError(number, os.strerror(number), name)) == (1, text)


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("x"),
        KeyError("x"),
        RuntimeError("shapes differ"),
        OSError("no number"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        OSError(errno.ENOENT, "No such file"),
    ],
    ids=repr,
)
def test_judge_error_leaves_a_defect_alone(error: BaseException) -> None:
    assert judge_error(error) is None


def test_judge_error_adds_what_a_missing_path_probably_meant(tmp_path: Path) -> None:
    (tmp_path / "train.json").touch()
    error = errors.MissingFileError("cannot read it")
    error.__cause__ = FileNotFoundError(errno.ENOENT, "absent", str(tmp_path / "trian.json"))
    assert _judge(error) == (2, f"cannot read it; nearest: {tmp_path / 'train.json'}")


def test_tell_writes_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    error = errors.ConfigError("a is wrong\nb is wrong")
    fault = Fault(2, "ConfigError", str(error))
    assert Ending("train", "retinaray train --help", is_json=True).tell(fault, error) == 2
    printed = capsys.readouterr()
    assert printed.err == (
        "error: 2 settings are wrong:\n  a is wrong\n  b is wrong\nsee: retinaray train --help\n"
    )
    assert json.loads(printed.out) == {
        "verb": "train",
        "exit_code": 2,
        "error": "ConfigError",
        "message": "a is wrong\nb is wrong",
    }


def test_tell_leaves_stdout_empty_when_nobody_asked_for_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = errors.ClusterError("no node left")
    Ending("train", "").tell(Fault(1, "ClusterError", "no node left"), error)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "error: no node left\n")


def test_tell_defect_leaves_a_line_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    Ending("train", "", is_json=True).tell_defect(ZeroDivisionError("a defect"))
    values = json.loads(capsys.readouterr().out)
    assert (values["exit_code"], values["error"], values["message"]) == (
        1,
        "ZeroDivisionError",
        "a defect",
    )


@pytest.fixture(autouse=True)
def _ctrl_c_as_python_has_it() -> Iterator[None]:
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_note_signals_leaves_the_block_and_puts_the_handler_back(
    number: signal.Signals, kind: type[BaseException]
) -> None:
    earlier = signal.getsignal(number)
    with pytest.raises(kind) as caught, note_signals(Ending("train", "")) as note:
        signal.raise_signal(number)
    assert note.number == number
    assert judge_error(caught.value) == judge_error(ValueError(), stopped_by=number)
    assert signal.getsignal(number) == earlier


def test_note_signals_gives_a_second_signal_to_the_system() -> None:
    found: list[object] = []

    def stop_while_stopping() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            found.append(signal.getsignal(signal.SIGTERM))

    with pytest.raises(SystemExit), note_signals(Ending("train", "")):
        stop_while_stopping()
    assert found == [signal.SIG_DFL]


def test_note_signals_leaves_a_handler_of_others_alone() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with note_signals(Ending("train", "")) as note:
        signal.raise_signal(signal.SIGINT)
    assert note.number is None


def test_note_signals_ends_the_process_when_modules_are_imported() -> None:
    code = (
        "import signal\n"
        "from retinaray.endings import Ending, note_signals\n"
        "with note_signals(Ending('train', '', is_json=True)) as note:\n"
        "    note.is_importing = True\n"
        "    try:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n"
        "        raise ImportError('half a module')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "stopped by Ctrl-C\n")
    assert json.loads(done.stdout)["error"] == "Interrupted"


def test_note_signals_does_nothing_in_another_thread() -> None:
    found: list[object] = []

    def look() -> None:
        with note_signals(Ending("train", "")):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_judge_error_goes_by_the_signal_whatever_it_made_fail() -> None:
    assert judge_error(RecursionError(), stopped_by=signal.SIGINT) == Fault(
        130, "Interrupted", "stopped by Ctrl-C"
    )


def test_exit_codes_name_every_code() -> None:
    codes = re.findall(r"^  (\d+) +\S", EXIT_CODES, flags=re.MULTILINE)
    assert codes == ["0", "1", "2", "130", "143"]
