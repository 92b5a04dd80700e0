"""What a person sees of a running batch inference: a live bar, or lines off a terminal."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from retinaray.reporting.training_progress import format_duration

logger = logging.getLogger(__name__)

_LINE_EVERY_S = 10.0


class InferenceView:
    """Counts finished parts and images, and shows them on standard error.

    Args:
        num_parts: Parts of the run.
        num_done: Parts that an earlier command finished.
    """

    def __init__(self, *, num_parts: int, num_done: int) -> None:
        self._num_parts = num_parts
        self._num_done = self._num_resumed = num_done
        self._num_images = 0
        self._num_errors = 0
        self._start = self._last_line = time.monotonic()
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> InferenceView:
        if self._console.is_terminal:
            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("parts  {task.description}"),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=self._num_parts, completed=self._num_done)
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

    @property
    def images_per_s(self) -> float:
        """Images of this command over its time so far, the start of the workers included."""
        return round(self._num_images / max(1e-9, time.monotonic() - self._start), 2)

    def add(self, num_images: int, num_errors: int) -> None:
        """Count one finished part."""
        self._num_done += 1
        self._num_images += num_images
        self._num_errors += num_errors
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._num_done, description=self._describe())
        elif time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._last_line = time.monotonic()
            logger.info("parts %d/%d  %s", self._num_done, self._num_parts, self._describe())

    def _describe(self) -> str:
        elapsed_s = time.monotonic() - self._start
        rate = (self._num_done - self._num_resumed) / max(1e-9, elapsed_s)
        eta = format_duration((self._num_parts - self._num_done) / max(1e-9, rate))
        text = f"{self._num_images} images  {self.images_per_s:.1f} img/s  ETA {eta}"
        return text + (f"  {self._num_errors} errors" if self._num_errors else "")
