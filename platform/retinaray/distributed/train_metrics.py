"""Prometheus series of a training, exported by Ray's agent of each worker's node.

Ray puts `ray_` before each name, as told in `infer_metrics`.
"""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback
from ray.util.metrics import Counter, Gauge, Histogram

from retinaray.training.loop import Progress

_TAGS = ("run_id",)
# From a tiny network on a GPU to a large batch on a few cores.
_STEP_SECONDS = [0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0]
_CHECKPOINT_SECONDS = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0]


class TrainMetrics:
    """Counts what one training worker did; made in the worker.

    Series, each with run_id and Ray's own WorkerId:

    - retinaray_train_step_seconds: histogram, of every worker. The host does not wait for the
      device within a report's steps, so each of them counts as their mean;
    - retinaray_train_images_per_second: gauge, of all workers together, from rank 0;
    - retinaray_train_map: gauge, COCO AP of the last validation, from rank 0;
    - retinaray_train_checkpoint_seconds: histogram, for how long the training stood still to write
      and hand over a checkpoint, without its validation, from rank 0;
    - retinaray_train_skipped_steps_total: steps without a finite gradient, from rank 0.

    Args:
        run_id: Of the run.
        rank: Of the worker.
        batch: Images per step over all workers.
        first_step: Steps that were taken before this worker started.
    """

    def __init__(self, run_id: str, *, rank: int, batch: int, first_step: int) -> None:
        self._batch = batch
        self._step = first_step
        self._is_first = rank == 0
        tags = {"run_id": run_id}
        self._step_s = _make(Histogram, "step_seconds", "Seconds per step", tags, _STEP_SECONDS)
        self._rate = _make(Gauge, "images_per_second", "Images per second of all workers", tags)
        self._map = _make(Gauge, "map", "COCO AP of the last validation", tags)
        self._checkpoint_s = _make(
            Histogram, "checkpoint_seconds", "Seconds per checkpoint", tags, _CHECKPOINT_SECONDS
        )
        self._skipped = _make(
            Counter, "skipped_steps_total", "Steps without a finite gradient", tags
        )

    def count_progress(self, progress: Progress) -> None:
        """Count the steps of one report."""
        for _ in range(progress.step - self._step):
            self._step_s.observe(self._batch / progress.images_per_s)
        self._step = progress.step
        if self._is_first:
            self._rate.set(progress.images_per_s)
            # A counter of Ray refuses to be raised by nothing.
            if progress.num_skipped:
                self._skipped.inc(progress.num_skipped)

    def note_map(self, average_precision: float | None) -> None:
        """Show the AP of a validation; None = there was no ground truth."""
        if self._is_first and average_precision is not None:
            self._map.set(average_precision)

    def count_checkpoint(self, seconds: float) -> None:
        """Count one checkpoint."""
        self._checkpoint_s.observe(seconds)


class TrainErrors(UserCallback):
    """Counts workers that failed or were lost: retinaray_train_errors_total, with run_id.

    Lives in the training's controller, which outlives its workers.

    Args:
        run_id: Of the run.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._errors: Any = None

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Count one failure of the group."""
        del run_context
        # Made in the controller: a series belongs to the process that it was made in.
        if self._errors is None:
            tags = {"run_id": self._run_id}
            self._errors = _make(Counter, "errors_total", "Workers that failed or were lost", tags)
        self._errors.inc(len(worker_exceptions))


def _make(kind: type[Any], name: str, text: str, tags: dict[str, str], *boundaries: Any) -> Any:
    extra = {"boundaries": boundaries[0]} if boundaries else {}
    metric = kind(f"retinaray_train_{name}", text, tag_keys=_TAGS, **extra)
    metric.set_default_tags(tags)
    return metric
