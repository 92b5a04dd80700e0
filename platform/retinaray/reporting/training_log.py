"""A training's lasting record: metrics as JSON lines, TensorBoard events, a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from retinaray.reporting.curves import draw_training_curves


class TrainingLog:
    """Writes every report of a training into its run folder; appends when the training is resumed.

    Args:
        folder: Run folder; made when absent.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lines = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._events = SummaryWriter(str(folder / "tensorboard"))

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

    def close(self) -> None:
        """Finish the files and draw the curves."""
        self._lines.close()
        self._events.close()
        draw_training_curves(read_events(self._folder), self._folder / "loss.png")


def read_events(folder: Path) -> list[dict[str, Any]]:
    """All events of a run folder, the latest where a step was repeated after a failure, by step."""
    latest: dict[tuple[str, int], dict[str, Any]] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        latest[event["kind"], event["step"]] = event
    return sorted(latest.values(), key=lambda event: event["step"])
