"""What the driver makes of its workers' events: some are shown and kept, some are answered here."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from retinaray.distributed.failure_policy import is_users_fault

logger = logging.getLogger(__name__)

SKIPPED_FILE = "skipped_images.jsonl"
_STARTED_AGAIN = "the command was started again"
_LONGEST_REASON = 300
_SHOWN = ("progress", "validation")


class FailureNotes(UserCallback):
    """Posts each failure of the group of workers to the driver; lives in Ray's controller.

    A fault of settings or data is none: it ends the training, in its own words.

    Args:
        board: An `EventBoard`.
    """

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Post one failure that is survived."""
        del run_context
        if any(map(is_users_fault, worker_exceptions.values())):
            return
        lines = [str(error).strip().splitlines() for error in worker_exceptions.values()]
        reasons = [entry[-1] for entry in lines if entry]
        event = {"kind": "failure", "num_workers": len(worker_exceptions)}
        self._board.post.remote(
            {**event, "reason": reasons[0][:_LONGEST_REASON] if reasons else ""}
        )


class TrainEvents:
    """Sorts the events of one training.

    Losses and validations are handed on as they are. From failures and first steps follow
    `recovery` events, from steps without a finite gradient the lines of `SKIPPED_FILE`.

    Args:
        folder: Run folder, for `SKIPPED_FILE`.
        handle: Takes what is to be shown and kept: progress, validation and recovery.
        last_step: The last step that an interrupted command has reported; 0 for a new run.
        clock: Seconds; a restart is counted from the moment that this object is made.

    Attributes:
        recoveries: Seconds from each interruption to the first step after it.
        num_skipped_images: Images in steps without a finite gradient.
        checkpoint: The last one that is kept: `step` and `folder`; None before the first.
        is_running: Whether workers take steps.
    """

    def __init__(
        self,
        folder: Path,
        handle: Callable[[Mapping[str, Any]], None],
        *,
        last_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._handle = handle
        self._last_step = last_step
        self._reported_s: float | None = None
        self._clock = clock
        self._lost_s: float | None = clock()
        self._cause = _STARTED_AGAIN
        self.recoveries: list[float] = []
        self.num_skipped_images = 0
        self.checkpoint: Mapping[str, Any] | None = None
        self.is_running = False

    def handle(self, event: Mapping[str, Any]) -> None:
        """Take in one event of a worker or of Ray's controller."""
        kind = event["kind"]
        if kind in _SHOWN:
            self._last_step, self._reported_s = int(event["step"]), self._clock()
            self._handle(event)
        elif kind == "failure":
            self._note_failure(int(event["num_workers"]), str(event.get("reason", "")))
        elif kind == "running":
            self._note_first_step(event)
        elif kind == "checkpoint":
            self.checkpoint = event
        elif kind == "refused":
            logger.warning("a checkpoint is not used, the one before it is: %s", event["reason"])
        elif kind == "late":
            logger.warning(
                "no checkpoint within %.0f s of asking for one: workers are added all the same, "
                "and the steps since the last checkpoint are taken again",
                event["seconds"],
            )
        elif kind == "skipped":
            self._keep_skipped(event)

    def _note_failure(self, num_workers: int, reason: str) -> None:
        self.is_running = False
        logger.warning(
            "%d worker%s failed or lost: going back to the last checkpoint%s",
            num_workers,
            "" if num_workers == 1 else "s",
            f" ({reason})" if reason else "",
        )
        if self._lost_s is None:
            self._lost_s = self._clock()
            self._cause = "workers failed or were lost"

    def _note_first_step(self, event: Mapping[str, Any]) -> None:
        restored_step = int(event["restored_step"])
        lost_s, cause = self._lost_s, self._cause
        if self.is_running:
            # Nothing failed: Ray has put another group of workers in the place of the first.
            lost_s, cause = self._reported_s, "the workers were changed"
        self.is_running = True
        self._lost_s = None
        if lost_s is None or (cause == _STARTED_AGAIN and restored_step == 0):
            return
        seconds = round(self._clock() - lost_s, 1)
        self.recoveries.append(seconds)
        recovery = {
            "kind": "recovery",
            "step": int(event["step"]),
            "restored_step": restored_step,
            "seconds": seconds,
            "lost_steps": max(0, self._last_step - restored_step),
            "num_workers": int(event["num_workers"]),
            "cause": cause,
        }
        logger.info(
            "went on from step %(restored_step)d after %(seconds).1f s with %(num_workers)d "
            "workers, %(lost_steps)d steps are taken again (%(cause)s)",
            recovery,
        )
        self._handle(recovery)

    def _keep_skipped(self, event: Mapping[str, Any]) -> None:
        image_ids = list(event["image_ids"])
        self.num_skipped_images += len(image_ids)
        line = json.dumps({"step": event["step"], "image_ids": image_ids})
        with (self._folder / SKIPPED_FILE).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
