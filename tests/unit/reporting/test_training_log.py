"""The lasting record of a training, also over failures."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from retinaray.reporting.training_log import TrainingLog, read_events

Event = Callable[..., dict[str, Any]]


def test_training_log_keeps_events_and_draws_the_curves(
    tmp_path: Path, make_progress: Event, make_validation: Event
) -> None:
    folder = tmp_path / "new" / "run"
    events = [make_progress(5), make_progress(10), make_validation(10, 0.25)]
    with TrainingLog(folder) as log:
        for event in events:
            log.write(event)
        # A reader sees every event at once, not only at the end.
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert read_events(folder) == events
    assert (folder / "loss.png").stat().st_size > 10_000


def test_training_log_writes_numbers_for_tensorboard(
    tmp_path: Path, make_progress: Event, make_validation: Event
) -> None:
    with TrainingLog(tmp_path) as log:
        log.write(make_progress(5, class_loss=0.75))
        log.write(make_validation(10, 0.25) | {"AP_small": None, "classes": ["x"]})
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    tags = board.Tags()["scalars"]
    assert {"progress/class_loss", "progress/learning_rate", "validation/AP"} <= set(tags)
    assert not {"validation/AP_small", "validation/classes", "progress/kind"} & set(tags)
    (scalar,) = board.Scalars("progress/class_loss")
    assert (scalar.step, scalar.value) == (5, 0.75)


def test_a_resumed_log_keeps_the_latest_of_repeated_steps(
    tmp_path: Path, make_progress: Event, make_validation: Event
) -> None:
    with TrainingLog(tmp_path) as log:
        for step in (5, 10, 15):
            log.write(make_progress(step, class_loss=1.0))
        log.write(make_validation(10, 0.1))
    with TrainingLog(tmp_path) as log:  # went on from step 8
        for step in (10, 15, 20):
            log.write(make_progress(step, class_loss=2.0))
        log.write(make_validation(20, 0.2))
    events = read_events(tmp_path)
    assert [(e["kind"], e["step"]) for e in events] == [
        ("progress", 5),
        ("progress", 10),
        ("validation", 10),
        ("progress", 15),
        ("progress", 20),
        ("validation", 20),
    ]
    losses = [event["class_loss"] for event in events if event["kind"] == "progress"]
    assert losses == [1.0, 2.0, 2.0, 2.0]


def test_half_a_line_of_a_killed_process_costs_one_event(
    tmp_path: Path, make_progress: Event, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.dumps(make_progress(step)) for step in (5, 10)]
    (tmp_path / "metrics.jsonl").write_text(lines[0] + "\n" + lines[1][:40])
    with caplog.at_level(logging.WARNING), TrainingLog(tmp_path) as log:
        log.write(make_progress(15))
    assert [event["step"] for event in read_events(tmp_path)] == [5, 15]
    assert "metrics.jsonl, line 2 is not whole and left out" in caplog.text


def test_the_curves_are_drawn_when_the_training_fails(tmp_path: Path, make_progress: Event) -> None:
    def fail_after_a_report() -> None:
        with TrainingLog(tmp_path) as log:
            log.write(make_progress(5))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_after_a_report()
    assert (tmp_path / "loss.png").exists()


def test_log_draws_at_validations_while_the_training_runs_but_not_at_each(
    tmp_path: Path, make_progress: Event, make_validation: Event
) -> None:
    now = 100.0
    picture = tmp_path / "loss.png"
    with TrainingLog(tmp_path, clock=lambda: now) as log:
        log.write(make_progress(5))
        log.write(make_progress(10))
        log.write(make_validation(10, 0.1))
        assert not picture.exists(), "the training began a moment ago"
        now = 131.0
        log.write(make_validation(20, 0.2))
        assert picture.read_bytes()[:4] == b"\x89PNG"
        picture.unlink()
        now = 160.0
        log.write(make_validation(30, 0.3))
        assert not picture.exists(), "29 s after the last one"
    assert picture.exists()
