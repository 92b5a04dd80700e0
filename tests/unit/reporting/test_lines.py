"""What a person reads while a training or an inference runs, and the table at the end."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from retinaray.evaluation.coco_map import TWELVE, ClassScores, CocoScores
from retinaray.reporting.score_table import render_scores
from retinaray.reporting.training_progress import (
    TrainingView,
    describe_progress,
    describe_validation,
    format_duration,
)

Event = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (0.4, "0:00"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599.4, "59:59"),
        (3600, "1:00:00"),
        (90061, "25:01:01"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_describe_progress_is_one_line(make_progress: Event) -> None:
    assert describe_progress(make_progress(25)) == (
        "epoch 2.5  class 0.040  box 0.500  lr 1.0e-03  12.3 img/s  ETA 1:01"
    )


def test_describe_progress_adds_what_is_wrong(make_progress: Event) -> None:
    text = describe_progress(make_progress(25, wait_share=0.456, num_skipped=3))
    assert text.endswith("(waiting for images 46%)  (3 steps without a finite gradient)")


def test_describe_validation_marks_what_has_no_ground_truth(make_validation: Event) -> None:
    event = make_validation(25, 0.123456) | {"AP_small": None}
    assert describe_validation(event) == (
        "validation after epoch 2.5: AP 0.123  AP50 0.123  AP_small -  AP_medium 0.123  "
        "AP_large 0.123"
    )


def test_training_view_logs_lines_off_a_terminal(
    make_progress: Event, make_validation: Event, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), TrainingView() as view:
        view.show(make_progress(25))
        view.show(make_validation(30, 0.5))
    first, second = caplog.messages
    assert first.startswith("step 25/100  epoch 2.5  class 0.040")
    assert second.startswith("validation after epoch 3: AP 0.500")


def test_training_view_draws_bar_and_figures_on_a_terminal(
    make_progress: Event, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, no_color=True, width=60)
    with caplog.at_level(logging.INFO):
        with TrainingView(console=console) as view:
            assert "starting: no step is reported yet" in screen.getvalue()
            view.show(make_progress(25))
        text = screen.getvalue()
    assert "25/100" in text
    # The figures are longer than the line; what tells when it ends is not cut off.
    assert "ETA" in text
    assert "1:01" in text
    assert caplog.messages == []


def test_training_view_logs_on_a_terminal_that_cannot_redraw(
    make_progress: Event, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = io.StringIO()
    view = TrainingView(console=Console(file=screen, force_terminal=True))
    with caplog.at_level(logging.INFO), view:
        view.show(make_progress(25))
    assert len(caplog.messages) == 1
    assert screen.getvalue() == ""


def test_training_view_gives_the_terminal_back_when_the_training_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True)
    with pytest.raises(ValueError, match="broken"), TrainingView(console=console):
        raise ValueError("broken")
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert screen.getvalue().rfind(shown) > screen.getvalue().rfind(hidden) >= 0


def test_render_scores_lines_up_and_says_absent() -> None:
    summary: dict[str, float | None] = dict.fromkeys(TWELVE, 0.5)
    summary["AP_small"] = None
    rows = (
        ClassScores(1, "licence plate", 12, 0.1, 0.2, None, 0.4, 0.5, 0.6),
        ClassScores(2, "car", 0, None, None, None, None, None, None),
    )
    text = render_scores(CocoScores(summary, rows, num_images=3, num_detections=4))
    lines = text.splitlines()
    assert (
        lines[0] == "AP 0.500  AP50 0.500  AP75 0.500  AP_small -  AP_medium 0.500  AP_large 0.500"
    )
    assert lines[1].startswith("AR_1 0.500  AR_10 0.500")
    assert lines[2].split() == [
        "class",
        "boxes",
        "AP",
        "AP50",
        "AP_small",
        "AP_medium",
        "AP_large",
        "AR_100",
    ]
    assert lines[3].split()[-7:] == ["12", "0.100", "0.200", "-", "0.400", "0.500", "0.600"]
    assert len(lines[2]) == len(lines[3])
    assert lines[4].startswith("car  ")
    assert lines[4].endswith("absent from the ground truth")
