"""Tells MLflow of a run; the id that MLflow gave it is kept in the run folder for a resumed run."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from retinaray.errors import ConfigError, StorageError
from retinaray.reporting.experiment_loggers import Measurement, Status

logger = logging.getLogger(__name__)

RECORD_FILE = "mlflow.json"
_ADVICE = (
    "check that the server runs, --mlflow-uri or MLFLOW_TRACKING_URI, and "
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN"
)
# Limits of MLflow's REST API.
_MAX_METRICS = 1000
_MAX_PARAMS = 100
_MAX_NAME = 250
_MAX_PARAM = 6000
_MAX_TAG = 8000
_FOREIGN = re.compile(r"[^\w\-. /]", re.ASCII)
_DEFAULTS = {
    # It would print to standard output, which is for the command's result alone.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Its own seven tries take four minutes, in which nothing else of the run is shown.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


class MlflowLogger:
    """One run of MLflow.

    Args:
        folder: Run folder: a run that an earlier command began there goes on, if it is still there.
        experiment: Its name; made when absent.
        run_name: What the run is called in MLflow.
        uri: Server or store; none = as MLflow is configured.
        shown_uri: The same for people and files: without a password.
        parent_id: MLflow's id of the sweep that the run belongs to; none = it stands alone.
    """

    name = "MLflow"

    def __init__(
        self,
        *,
        folder: Path,
        experiment: str,
        run_name: str,
        uri: str | None = None,
        shown_uri: str | None = None,
        parent_id: str | None = None,
    ) -> None:
        self._record = folder / RECORD_FILE
        self._experiment = experiment
        self._run_name = run_name
        self._uri = uri
        self._shown = shown_uri or uri or ""
        self._parent_id = parent_id
        self._client: Any = None
        self._run_id = ""

    def begin(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Open the run; settings that a resumed run may have changed become tags `resumed.*`.

        Raises:
            ConfigError: If mlflow is not installed.
            StorageError: If the server does not answer or refuses.
        """
        mlflow = _import_mlflow()
        if self._uri is None:
            self._uri = self._shown = str(mlflow.get_tracking_uri())
        if self._parent_id is not None:
            tags = {**tags, "mlflow.parentRunId": self._parent_id}
        with self._explained("open the run"):
            self._client = mlflow.MlflowClient(tracking_uri=self._uri)
            run = self._find_run()
            if run is None:
                run = self._client.create_run(self._find_experiment(), run_name=self._run_name)
            else:
                self._client.update_run(run.info.run_id, status="RUNNING")
            self._run_id = run.info.run_id
            self._log_settings(run.data.params, params, tags)
        self._keep_record()
        logger.info(
            "MLflow run %s in experiment %r at %s", self._run_id, self._experiment, self._shown
        )

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; empty before it began."""
        return self._run_id

    def write(self, measurements: Sequence[Measurement]) -> None:
        """Keep values; MLflow takes the same value of the same time once.

        Raises:
            StorageError: If the server does not answer or refuses.
        """
        from mlflow.entities import Metric

        rows = (
            Metric(clean_name(entry.name), entry.value, round(1000 * entry.time_s), entry.step)
            for entry in measurements
        )
        with self._explained("keep metrics"):
            while batch := list(islice(rows, _MAX_METRICS)):
                self._client.log_batch(self._run_id, metrics=batch, synchronous=True)

    def finish(self, status: Status, *, model: Path | None, reports: Sequence[Path]) -> None:
        """Hand over files, the weights below `model/`, and set the status.

        Raises:
            StorageError: If the server does not answer or refuses; the status is set even where
                only the files were refused.
        """
        try:
            with self._explained("keep the run's files"):
                for path in reports:
                    self._client.log_artifact(self._run_id, str(path))
                if model is not None:
                    self._client.log_artifact(self._run_id, str(model), "model")
        finally:
            with self._explained("close the run"):
                self._client.set_terminated(self._run_id, status)

    def _find_run(self) -> Any:
        """The run of an earlier command in this folder; None when there is none in this store."""
        from mlflow.exceptions import MlflowException

        if not self._record.exists():
            return None
        found = json.loads(self._record.read_text(encoding="utf-8"))
        if (found["tracking_uri"], found["experiment"]) != (self._shown, self._experiment):
            return None
        try:
            run = self._client.get_run(found["run_id"])
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage == "deleted":
            logger.warning(
                "MLflow run %s of %s was deleted: a new one begins", found["run_id"], self._record
            )
            return None
        return run

    def _find_experiment(self) -> str:
        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is None:
            return str(self._client.create_experiment(self._experiment))
        return str(experiment.experiment_id)

    def _log_settings(
        self, known: Mapping[str, str], params: Mapping[str, object], tags: Mapping[str, str]
    ) -> None:
        from mlflow.entities import Param, RunTag

        texts = {clean_name(key): str(value)[:_MAX_PARAM] for key, value in params.items()}
        # A parameter of MLflow cannot be changed, and asking for it is an error.
        changed = {f"resumed.{k}": v for k, v in texts.items() if known.get(k, v) != v}
        fresh = iter([Param(key, text) for key, text in texts.items() if key not in known])
        while batch := list(islice(fresh, _MAX_PARAMS)):
            self._client.log_batch(self._run_id, params=batch, synchronous=True)
        notes = iter(
            [RunTag(clean_name(k), str(v)[:_MAX_TAG]) for k, v in {**tags, **changed}.items()]
        )
        while batch := list(islice(notes, _MAX_PARAMS)):
            self._client.log_batch(self._run_id, tags=batch, synchronous=True)

    def _keep_record(self) -> None:
        content = {
            "tracking_uri": self._shown,
            "experiment": self._experiment,
            "run_id": self._run_id,
        }
        self._record.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: half a record would stop the next command in this folder.
        temporary = self._record.with_name(f"{self._record.name}.part")
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(self._record)

    @contextmanager
    def _explained(self, task: str) -> Iterator[None]:
        try:
            yield
        # Its stores of metrics and of files bring errors of their own: requests, boto3, SQLAlchemy.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            if self._uri:
                reason = reason.replace(self._uri, self._shown)
            raise StorageError(
                f"MLflow at {self._shown} did not {task}: {type(error).__name__}: {reason}; "
                f"{_ADVICE}"
            ) from error


def clean_name(name: str) -> str:
    """A name that MLflow accepts: letters, digits, `_-. /`, at most 250; others become `_`."""
    return _FOREIGN.sub("_", name)[:_MAX_NAME]


def _import_mlflow() -> Any:
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tracking.mlflow (--mlflow) needs the mlflow package ({error}): "
            "pip install 'retinaray[mlflow]', or leave --mlflow out"
        ) from error
    return mlflow
