"""What a person sees while a model is trained: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from retinaray.terminal import find_console

logger = logging.getLogger(__name__)


class TrainingView:
    """Shows progress and validations of a training on standard error.

    On a terminal a bar that is redrawn in place, with the figures below it; elsewhere, with --quiet
    and where the log is JSON, a line of the log per report.

    Args:
        console: Where to draw; none = where the log is drawn.
    """

    def __init__(self, *, console: Console | None = None) -> None:
        self._console = console or find_console()
        self._bar = Progress(
            TextColumn("steps"), BarColumn(), MofNCompleteColumn(), console=self._console
        )
        self._task = self._bar.add_task("", total=None)
        self._live: Live | None = None

    def __enter__(self) -> TrainingView:
        # A terminal that cannot move its cursor would get nothing until the end.
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            text = Text("starting: no step is reported yet")
            self._live = Live(
                Group(self._bar, text),
                console=self._console,
                # What goes to a file must not end on the screen.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, event: Mapping[str, Any]) -> None:
        """Show one event of a training; see `TrainingLog.write`."""
        if event["kind"] == "validation":
            logger.info("%s", describe_validation(event))
        elif self._live is None:
            logger.info(
                "step %d/%d  %s", event["step"], event["total_steps"], describe_progress(event)
            )
        else:
            self._bar.update(self._task, completed=event["step"], total=event["total_steps"])
            self._live.update(Group(self._bar, Text(describe_progress(event))))


def describe_progress(event: Mapping[str, Any]) -> str:
    """One progress report in one line."""
    text = (
        f"epoch {event['epoch']:.1f}  class {event['class_loss']:.3f}  box "
        f"{event['box_loss']:.3f}  "
        f"lr {event['learning_rate']:.1e}  {event['images_per_s']:.1f} img/s  "
        f"ETA {format_duration(event['eta_s'])}"
    )
    if event["wait_share"] > 0.1:
        text += f"  (waiting for images {event['wait_share']:.0%}{_describe_input(event)})"
    if event["num_skipped"]:
        text += f"  ({event['num_skipped']} steps without a finite gradient)"
    return text


def _describe_input(event: Mapping[str, Any]) -> str:
    """What the loaders of a worker give, beside what its steps could take; empty if unknown."""
    gives, takes = event.get("loader_images_per_s"), event.get("step_images_per_s")
    if gives is None or takes is None:
        return ""
    return f", {gives * max(1, event['num_loaders']):.1f} of {takes:.1f} img/s are made"


def describe_validation(event: Mapping[str, Any]) -> str:
    """One validation in one line; `-` where there is no ground truth."""
    names = ("AP", "AP50", "AP_small", "AP_medium", "AP_large")
    values = (event.get(name) for name in names)
    scores = "  ".join(
        f"{name} {'-' if value is None else format(value, '.3f')}"
        for name, value in zip(names, values, strict=True)
    )
    return f"validation after epoch {event['epoch']:.4g}: {scores}"


def format_duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
