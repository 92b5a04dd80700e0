"""One trial of a sweep: a drawn point becomes a training, and proves that it was applied."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from retinaray.assembly.job_plan_workers import WorkerPlan
from retinaray.config.loading import load_from_dict, to_dict
from retinaray.config.schema import TrainJob
from retinaray.config.search_space import decode_point, make_changes
from retinaray.distributed.checkpoint_keeping import is_scored
from retinaray.distributed.train_run import run_workers
from retinaray.errors import DivergenceError
from retinaray.log_format import WorkerLog, start_worker_log
from retinaray.reporting.training_log import TrainingLog

CHECKPOINT_PATH = "checkpoint_path"


class _TellScores(TuneReportCallback):
    """Hands reports on to Tune, which compares trials by each: only those with a score.

    A checkpoint at a machine's notice has none, and would end its trial as the worst of all.
    """

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Called by Ray Train after all workers have reported; `metrics` has a row of each."""
        if is_scored(metrics[0]):
            super().after_report(run_context, metrics, checkpoint)


@dataclass(frozen=True)
class TrialTask:
    """What all trials of a sweep share.

    Attributes:
        tree: Settings of the training that is varied, with absolute paths.
        folder: Of the sweep; each trial has one below `trials/`.
        workers: Resources of one trial.
        janitor: A Janitor actor; none = resources of stopped trials are not given back.
        log: How the sweep's driver logs; none = in plain lines.
    """

    tree: Mapping[str, Any]
    folder: str
    workers: WorkerPlan
    janitor: Any = None
    log: WorkerLog | None = None

    def trial_folder(self, trial_id: str) -> Path:
        """Where a trial keeps everything that it makes."""
        return Path(self.folder) / "trials" / trial_id

    def make_job(self, point: Mapping[str, object], trial_id: str) -> TrainJob:
        """The training of a drawn point."""
        changes = make_changes(decode_point(point), self.tree)
        output = str(self.trial_folder(trial_id) / "model.pth")
        return load_from_dict(TrainJob, self.tree, {**changes, "output": output})


def run_trial(point: dict[str, Any], task: TrialTask) -> None:
    """Train one point; entered by Ray Tune in a process of its own on the head.

    Args:
        point: Values by key of the space.
        task: What the trials share.

    Raises:
        DivergenceError: If the training has no finite gradients any more, or had none when it was
            tried before.
    """
    trial_id = tune.get_context().get_trial_id()
    run_id = f"{Path(task.folder).name}-{trial_id}"
    start_worker_log(task.log, run_id=run_id)
    folder = task.trial_folder(trial_id)
    job = task.make_job(point, trial_id)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"point": decode_point(point), "job": to_dict(job)}
    (folder / "trial.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    # Tune counts how often a trial failed, whatever the reason; the same batches would come again.
    divergence = folder / "divergence.txt"
    if divergence.exists():
        raise DivergenceError(divergence.read_text(encoding="utf-8"))
    with TrainingLog(folder) as log:
        try:
            result = run_workers(
                job,
                task.workers,
                folder=folder,
                run_id=run_id,
                handle_event=log.write,
                callbacks=[_TellScores()],  # type: ignore[no-untyped-call]
                is_trial=True,
                janitor=task.janitor,
            )
        except DivergenceError as error:
            divergence.write_text(str(error), encoding="utf-8")
            raise
    # A sweep that was killed between the training's end and Tune's note of it restores a training
    # that has nothing left to report.
    metrics, checkpoint = result.metrics or {}, result.checkpoint
    tune.report({**metrics, CHECKPOINT_PATH: checkpoint.path if checkpoint else ""})
