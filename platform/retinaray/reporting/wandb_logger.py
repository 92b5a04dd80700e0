"""Tells Weights & Biases of a run; its own process does the sending, so nothing here waits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from retinaray.errors import ConfigError, StorageError
from retinaray.reporting.experiment_loggers import Measurement, Status

logger = logging.getLogger(__name__)


class WandbLogger:
    r"""One run of Weights & Biases; a resumed run goes on under the same id.

    Args:
        folder: Where W&B keeps its own files, below `wandb/`.
        project: Name of the project.
        run_id: Of the run; `/\#?%:` become `-`.
        group: Name of the sweep that the run belongs to; none = it stands alone.
    """

    name = "Weights & Biases"

    def __init__(
        self, *, folder: Path, project: str, run_id: str, group: str | None = None
    ) -> None:
        self._folder = folder
        self._project = project
        self._id = "".join("-" if letter in "/\\#?%:" else letter for letter in run_id)
        self._group = group
        self._run: Any = None

    def begin(self, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Open the run; the tags go into its settings below `run`.

        Raises:
            ConfigError: If wandb is not installed.
            StorageError: If nobody is logged in, or the server does not answer.
        """
        wandb = _import_wandb()
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._explained("open the run"):
            self._run = wandb.init(
                project=self._project,
                id=self._id,
                name=self._id,
                dir=str(self._folder),
                config={**params, "run": dict(tags)},
                allow_val_change=True,
                resume="allow",
                group=self._group,
                # A sweep has several open at once.
                reinit="create_new",
                # What is printed here belongs to the command, not to the tracker.
                settings=wandb.Settings(console="off"),
            )
            # A run that fell back to a checkpoint repeats steps, which W&B's own step refuses.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        logger.info("Weights & Biases run %s in project %r", self._id, self._project)

    def write(self, measurements: Sequence[Measurement]) -> None:
        """Keep values, all of one report together.

        Raises:
            StorageError: If wandb refuses them.
        """
        with self._explained("keep metrics"):
            for (step, _), rows in groupby(measurements, lambda row: (row.step, row.time_s)):
                self._run.log({"step": step, **{row.name: row.value for row in rows}})

    def finish(self, status: Status, *, model: Path | None, reports: Sequence[Path]) -> None:
        """Hand over files as artifacts `<id>-reports` and `<id>-model`, and close the run.

        Raises:
            StorageError: If wandb refuses.
        """
        try:
            with self._explained("keep the run's files"):
                self._hand_over("reports", reports)
                self._hand_over("model", [] if model is None else [model])
        finally:
            with self._explained("close the run"):
                self._run.finish(exit_code=0 if status == "FINISHED" else 1)

    def _hand_over(self, kind: str, paths: Sequence[Path]) -> None:
        if not paths:
            return
        artifact = _import_wandb().Artifact(f"{self._id}-{kind}", type=kind)
        for path in paths:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    @contextmanager
    def _explained(self, task: str) -> Iterator[None]:
        try:
            yield
        # wandb raises its own errors, those of requests, and plain ValueErrors.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise StorageError(
                f"Weights & Biases did not {task}: {type(error).__name__}: {reason}; check "
                "WANDB_API_KEY and WANDB_BASE_URL, or set WANDB_MODE=offline"
            ) from error


def _import_wandb() -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tracking.wandb (--wandb) needs the wandb package ({error}): "
            "pip install 'retinaray[wandb]', or leave --wandb out"
        ) from error
    return wandb
