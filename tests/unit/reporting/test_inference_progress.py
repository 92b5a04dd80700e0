"""What a person reads of a batch inference, on a terminal and in a log."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest
from rich.console import Console

from retinaray.reporting.inference_progress import (
    InferenceView,
    describe_progress,
    render_summary,
)

ENGINE = "engine-bound (engine 93 % busy): more workers"


def _progress(**changes: Any) -> dict[str, Any]:
    return {
        "num_total": 1000,
        "num_finished": 400,
        "num_errors": 0,
        "images_per_s": 40.04,
        "recent_images_per_s": 50.0,
        "eta_s": 61.0,
        "utilisation": {
            "engine": 0.93,
            "read": 0.2,
            "decode": 0.456,
            "commit": 0.0,
            "starved": 0.02,
            "readers": 0.5,
        },
        "bottleneck": {"stage": "engine", "text": ENGINE},
        **changes,
    }


def _summary(**changes: Any) -> dict[str, Any]:
    return {
        "num_parts": 3,
        "first_part_s": 12.4,
        "images_per_s": 40.04,
        "steady_images_per_s": 55.55,
        "num_bytes": 3 * 1024**3 // 2,
        "utilisation": _progress()["utilisation"],
        "bottleneck": {"stage": "engine", "text": ENGINE},
        **changes,
    }


def test_describe_progress_is_one_line() -> None:
    assert describe_progress(_progress()) == (
        "50.0 img/s (40.0 since the start)  ETA 1:01  "
        "engine 93 %  decode 46 %  read 20 %  commit 0 %"
    )


def test_describe_progress_adds_errors_and_admits_what_it_does_not_know() -> None:
    text = describe_progress(_progress(num_errors=3, eta_s=None))
    assert "  ETA -  3 errors  engine" in text


def test_inference_view_logs_a_line_each_ten_seconds_off_a_terminal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [100.0]
    console = Console(file=io.StringIO(), force_terminal=False)
    view = InferenceView(num_images=1000, num_done=0, console=console, clock=lambda: now[0])
    with caplog.at_level(logging.INFO), view:
        for now_s in (105.0, 109.9, 110.0, 111.0, 119.9, 121.0):
            now[0] = now_s
            view.show(_progress(num_finished=int(now_s)))
    line = describe_progress(_progress())
    assert caplog.messages == [
        f"images 110/1000  {line}  engine-bound",
        f"images 121/1000  {line}  engine-bound",
    ]
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_inference_view_does_not_call_the_start_a_bound(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    console = Console(file=io.StringIO(), force_terminal=False)
    view = InferenceView(num_images=9, num_done=0, console=console, clock=lambda: now[0])
    now[0] = 11.0
    with caplog.at_level(logging.INFO), view:
        view.show(_progress(bottleneck={"stage": "start-up", "text": "start-up: not enough"}))
    assert caplog.messages[0].endswith("  start-up")


def test_inference_view_draws_bar_figures_and_advice_on_a_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with caplog.at_level(logging.INFO):
        with InferenceView(num_images=1000, num_done=100, console=console) as view:
            assert "100/1000" in screen.getvalue()
            assert "starting: no part is finished yet" in screen.getvalue()
            view.show(_progress())
        text = screen.getvalue()
    assert "400/1000" in text
    assert "50.0 img/s (40.0 since the start)  ETA 1:01" in text
    assert ENGINE in text
    assert caplog.messages == []
    # Colours are numbers from 30 on; cursor movements stay.
    assert "\x1b[3" not in text


def test_inference_view_logs_on_a_terminal_that_cannot_redraw(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    now = [0.0]
    console = Console(file=io.StringIO(), force_terminal=True)
    view = InferenceView(num_images=9, num_done=0, console=console, clock=lambda: now[0])
    now[0] = 10.0
    with caplog.at_level(logging.INFO), view:
        view.show(_progress())
    assert len(caplog.messages) == 1


def test_inference_view_gives_the_terminal_back_when_the_run_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True)
    with (
        pytest.raises(ValueError, match="broken"),
        InferenceView(num_images=9, num_done=0, console=console),
    ):
        raise ValueError("broken")
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert screen.getvalue().rfind(shown) > screen.getvalue().rfind(hidden) >= 0


def test_render_summary_has_speed_stages_and_bottleneck() -> None:
    assert render_summary(_summary()).splitlines() == [
        "speed       55.5 img/s with all workers at work, 40.0 since the start, first part after "
        "0:12",
        "stages      engine 93 %, decode 46 %, read 20 %, commit 0 % busy; 1.5 GiB read",
        f"bottleneck  {ENGINE}",
    ]


@pytest.mark.parametrize("summary", [{}, {"num_parts": 0}], ids=["none", "no part"])
def test_render_summary_is_empty_when_there_was_nothing_to_do(summary: dict[str, Any]) -> None:
    assert render_summary(summary) == ""


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B read"),
        (1023, "1023 B read"),
        (1536, "1.5 KiB read"),
        (5 * 1024**2, "5.0 MiB read"),
        (1024**4, "1.0 TiB read"),
        (2048 * 1024**4, "2048.0 TiB read"),
    ],
)
def test_render_summary_writes_bytes_for_people(number: int, text: str) -> None:
    assert text in render_summary(_summary(num_bytes=number))
