"""From settings to the trackers of a run: what they are told of it, and what is kept from them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from retinaray.config.training_schema import TrackingConfig
from retinaray.errors import ConfigError
from retinaray.reporting.experiment_loggers import (
    ExperimentLogger,
    ExperimentRun,
    flatten_settings,
)
from retinaray.reporting.mlflow_logger import MlflowLogger
from retinaray.reporting.wandb_logger import WandbLogger
from retinaray.storage import find_secret, hide_secret

_MLFLOW_URI = "MLFLOW_TRACKING_URI"


def make_loggers(
    tracking: TrackingConfig,
    *,
    folder: Path,
    run_id: str,
    group: str | None = None,
    parent_id: str | None = None,
) -> list[ExperimentLogger]:
    """The trackers that were asked for; nothing is imported or connected yet.

    Args:
        tracking: Which, and where.
        folder: Run folder.
        run_id: What the run is called.
        group: Name of the sweep that the run is a trial of.
        parent_id: MLflow's id of that sweep.

    Raises:
        ConfigError: If the address of MLflow holds a password.
    """
    loggers: list[ExperimentLogger] = []
    if tracking.mlflow:
        check_tracking(tracking)
        uri = tracking.mlflow_uri or os.environ.get(_MLFLOW_URI) or None
        loggers.append(
            MlflowLogger(
                folder=folder,
                experiment=tracking.experiment,
                run_name=run_id,
                uri=uri,
                shown_uri=None if uri is None else hide_secret(uri),
                parent_id=parent_id,
            )
        )
    if tracking.wandb:
        loggers.append(
            WandbLogger(folder=folder, project=tracking.experiment, run_id=run_id, group=group)
        )
    return loggers


def check_tracking(tracking: TrackingConfig) -> None:
    """Refuse an address that must not stand in a run record.

    Raises:
        ConfigError: If the address of MLflow holds a password; the text does not.
    """
    secret = find_secret(tracking.mlflow_uri or "")
    if secret:
        raise ConfigError(
            f"tracking.mlflow_uri={hide_secret(str(tracking.mlflow_uri))} holds {secret}: give the "
            f"address without it, and MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; the "
            f"address of a database can stand in {_MLFLOW_URI}"
        )


def make_experiment_run(
    loggers: Sequence[ExperimentLogger],
    record: Mapping[str, Any],
    *,
    verb: str,
    folder: Path,
    model: Path,
    reports: Sequence[Path],
    is_model_wanted: bool,
    clock: Callable[[], float] = time.time,
) -> ExperimentRun:
    """What the trackers are told of a run.

    Args:
        loggers: The trackers.
        record: Of the run: its `job` and its `versions`.
        verb: The command.
        folder: Run folder.
        model: File of the kept weights.
        reports: Files for people; those that there are at the end are handed over.
        is_model_wanted: Whether the weights are handed over, too.
        clock: When a report comes, in seconds since 1970.
    """
    params = {
        name: hide_secret(value) if isinstance(value, str) else value
        for name, value in flatten_settings(record["job"]).items()
        # Where a run is reported to is no property of it.
        if not name.startswith("tracking.")
    }
    versions: Mapping[str, str] = record["versions"]
    tags = {f"version.{name}": version for name, version in versions.items()}
    tags |= {"run_folder": str(folder), "model": str(model)}
    tags |= {"mlflow.source.name": f"retinaray {verb}", "mlflow.source.type": "LOCAL"}
    if versions.get("commit", "unknown") != "unknown":
        tags["mlflow.source.git.commit"] = versions["commit"]
    return ExperimentRun(
        loggers,
        params=params,
        tags=tags,
        model=model if is_model_wanted else None,
        reports=reports,
        clock=clock,
    )
