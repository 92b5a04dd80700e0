"""What a person sees of a batch inference: a live bar, or lines off a terminal, and a summary."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from retinaray.reporting.training_progress import format_duration
from retinaray.terminal import find_console

logger = logging.getLogger(__name__)

_LINE_EVERY_S = 10.0
_SHOWN_STAGES = ("engine", "decode", "read", "commit")


class InferenceView:
    """Shows how far a batch inference is, on standard error.

    On a terminal a bar that is redrawn in place; elsewhere, with --quiet and where the log is JSON,
    a line of the log about every ten seconds.

    Args:
        num_images: Images of the run.
        num_done: Of these, finished by an earlier command.
        console: Where to draw; none = where the log is drawn.
        clock: Seconds that never go back; another one in tests.
    """

    def __init__(
        self,
        *,
        num_images: int,
        num_done: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or find_console()
        self._clock = clock
        self._last_line_s = clock()
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images"),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=num_images, completed=num_done)
        self._live: Live | None = None

    def __enter__(self) -> InferenceView:
        # A terminal that cannot move its cursor would get nothing until the end.
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            text = Text("starting: no part is finished yet")
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

    def show(self, progress: Mapping[str, Any]) -> None:
        """Show how far it is; see `RunPace.progress`. May be called as often as one likes."""
        self._bar.update(self._task, completed=progress["num_finished"])
        if self._live is not None:
            text = f"{describe_progress(progress)}\n{progress['bottleneck']['text']}"
            self._live.update(Group(self._bar, Text(text)))
        elif self._clock() - self._last_line_s >= _LINE_EVERY_S:
            self._last_line_s = self._clock()
            logger.info(
                "images %d/%d  %s  %s",
                progress["num_finished"],
                progress["num_total"],
                describe_progress(progress),
                _name_bottleneck(progress["bottleneck"]["stage"]),
            )


def describe_progress(progress: Mapping[str, Any]) -> str:
    """Rates, remaining time, errors and how busy the stages are, in one line."""
    eta_s = progress["eta_s"]
    text = (
        f"{progress['recent_images_per_s']:.1f} img/s ({progress['images_per_s']:.1f} since the "
        f"start)  ETA {'-' if eta_s is None else format_duration(eta_s)}"
    )
    if progress["num_errors"]:
        text += f"  {progress['num_errors']} errors"
    return f"{text}  {_describe_stages(progress['utilisation'], '  ')}"


def render_summary(summary: Mapping[str, Any]) -> str:
    """Three lines on a finished command: its speed, its stages, its bottleneck.

    Args:
        summary: See `RunPace.summary`.

    Returns:
        Lines without a line end; empty when the command had no part to do.
    """
    if not summary.get("num_parts"):
        return ""
    stages = _describe_stages(summary["utilisation"], ", ")
    return "\n".join(
        [
            f"speed       {summary['steady_images_per_s']:.1f} img/s with all workers at work, "
            f"{summary['images_per_s']:.1f} since the start, first part after "
            f"{format_duration(summary['first_part_s'])}",
            f"stages      {stages} busy; {_format_bytes(summary['num_bytes'])} read",
            f"bottleneck  {summary['bottleneck']['text']}",
        ]
    )


def _describe_stages(utilisation: Mapping[str, float], separator: str) -> str:
    return separator.join(f"{name} {100 * utilisation[name]:.0f} %" for name in _SHOWN_STAGES)


def _name_bottleneck(stage: str) -> str:
    return stage if stage == "start-up" else f"{stage}-bound"


def _format_bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
