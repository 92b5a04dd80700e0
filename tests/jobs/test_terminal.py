"""The command as a person has it: on a real terminal, in a pipe, and stopped in the middle."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "retinaray")
# Starts as the command does, and waits where a runner would work.
WAITING = """
import signal, sys, types, threading
from retinaray import cli
# A shell's background job, as the tests may be one, ignores Ctrl-C, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
def run(job):
    sys.stderr.write("at work\\n")
    sys.stderr.flush()
    threading.Event().wait()
module = types.ModuleType("waiting")
module.run = run
sys.modules["waiting"] = module
for name, verb in list(cli.VERBS.items()):
    cli.VERBS[name] = cli.Verb(verb.job, "waiting:run", verb.help)
sys.exit(cli.main(["doctor", "--annotations", "a.json", *sys.argv[1:]]))
"""


@dataclass(frozen=True)
class Shown:
    """What a command left on a terminal and in its pipe."""

    exit_code: int
    screen: str
    out: str


def _environment(**changes: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "RETINARAY_LOG_FORMAT")
    }
    paths = {"PYTHONPATH": str(REPOSITORY / "platform"), "TERM": "xterm-256color"}
    return {**kept, **paths, **changes}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A sound COCO file and one with a fault of each of two kinds; no images."""
    image = {"id": 1, "file_name": "a.jpg", "height": 50, "width": 100}
    box = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 20], "area": 400}
    sound: dict[str, Any] = {
        "images": [image],
        "annotations": [{**box, "iscrowd": 0}],
        "categories": [{"id": 3, "name": "car"}],
    }
    (tmp_path / "sound.json").write_text(json.dumps(sound), encoding="utf-8")
    sound["annotations"] += [
        {**box, "id": 2, "image_id": 9},
        {**box, "id": 3, "bbox": [1, 1, 0, 5]},
    ]
    (tmp_path / "faulty.json").write_text(json.dumps(sound), encoding="utf-8")
    return tmp_path


@pytest.fixture
def show(dataset: Path) -> Callable[..., Shown]:
    """Run a command whose standard error is a terminal of some width."""

    def run(*arguments: str, width: int = 100, **changes: str) -> Shown:
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        with subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=dataset,
            env=_environment(**changes),
            stdout=subprocess.PIPE,
            stderr=slave,
            text=True,
        ) as process:
            os.close(slave)
            pieces: list[bytes] = []
            reader = threading.Thread(target=_read_all, args=(master, pieces))
            reader.start()
            out, _ = process.communicate()
            reader.join()
        os.close(master)
        return Shown(process.returncode, b"".join(pieces).decode().replace("\r\n", "\n"), out)

    return run


def _read_all(descriptor: int, pieces: list[bytes]) -> None:
    while True:
        try:
            piece = os.read(descriptor, 1 << 16)
        except OSError:
            # Linux says so when the last writer has gone.
            return
        if not piece:
            return
        pieces.append(piece)


def test_doctor_shows_a_table_on_a_terminal_and_json_in_the_pipe(
    show: Callable[..., Shown],
) -> None:
    shown = show("doctor", "--annotations", "faulty.json")
    assert shown.exit_code == 1
    assert "unknown_image" in shown.screen
    assert json.loads(shown.out)["num_annotations"] == 3


@pytest.mark.parametrize(
    ("changes", "has_escapes"), [({}, False), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_doctor_says_what_is_wrong_without_games_when_the_file_is_missing(
    show: Callable[..., Shown], changes: dict[str, str], has_escapes: bool
) -> None:
    shown = show("doctor", "--annotations", "sond.json", **changes)
    assert shown.exit_code == 2
    assert "error: sond.json: cannot read the annotation file" in shown.screen
    assert "nearest: sound.json" in shown.screen
    assert "Traceback" not in shown.screen
    assert ("\x1b" in shown.screen) is has_escapes


def test_doctor_with_json_leaves_the_terminal_alone(show: Callable[..., Shown]) -> None:
    shown = show("doctor", "--annotations", "faulty.json", "--json")
    assert "unknown_image" not in shown.screen
    assert json.loads(shown.out)["num_images"] == 1


def test_help_is_as_wide_as_the_terminal(dataset: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "doctor", "--help"],
        env=_environment(COLUMNS="60"),
        capture_output=True,
        text=True,
        check=False,
    )
    options = [line for line in done.stdout.splitlines() if re.match(r" {6,}\S", line)]
    assert options
    assert max(map(len, options)) <= 60


@pytest.mark.parametrize("broken", [("out",), ("err",), ("out", "err")], ids="-".join)
def test_reader_that_has_gone_is_no_failure(dataset: Path, broken: tuple[str, ...]) -> None:
    # A pipe whose reading end is closed before anything is written, as of `head` or `less`.
    reading_end, writing_end = os.pipe()
    os.close(reading_end)
    done = subprocess.run(
        [*COMMAND, "doctor", "--annotations", "faulty.json", "-v"],
        cwd=dataset,
        env=_environment(),
        stdout=writing_end if "out" in broken else subprocess.PIPE,
        stderr=writing_end if "err" in broken else subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing_end)
    assert done.returncode == 1
    told = (done.stdout or "") + (done.stderr or "")
    assert "BrokenPipe" not in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("number", "code", "kind", "text"),
    [
        (signal.SIGINT, 130, "Interrupted", "stopped by Ctrl-C\n"),
        (signal.SIGTERM, 143, "Terminated", "stopped by SIGTERM\n"),
    ],
)
def test_signal_ends_a_command_with_its_code_and_one_line(
    dataset: Path, number: signal.Signals, code: int, kind: str, text: str
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, "--json"],
        cwd=dataset,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "at work\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, text)
    assert json.loads(out)["error"] == kind
