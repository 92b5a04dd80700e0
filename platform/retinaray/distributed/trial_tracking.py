"""What the trackers of experiments are told of a sweep: a run of its own, and its trials below.

The sweep's run is open while it lasts; its trials are told when it ends, from the files that they
left, because a trial is stopped by ending its process.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retinaray.assembly.tracking import make_experiment_run, make_loggers
from retinaray.config.loading import to_dict
from retinaray.config.training_schema import TrackingConfig
from retinaray.distributed.sweep_results import TrialRecord
from retinaray.distributed.trial import TrialTask
from retinaray.errors import StorageError
from retinaray.reporting.experiment_loggers import ExperimentLogger, ExperimentRun
from retinaray.reporting.mlflow_logger import MlflowLogger
from retinaray.reporting.training_log import read_events

logger = logging.getLogger(__name__)

_SWEEP_FILES = (
    "sweep.json",
    "trials.csv",
    "best.yaml",
    "thresholds.csv",
    "parallel_coordinates.png",
    "ap_latency.png",
    "threshold_sweep.png",
    "operating_points.png",
)
_TRIAL_FILES = ("trial.json", "metrics.jsonl", "loss.png")


class SweepTracking:
    """The trackers of one sweep; without any it does nothing.

    Args:
        tracking: Which, and where.
        record: Of the sweep: its settings and versions.
        folder: Of the sweep, whose name is the run's.

    Raises:
        ConfigError: If the address of MLflow holds a password.
    """

    def __init__(self, tracking: TrackingConfig, record: Mapping[str, Any], folder: Path) -> None:
        self._tracking = tracking
        self._versions: Mapping[str, str] = record["versions"]
        self._folder = folder
        self._loggers: list[ExperimentLogger] = make_loggers(
            tracking, folder=folder, run_id=folder.name
        )
        self.run: ExperimentRun = make_experiment_run(
            self._loggers,
            {"job": record["settings"], "versions": self._versions},
            verb="tune",
            folder=folder,
            model=folder / "best.pth",
            reports=[folder / name for name in _SWEEP_FILES],
            is_model_wanted=tracking.upload_model,
        )

    def tell_trials(self, trials: Sequence[TrialRecord], task: TrialTask) -> None:
        """Report every trial with its settings, all its metrics and its files.

        A tracker that does not answer costs a warning and the rest of the trials, not the sweep.
        """
        if not self._loggers:
            return
        try:
            for trial in trials:
                self._tell(trial, task)
        except StorageError as error:
            logger.warning("%s; trials.csv has all trials", error)

    def _tell(self, trial: TrialRecord, task: TrialTask) -> None:
        folder = task.trial_folder(trial.trial_id)
        metrics = folder / "metrics.jsonl"
        sweep = self._folder.name
        ids = (entry.run_id for entry in self._loggers if isinstance(entry, MlflowLogger))
        # Of the time of its last report: MLflow keeps what comes again after a resumption once.
        time_s = metrics.stat().st_mtime if metrics.exists() else 0.0
        run = make_experiment_run(
            make_loggers(
                self._tracking,
                folder=folder,
                run_id=f"{sweep}-{trial.trial_id}",
                group=sweep,
                parent_id=next(ids, None),
            ),
            {
                "job": to_dict(task.make_job(trial.point, trial.trial_id)),
                "versions": self._versions,
            },
            verb="tune",
            folder=folder,
            model=trial.checkpoint or folder,
            reports=[folder / name for name in _TRIAL_FILES],
            is_model_wanted=False,
            clock=lambda: time_s,
        )
        run.begin()
        for event in read_events(folder) if metrics.exists() else ():
            run.write(event)
        if trial.score is not None:
            run.write({"kind": "trial", "step": trial.steps, "score": trial.score})
        run.finish("FAILED" if trial.status == "failed" else "FINISHED")
