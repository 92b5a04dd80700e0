"""A training's lasting record: metrics as JSON lines, TensorBoard events, a picture."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from retinaray.reporting.curves import draw_training_curves
from retinaray.reporting.input_watch import InputWatch

logger = logging.getLogger(__name__)

# A picture takes half a second; those of a training of many short epochs would add up.
_REDRAW_S = 30.0


class TrainingLog:
    """Writes every report of a training into its run folder; appends when the training is resumed.

    Warns once when the reports say that the training waits for its images. The picture is drawn at
    the end, and anew at validations while the training runs.

    Args:
        folder: Run folder; made when absent.
        clock: Seconds.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lines = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        if self._lines.tell() and not (folder / "metrics.jsonl").read_bytes().endswith(b"\n"):
            # A process that was killed while it wrote leaves half a line: the next one is whole.
            self._lines.write("\n")
        self._events = SummaryWriter(str(folder / "tensorboard"))
        self._input_watch = InputWatch()
        self._clock = clock
        self._drawn_at = clock()

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, event: Mapping[str, Any]) -> None:
        """Keep one event: `kind` is progress or validation, `step` its place, numbers values."""
        self._lines.write(json.dumps(event) + "\n")
        self._lines.flush()
        for name, value in event.items():
            if name not in ("kind", "step") and isinstance(value, int | float):
                self._events.add_scalar(f"{event['kind']}/{name}", value, event["step"])
        advice = self._input_watch.judge(event) if event["kind"] == "progress" else None
        if advice is not None:
            logger.warning("%s", advice)
        if event["kind"] == "validation" and self._clock() - self._drawn_at > _REDRAW_S:
            self._draw()

    def close(self) -> None:
        """Finish the files and draw the curves."""
        self._lines.close()
        self._events.close()
        self._draw()

    def _draw(self) -> None:
        self._drawn_at = self._clock()
        draw_training_curves(read_events(self._folder), self._folder / "loss.png")


def read_events(folder: Path) -> list[dict[str, Any]]:
    """All events of a run folder, the latest where a step was repeated after a failure, by step.

    Half a line, which a killed process can leave, is left out with a warning.
    """
    path = folder / "metrics.jsonl"
    latest: dict[tuple[str, int], dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            event = json.loads(line)
        except ValueError:
            logger.warning("%s, line %d is not whole and left out: %.60s", path, number, line)
            continue
        latest[event["kind"], event["step"]] = event
    return sorted(latest.values(), key=lambda event: event["step"])
