"""The rehearsal as a program: its table, its exit code, and that nothing of it is left behind."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from retinaray.errors import StorageError

FOLDER = Path(__file__).resolve().parents[3] / "cluster" / "rehearsal"
TIMEOUT_S = 30.0

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Import a module of cluster/rehearsal as the scripts import each other."""
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def sealing(load: Load) -> ModuleType:
    """cluster/rehearsal/sealing.py, where namespaces can be made."""
    module = load("sealing")
    reason = module.explain_no_namespaces()
    if reason:
        pytest.skip(f"namespaces: {reason}")
    return module


def test_run_scenarios_gives_a_row_and_a_new_cluster_when_one_fails(load: Load) -> None:
    rehearsal = load("rehearsal")
    resets: list[str] = []
    lab = SimpleNamespace(reset=lambda: resets.append("reset"))

    def survive(_: object) -> Any:
        """Do nothing."""
        return load("lab").Finding("nothing", "everything", 2.5)

    def break_down(_: object) -> Any:
        """Break it."""
        raise StorageError("expected a bucket, got none")

    rows = rehearsal.run_scenarios({"a": break_down, "b": survive}, lab)
    assert resets == ["reset"]
    assert [(row.scenario, row.passed, row.recovery_s) for row in rows] == [
        ("a", False, None),
        ("b", True, 2.5),
    ]
    assert (rows[0].done, rows[0].survived) == ("Break it.", "expected a bucket, got none")


def test_run_scenarios_lets_defects_through(load: Load) -> None:
    def crash(_: object) -> Any:
        """Crash."""
        return {}["no"]

    with pytest.raises(KeyError, match="no"):
        load("rehearsal").run_scenarios({"a": crash}, SimpleNamespace(reset=lambda: None))


def test_format_table_folds_long_cells_and_counts_what_passed(load: Load) -> None:
    table = load("result_table")
    rows = [
        table.Row("one", "pulled", "all", 12.6, 30.0, True),
        table.Row("two", "word " * 12, "none", None, 10.4, False),
    ]
    lines = table.format_table(rows).splitlines()
    assert lines[0].split() == [
        *("scenario", "what", "was", "done", "what", "survived", "recovery", "took", "result")
    ]
    assert lines[2].split() == ["one", "pulled", "all", "13", "s", "30", "s", "PASS"]
    # Eight words of four letters and the blanks between them are 39 characters, nine would be 44.
    assert [lines[3].count("word"), lines[4].count("word")] == [9, 3]
    assert lines[3].split()[-1] == "FAIL"
    assert lines[-1] == "1 of 2 scenarios passed in 40 s"


def test_write_json_says_whether_all_passed(load: Load, tmp_path: Path) -> None:
    table = load("result_table")
    row = table.Row("one", "pulled", "all", 12.5, 30.0, True)
    table.write_json([row], tmp_path / "rows.json", has_namespaces=True)
    assert json.loads((tmp_path / "rows.json").read_text()) == {
        "has_namespaces": True,
        "passed": True,
        "rows": [
            {
                "scenario": "one",
                "done": "pulled",
                "survived": "all",
                "recovery_s": 12.5,
                "seconds": 30.0,
                "passed": True,
            }
        ],
    }


def test_make_parser_refuses_an_unknown_scenario(
    load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = load("rehearsal").make_parser()
    assert parser.parse_args(["--only", "infer-cut", "--only", "submit"]).only == [
        "infer-cut",
        "submit",
    ]
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--only", "earthquake"])
    assert "infer-drain" in capsys.readouterr().err


def test_make_configuration_is_one_that_ray_accepts(load: Load) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    configuration = load("autoscaling_scenario").make_configuration(idle_s=12)
    validate_config(prepare_config(configuration))
    assert configuration["idle_timeout_minutes"] == pytest.approx(0.2)
    assert configuration["available_node_types"]["cpu"]["min_workers"] == 0


def test_run_sealed_gives_a_network_and_processes_of_its_own(
    sealing: ModuleType, tmp_path: Path
) -> None:
    script = (
        "import os, pathlib, socket, sys;"
        "names = [name for _, name in socket.if_nameindex()];"
        "pathlib.Path(sys.argv[1]).write_text(f'{os.getpid()} {names}'); sys.exit(7)"
    )
    found = tmp_path / "found"
    assert sealing.run_sealed([sys.executable, "-c", script, str(found)]) == 7
    assert found.read_text() == "1 ['lo']"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_run_sealed_ends_everything_inside_when_its_caller_is_ended(
    sealing: ModuleType, load: Load, tmp_path: Path, number: int
) -> None:
    # A grandchild inside keeps a pipe open: it closes when the last process inside is gone.
    inside = (
        "import subprocess, sys; sys.path.insert(0, sys.argv[1]); import sealing;"
        "sealing.die_with_parent();"
        "subprocess.run(['bash', '-c', 'echo ready; sleep 1000'], stdin=subprocess.DEVNULL)"
    )
    outside = (
        "import signal, sys; sys.path.insert(0, sys.argv[1]); import sealing;"
        # Shells start background jobs deaf to Ctrl-C, and this test may be in one.
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        "sealing.run_sealed([sys.executable, '-c', sys.argv[2], sys.argv[1]])"
    )
    command = [sys.executable, "-c", outside, str(FOLDER), inside]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        os.kill(process.pid, number)
        try:
            rest, _ = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
    assert rest == b""
    assert process.returncode != 0
