"""Which tracker is told what, and that a tracker which goes away costs a warning, not the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from retinaray.errors import ClusterError, ConfigError, StorageError
from retinaray.reporting import experiment_loggers
from retinaray.reporting.experiment_loggers import (
    ExperimentRun,
    Measurement,
    Status,
    flatten_settings,
)

Event = Callable[..., dict[str, Any]]


class RecordingTracker:
    """Keeps what it is told; `faults` are raised by the calls that they are named after."""

    name = "Tracker"

    def __init__(self, **faults: Exception) -> None:
        self.faults: dict[str, Exception] = dict(faults)
        self.calls: list[tuple[Any, ...]] = []

    def begin(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        self._call("begin", dict(params), dict(tags))

    def write(self, measurements: Sequence[Measurement]) -> None:
        self._call("write", list(measurements))

    def finish(self, status: Status, *, model: Path | None, reports: Sequence[Path]) -> None:
        self._call("finish", status, model, list(reports))

    def _call(self, name: str, *values: object) -> None:
        if name in self.faults:
            raise self.faults[name]
        self.calls.append((name, *values))

    def written(self) -> list[tuple[str, float, int]]:
        rows = [row for call in self.calls if call[0] == "write" for row in call[1]]
        return [(row.name, row.value, row.step) for row in rows]


class Clock:
    """Seconds that a test sets."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _make_run(*trackers: RecordingTracker, clock: Clock, **more: Any) -> ExperimentRun:
    return ExperimentRun(
        trackers, params={"run.batch": 4}, tags={"model": "m.pth"}, clock=clock, **more
    )


def test_experiment_run_tells_each_tracker_everything_in_order(
    clock: Clock, tmp_path: Path
) -> None:
    trackers = RecordingTracker(), RecordingTracker()
    model, report = tmp_path / "m.pth", tmp_path / "loss.png"
    reports = [report, tmp_path / "absent.csv"]
    with _make_run(*trackers, clock=clock, model=model, reports=reports) as run:
        run.write({"kind": "progress", "step": 5, "class_loss": 0.5, "num_skipped": 0})
        run.write({"kind": "validation", "step": 5, "AP": None, "AP/car": 1, "classes": ["car"]})
        # Files may come until the end.
        model.touch()
        report.touch()
    for tracker in trackers:
        assert tracker.calls == [
            ("begin", {"run.batch": 4}, {"model": "m.pth"}),
            (
                "write",
                [
                    Measurement("progress/class_loss", 0.5, 5, 1000.0),
                    Measurement("progress/num_skipped", 0.0, 5, 1000.0),
                    Measurement("validation/AP/car", 1.0, 5, 1000.0),
                ],
            ),
            ("finish", "FINISHED", model, [report]),
        ]


def test_experiment_run_sends_reports_together_every_five_seconds(
    clock: Clock, make_progress: Event
) -> None:
    tracker = RecordingTracker()
    with _make_run(tracker, clock=clock) as run:
        for step, clock.now_s in enumerate((1001.0, 1004.0, 1005.0, 1006.0, 1010.0), start=1):
            run.write({"kind": "progress", "step": step, "class_loss": 1.0})
    batches = [[row.step for row in call[1]] for call in tracker.calls if call[0] == "write"]
    assert batches == [[1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ClusterError("gone"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (ZeroDivisionError(), "FAILED"),
    ],
)
def test_experiment_run_gives_the_status_and_no_weights_when_the_run_fails(
    clock: Clock, tmp_path: Path, error: BaseException, status: Status
) -> None:
    tracker = RecordingTracker()
    model, report = tmp_path / "m.pth", tmp_path / "loss.png"
    model.touch()
    report.touch()

    def fail() -> None:
        with _make_run(tracker, clock=clock, model=model, reports=[report]):
            raise error

    with pytest.raises(type(error)):
        fail()
    assert tracker.calls[-1] == ("finish", status, None, [report])


def test_experiment_run_ends_what_it_began_when_another_tracker_refuses(clock: Clock) -> None:
    first = RecordingTracker()
    second = RecordingTracker(begin=ConfigError("not installed"))
    third = RecordingTracker()
    with pytest.raises(ConfigError, match="not installed"):
        _make_run(first, second, third, clock=clock).begin()
    assert [call[:2] for call in first.calls][1:] == [("finish", "FAILED")]
    assert second.calls == third.calls == []


def test_experiment_run_keeps_reports_and_warns_once_while_a_tracker_is_away(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    away, there = RecordingTracker(), RecordingTracker()
    with caplog.at_level(logging.WARNING), _make_run(away, there, clock=clock) as run:
        away.faults["write"] = StorageError("no answer")
        for step, clock.now_s in enumerate((1010.0, 1020.0, 1030.0, 1069.0, 1070.0), start=1):
            run.write({"kind": "progress", "step": step, "class_loss": 1.0})
        assert away.written() == []
        del away.faults["write"]
        # It was asked at 1010 and 1070 s, and is asked again at 1130 s.
        for step, clock.now_s in ((6, 1129.0), (7, 1130.0)):
            run.write({"kind": "progress", "step": step, "class_loss": 1.0})
        assert [step for _, _, step in away.written()] == [1, 2, 3, 4, 5, 6, 7]
    assert away.written() == there.written()
    assert caplog.messages == ["no answer; the run goes on and Tracker is told later"]


def test_experiment_run_says_what_a_tracker_missed_when_it_stays_away(
    clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment_loggers, "_MAX_WAITING", 2)
    tracker = RecordingTracker(write=StorageError("no answer"), finish=StorageError("none"))
    with caplog.at_level(logging.WARNING), _make_run(tracker, clock=clock) as run:
        for step in range(5):
            run.write({"kind": "progress", "step": step, "class_loss": 1.0})
    assert caplog.messages[1:] == [
        "Tracker has not been told 5 values; metrics.jsonl in the run folder has all",
        "none; the run's own files are not affected",
    ]


def test_experiment_run_does_not_hide_a_defect_of_a_tracker(clock: Clock) -> None:
    tracker = RecordingTracker(write=TypeError("a defect"))

    def work() -> None:
        with _make_run(tracker, clock=clock) as run:
            clock.now_s += 10
            run.write({"kind": "progress", "step": 1, "class_loss": 1.0})

    with pytest.raises(TypeError, match="a defect"):
        work()


def test_experiment_run_does_nothing_without_trackers(clock: Clock, make_progress: Event) -> None:
    with _make_run(clock=clock) as run:
        run.write(make_progress(1))
        # What no tracker would be told is not even looked at.
        run.write({})


def test_flatten_settings_gives_dotted_names() -> None:
    tree = {"output": "m", "run": {"batch": 4, "deep": {"x": None}}, "scales": [1, 2], "empty": {}}
    assert flatten_settings(tree) == {
        "output": "m",
        "run.batch": 4,
        "run.deep.x": None,
        "scales": [1, 2],
    }
