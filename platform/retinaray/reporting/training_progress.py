"""What a person sees while a model is trained: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

logger = logging.getLogger(__name__)


class TrainingView:
    """Shows progress and validations of a training on standard error."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> TrainingView:
        if self._console.is_terminal:
            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, event: Mapping[str, Any]) -> None:
        """Show one event of a training; see `TrainingLog.write`."""
        if event["kind"] == "validation":
            logger.info("%s", describe_validation(event))
        elif self._bar is None:
            logger.info(
                "step %d/%d  %s", event["step"], event["total_steps"], describe_progress(event)
            )
        else:
            if self._task is None:
                self._task = self._bar.add_task("", total=event["total_steps"])
            self._bar.update(
                self._task, completed=event["step"], description=describe_progress(event)
            )


def describe_progress(event: Mapping[str, Any]) -> str:
    """One progress report in one line."""
    text = (
        f"epoch {event['epoch']:.1f}  class {event['class_loss']:.3f}  box "
        f"{event['box_loss']:.3f}  "
        f"lr {event['learning_rate']:.1e}  {event['images_per_s']:.1f} img/s  "
        f"ETA {format_duration(event['eta_s'])}"
    )
    if event["wait_share"] > 0.2:
        text += f"  (waiting for images {event['wait_share']:.0%})"
    if event["num_skipped"]:
        text += f"  ({event['num_skipped']} steps without a finite gradient)"
    return text


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
