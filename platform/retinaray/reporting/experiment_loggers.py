"""What trackers of experiments are told of a run, and when: one door for MLflow and W&B.

A tracker is a guest: one that cannot be reached at the start stops the run before it takes
anything, one that goes away later costs a warning, and what it missed is sent when it is back.
The run folder's metrics.jsonl is whole in any case. Knows no tracker, no settings and no Ray.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from retinaray.errors import StorageError

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

_PERIOD_S = 5.0
"""Reports are sent together so often, because each sending is a request."""
_RETRY_S = 60.0
"""A tracker that does not answer is left alone for so long: asking holds up the other reports."""
_MAX_WAITING = 100_000
"""Values that are kept for a tracker that does not answer; the oldest go first."""


@dataclass(frozen=True)
class Measurement:
    """One value of one metric.

    Attributes:
        name: As in TensorBoard: progress/class_loss, validation/AP.
        value: May be NaN.
        step: Optimizer steps.
        time_s: When it was reported, in seconds since 1970 UTC.
    """

    name: str
    value: float
    step: int
    time_s: float


class ExperimentLogger(Protocol):
    """One tracker; every method raises StorageError when it cannot be reached or refuses."""

    @property
    def name(self) -> str:
        """What people call it."""

    def begin(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Open the run, or go on with it when an earlier command began it."""

    def write(self, measurements: Sequence[Measurement]) -> None:
        """Keep values, in the order of their reports; the same ones may come again."""

    def finish(self, status: Status, *, model: Path | None, reports: Sequence[Path]) -> None:
        """Hand over files and close the run; all of them exist, no model = none is to be kept."""


class ExperimentRun:
    """Tells all trackers of one run; without any it does nothing.

    Entering begins the run with each of them, leaving gives its status: FINISHED, KILLED after
    Ctrl-C, FAILED after any other exception.

    Args:
        loggers: The trackers.
        params: Settings by dotted name.
        tags: What else is known of the run: versions, folder.
        model: File of the kept weights, for a run that finished; none = not handed over.
        reports: Files for people, handed over if they exist at the end.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        loggers: Sequence[ExperimentLogger],
        *,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        model: Path | None = None,
        reports: Sequence[Path] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._outboxes = [_Outbox(entry, clock) for entry in loggers]
        self._params = params
        self._tags = tags
        self._model = model
        self._reports = reports
        self._clock = clock

    def __enter__(self) -> ExperimentRun:
        self.begin()
        return self

    def begin(self) -> None:
        """Begin the run with every tracker, or with none; done by entering the block.

        Raises:
            ConfigError: If a tracker's package is not installed.
            StorageError: If a tracker does not answer or refuses.
        """
        begun: list[_Outbox] = []
        try:
            for outbox in self._outboxes:
                outbox.logger.begin(self._params, self._tags)
                begun.append(outbox)
        except BaseException:
            for outbox in begun:
                outbox.finish("FAILED", None, ())
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish("FINISHED")
        else:
            self.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def finish(self, status: Status) -> None:
        """Close the run with every tracker; done by leaving the block where there is one."""
        model = self._model if status == "FINISHED" else None
        reports = [path for path in self._reports if path.is_file()]
        for outbox in self._outboxes:
            outbox.finish(status, model if model and model.is_file() else None, reports)

    def write(self, event: Mapping[str, Any]) -> None:
        """Pass on one event, as `TrainingLog.write` takes it: what is no number is left out."""
        if not self._outboxes:
            return
        now = self._clock()
        values = [
            Measurement(f"{event['kind']}/{name}", float(value), int(event["step"]), now)
            for name, value in event.items()
            if name not in ("kind", "step") and isinstance(value, int | float)
        ]
        for outbox in self._outboxes:
            outbox.add(values)


class _Outbox:
    """What one tracker has not been told yet."""

    def __init__(self, target: ExperimentLogger, clock: Callable[[], float]) -> None:
        self.logger = target
        self._clock = clock
        self._waiting: list[Measurement] = []
        self._num_lost = 0
        self._next_s = clock() + _PERIOD_S
        self._is_behind = False

    def add(self, values: Sequence[Measurement]) -> None:
        self._waiting += values
        excess = len(self._waiting) - _MAX_WAITING
        if excess > 0:
            del self._waiting[:excess]
            self._num_lost += excess
        if self._clock() >= self._next_s:
            self._send()

    def _send(self) -> None:
        try:
            if self._waiting:
                self.logger.write(self._waiting)
        except StorageError as error:
            self._next_s = self._clock() + _RETRY_S
            if not self._is_behind:
                logger.warning("%s; the run goes on and %s is told later", error, self.logger.name)
            self._is_behind = True
            return
        self._next_s = self._clock() + _PERIOD_S
        self._waiting = []
        self._is_behind = False

    def finish(self, status: Status, model: Path | None, reports: Sequence[Path]) -> None:
        self._send()
        missed = self._num_lost + len(self._waiting)
        if missed:
            logger.warning(
                "%s has not been told %d values; metrics.jsonl in the run folder has all",
                self.logger.name,
                missed,
            )
        try:
            self.logger.finish(status, model=model, reports=reports)
        except StorageError as error:
            logger.warning("%s; the run's own files are not affected", error)


def flatten_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested settings by dotted name; lists stay values."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten_settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
