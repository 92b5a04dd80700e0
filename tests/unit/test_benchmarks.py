"""The arithmetic and the record format of the benchmarks, on clocks that say what they are told."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """tests/benchmarks/run.py, imported as its cases import it."""
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module("run")
    sys.modules.pop("run")


@pytest.fixture
def fake_clock() -> Callable[..., Callable[[], float]]:
    """Make a clock that passes the given durations, one between each pair of readings."""

    def make(*durations_s: float) -> Callable[[], float]:
        moments: list[float] = []
        now = 100.0
        for duration in durations_s:
            moments += [now, now + duration]
            now += duration + 1000.0
        return iter(moments).__next__

    return make


@pytest.fixture
def rounds(run: ModuleType) -> Any:
    """Three rounds of two competitors, hand-made."""
    return run.Rounds(
        wall_s={"ours": [1.0, 2.0, 4.0], "theirs": [3.0, 2.0, 20.0]},
        cpu_s={"ours": [0.5, 0.7, 0.6], "theirs": [1.0, 1.0, 1.0]},
        outputs={"ours": 1, "theirs": 1},
    )


@pytest.fixture
def record() -> dict[str, Any]:
    """A record that is complete."""
    return {
        "case": "a/b",
        "value": 2.0,
        "unit": "s",
        "n": 3,
        "median": 2.0,
        "p10": 1.0,
        "p90": 3.0,
        "times_as_fast_as_c": 1.5,
        "checked": "the count",
        "config": {"quick": True},
    }


def test_time_rounds_lets_competitors_take_turns_and_drops_the_warm_up(
    run: ModuleType, fake_clock: Callable[..., Callable[[], float]]
) -> None:
    order: list[str] = []

    def compete(name: str) -> int:
        order.append(name)
        return len(order)

    rounds = run.time_rounds(
        {"a": partial(compete, "a"), "b": partial(compete, "b")},
        num_rounds=2,
        num_warmup=1,
        clock=fake_clock(50, 60, 1, 2, 3, 4),
        cpu_clock=fake_clock(500, 600, 10, 20, 30, 40),
    )
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert rounds.wall_s == {"a": [1, 3], "b": [2, 4]}
    assert rounds.cpu_s == {"a": [10, 30], "b": [20, 40]}
    assert rounds.outputs == {"a": 5, "b": 6}


def test_time_rounds_frees_the_last_output_before_the_clock_runs(run: ModuleType) -> None:
    class Output:
        alive = 0

        def __init__(self) -> None:
            assert Output.alive == 0
            Output.alive += 1

        def __del__(self) -> None:
            Output.alive -= 1

    run.time_rounds({"a": Output}, num_rounds=3)
    assert Output.alive == 0


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([7.0], 90, 7.0),
        ([3.0, 1.0, 2.0], 50, 2.0),
        ([4.0, 1.0, 2.0, 3.0], 50, 2.5),
        # Positions 0..10: 10 % lies on the second value, 90 % on the tenth.
        ([float(value) for value in range(11)], 10, 1.0),
        ([float(value) for value in range(11)], 90, 9.0),
        # Position 0.9 * 2 = 1.8 between 20 and 40.
        ([10.0, 20.0, 40.0], 90, 36.0),
    ],
)
def test_percentile_lies_between_the_nearest_values(
    run: ModuleType, values: list[float], percent: float, expected: float
) -> None:
    assert run.percentile(values, percent) == pytest.approx(expected, rel=1e-12)


def test_make_records_takes_ratios_round_by_round(run: ModuleType, rounds: Any) -> None:
    ours, theirs = run.make_records(
        "case",
        rounds,
        unit="images/s",
        convert=lambda seconds: 8 / seconds,
        baselines={"ours": ["theirs"]},
        checked="a fact",
        config={"side_px": 64},
    )
    assert ours == {
        "case": "case/ours",
        # 8, 4 and 2 images per second; of three values p10 lies 0.2 and p90 1.8 steps up.
        "value": 4.0,
        "unit": "images/s",
        "n": 3,
        "median": 4.0,
        "p10": 2.4,
        "p90": 7.2,
        "cpu_s": 0.6,
        # 3/1, 2/2 and 20/4 have the median 3; the ratio of the medians would be 3/2.
        "times_as_fast_as_theirs": 3.0,
        "times_as_fast_as_theirs_p10_p90": [1.4, 4.6],
        # 1/0.5, 1/0.7 and 1/0.6.
        "cpu_times_as_fast_as_theirs": 1.667,
        "checked": "a fact",
        "config": {"side_px": 64},
    }
    assert theirs["case"] == "case/theirs"
    assert not [key for key in theirs if "times_as_fast_as" in key]
    run.check_record(ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checked": ""}, "checked missing"),
        ({"config": None}, "config missing"),
        ({"median": math.nan}, "finite numbers"),
        ({"times_as_fast_as_c": math.inf}, "finite numbers"),
        ({"cpu_times_as_fast_as_c": math.nan}, "finite numbers"),
        ({"p90": 1.5}, "p10 <= median <= p90"),
        ({"n": 0}, "n >= 1"),
        ({"unit": "skipped"}, "needs a reason"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_check_record_refuses_what_cannot_be(
    run: ModuleType, record: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    run.check_record(record)
    with pytest.raises(run.RecordError, match=f"a/b: .*{message}"):
        run.check_record(record | change)


def test_check_record_accepts_a_zero_and_a_skip(run: ModuleType, record: dict[str, Any]) -> None:
    run.check_record(record | {"value": 0.0, "median": 0.0, "p10": 0.0, "p90": 0.0})
    run.check_record(run.skip("case", "needs a GPU"))


def test_find_cases_gives_the_files_that_define_run(run: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "fast.py").write_text("def run(quick: bool = False): ...")
    (tmp_path / "helper.py").write_text("def other(): ...\nclass A:\n    def run(self): ...")
    (tmp_path / "conftest.py").write_text("import pytest")
    assert run.find_cases(tmp_path) == ["fast"]
    assert run.find_cases() == [
        "anchors",
        "batch_files",
        "batch_inference",
        "batch_scale",
        "checkpoint",
        "decode",
        "doctor",
        "gpu_training",
        "inference",
        "recovery",
        "report_page",
        "threshold_sweep",
        "train_input",
        "train_step",
        "weak_scaling",
    ]


@pytest.fixture
def fake_case(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A case of one figure and one skip, found in place of the real ones."""
    (tmp_path / "a_fake_case.py").write_text(
        "from run import skip, summarise\n"
        "def run(quick=False):\n"
        "    figure = {'case': 'fake/x', 'unit': 's', 'checked': 'nothing is timed'}\n"
        "    figure |= {'config': {'side_px': 64}} | summarise([1.0, 2.0])\n"
        "    figure |= {'times_as_fast_as_y': 1.25, 'cpu_times_as_fast_as_y': 1.5}\n"
        "    return [figure, skip('fake/z', 'needs a GPU')]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(run, "find_cases", lambda: ["a_fake_case"])
    monkeypatch.setattr(run.append_records, "__defaults__", (tmp_path / "results",))
    return "a_fake_case"


def test_main_prints_lines_and_a_table(
    run: ModuleType, fake_case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([fake_case, "--quick"]) == 0
    printed = capsys.readouterr()
    figure, skipped = map(json.loads, printed.out.splitlines())
    assert figure["median"] == 1.5
    assert figure["checked"] == "nothing is timed"
    assert figure["config"] == {"side_px": 64}
    assert figure["quick"] is True
    assert figure["hardware"]["cores"] >= 1
    assert figure["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"commit", "time", "case_s", "quick"} <= set(figure)
    assert skipped["reason"] == "needs a GPU"
    header, first, second = printed.err.strip().splitlines()
    assert header.split()[:4] == ["case", "median", "p10", "p90"]
    assert first.split() == ["fake/x", "1.5", "1.1", "1.9", "s", "2", "y", "1.25", "(cpu", "1.5)"]
    assert second.endswith("needs a GPU")
    assert not (tmp_path / "results").exists()


def test_main_appends_figures_but_no_skips(
    run: ModuleType, fake_case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.main([fake_case, "--append"])
    run.main(["--append"])
    lines = (tmp_path / "results" / "a_fake_case.jsonl").read_text().splitlines()
    assert [json.loads(line)["case"] for line in lines] == ["fake/x", "fake/x"]
    assert lines[0] == capsys.readouterr().out.splitlines()[0]


def test_main_refuses_a_case_that_is_not_there(
    run: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main(["train_steps"])
    complaint = capsys.readouterr().err
    assert "no such case: train_steps; expected of anchors, batch_files, batch_" in complaint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "processor\t: 0\nmodel name\t: A CPU: x\nflags\t: fpu avx2 amx_tile sse\n\n",
            ("A CPU: x", ["amx_tile", "avx2"]),
        ),
        ("processor : 0\nFeatures : fp asimd\n", ("", [])),
        ("", ("", [])),
    ],
    ids=["x86", "arm", "none"],
)
def test_parse_cpuinfo_finds_name_and_matrix_units(
    run: ModuleType, text: str, expected: tuple[str, list[str]]
) -> None:
    assert run.parse_cpuinfo(text) == expected
