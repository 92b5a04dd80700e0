"""Training with Ray Train: the driver's side, from a job to kept weights."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from retinaray.assembly.coverage_check import check_coverage
from retinaray.assembly.job_plan_workers import WorkerPlan, plan_training
from retinaray.assembly.provenance import collect_versions, make_run_id
from retinaray.assembly.reading import make_reader
from retinaray.assembly.tracking import check_tracking, make_experiment_run, make_loggers
from retinaray.assembly.training import (
    TrainingInputs,
    check_objective,
    count_steps,
    read_inputs,
    resolve_paths,
)
from retinaray.config.loading import to_dict
from retinaray.config.nodes import ClusterConfig
from retinaray.config.schema import TrainJob
from retinaray.config.training_schema import TrackingConfig
from retinaray.distributed.resources import connect
from retinaray.distributed.run_settings import compare_settings
from retinaray.errors import ConfigError
from retinaray.log_format import log_fields
from retinaray.reporting.experiment_loggers import ExperimentRun
from retinaray.reporting.training_log import TrainingLog
from retinaray.reporting.training_progress import TrainingView
from retinaray.storage import Storage, is_s3
from retinaray.training.state import WEIGHTS_FILE

logger = logging.getLogger(__name__)

# Settings that may change when a training is resumed: they do not change what is computed.
_FREE_SETTINGS = (
    "run.override",
    "run.workers",
    "run.max_failures",
    "run.log_every",
    "run.strict_anchors",
    "data.loader_processes",
    "reading.threads",
    # As a whole, because the records of older runs do not have it.
    "tracking",
    "cluster",
    *(f"cluster.{name}" for name in ClusterConfig.model_fields),
    *(f"tracking.{name}" for name in TrackingConfig.model_fields),
)


@dataclass(frozen=True)
class TrainOutcome:
    """What a training left.

    Attributes:
        model: Weights file: the best by validation AP, or the last without validation.
        run_folder: Checkpoints, metrics, curves.
        metrics: Of the kept weights: AP, AP50, epoch, step.
        steps: Steps taken in all.
        seconds: Wall time of this command.
        exit_code: 0.
    """

    model: str
    run_folder: str
    metrics: Mapping[str, Any]
    steps: int
    seconds: float
    exit_code: int = 0

    def to_json(self) -> str:
        """One line for machines."""
        return json.dumps(asdict(self))

    def to_text(self) -> str:
        """A few lines for people."""
        score = self.metrics.get("AP")
        kept = "last weights (no validation set)"
        if score is not None:
            kept = f"epoch {self.metrics['epoch']:.4g}, validation AP {score:.3f}"
            kept += f", AP50 {self.metrics['AP50']:.3f}"
        return (
            f"{self.steps} steps in {self.seconds:.0f} s\n"
            f"weights  {self.model}  ({kept})\n"
            f"run      {self.run_folder}  (loss.png, metrics.jsonl, tensorboard/, last.pth)"
        )


def run_training(job: TrainJob) -> TrainOutcome:
    """Train a detector; resumes by itself where an interrupted run of the same settings left off.

    Raises:
        ConfigError: If the output is not local, or holds a run with other settings, or a tracker's
            package is not installed.
        DatasetError: If the data cannot be learnt from.
        CheckpointError: If backbone weights cannot be used.
        StorageError: If a tracker of experiments does not answer at the start.
        ClusterError: If the cluster is too small, or the training failed more often than allowed.
    """
    start = time.monotonic()
    if is_s3(job.output):
        raise ConfigError(f"output={job.output!r}: expected a local path for the weights file")
    check_tracking(job.tracking)
    job = resolve_paths(job)
    inputs = read_inputs(job)
    folder = Path(job.output).with_suffix("")
    folder = folder.with_name(folder.name + "_run")
    check_objective(job, inputs)
    _announce(job, inputs)
    check_coverage(job, inputs)
    record = _open_run(job, folder)
    # The trackers are asked before a worker starts, and told last, when all files are there.
    with (
        log_fields(run_id=record["run_id"]),
        _track(job, folder, record) as tracked,
        connect(min_cpus=job.run.workers, counting_on=job.cluster) as cluster,
    ):
        plan = plan_training(job.run.workers, cluster)
        with TrainingLog(folder) as log, TrainingView() as view:
            handlers = (log.write, view.show, tracked.write)
            metrics = _fit(job, plan, folder, record, handlers)
        tracked.write({"kind": "kept", **metrics["kept"]})
    return TrainOutcome(
        model=job.output,
        run_folder=str(folder),
        metrics=metrics["kept"],
        steps=metrics["steps"],
        seconds=round(time.monotonic() - start, 1),
    )


def _announce(job: TrainJob, inputs: TrainingInputs) -> None:
    train = inputs.train
    logger.info(
        "%d training images, %d validation images, %d classes (%s), canvas %dx%d (height x "
        "width), %d steps of %d",
        len(train),
        len(inputs.val or ()),
        len(train.categories),
        ", ".join(train.categories.names[:8]) + (", ..." if len(train.categories) > 8 else ""),
        *inputs.canvas,
        count_steps(job, len(train)),
        job.run.batch,
    )


def _open_run(job: TrainJob, folder: Path) -> dict[str, Any]:
    """The run's record: a new one, or that of the interrupted run in this folder.

    Raises:
        ConfigError: If the folder holds a run with other settings or data, and --override is not
            given.
    """
    read = make_reader(job.reading)
    annotations = {
        uri: hashlib.sha256(read(uri)).hexdigest()
        for uri in (job.data.annotations, job.data.val_annotations)
        if uri is not None
    }
    path = folder / "run.json"
    if path.exists() and not job.run.override:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        differences = compare_settings(found["job"], to_dict(job), free=_FREE_SETTINGS)
        if found["annotations_sha256"] != annotations:
            differences.append("the annotation files have changed")
        if differences:
            raise ConfigError(
                f"{folder} holds a run with other settings: {'; '.join(differences)}. "
                "Give another model path, or --override to start over (its checkpoints are removed)"
            )
        logger.info("resuming run %s in %s", found["run_id"], folder)
        return found
    _clear(folder, is_asked_for=job.run.override)
    record = {
        "run_id": make_run_id(),
        "job": to_dict(job),
        "annotations_sha256": annotations,
        "versions": collect_versions(),
    }
    # Whole or not at all: half a record would stop the next command in this folder.
    Storage().write_bytes(str(path), json.dumps(record, indent=1).encode())
    return record


def _clear(folder: Path, *, is_asked_for: bool) -> None:
    """Make an empty folder; what is no training's is removed only on --override.

    Raises:
        ConfigError: If there is something else, and nobody said that it may go.
    """
    if folder.exists():
        is_run = folder.is_dir() and (not any(folder.iterdir()) or (folder / "run.json").exists())
        if not (is_run or (folder.is_dir() and is_asked_for)):
            raise ConfigError(
                f"{folder} is needed for the run, but it is there with no run.json in it: give "
                "another model path, move it away, or --override to remove it"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _track(job: TrainJob, folder: Path, record: Mapping[str, Any]) -> ExperimentRun:
    loggers = make_loggers(job.tracking, folder=folder, run_id=record["run_id"])
    return make_experiment_run(
        loggers,
        # Settings of this command: a resumed run may have other workers than its record says.
        {**record, "job": to_dict(job)},
        verb="train",
        folder=folder,
        model=Path(job.output),
        reports=[folder / name for name in ("run.json", "metrics.jsonl", "loss.png")],
        is_model_wanted=job.tracking.upload_model,
    )


def _fit(
    job: TrainJob,
    plan: WorkerPlan,
    folder: Path,
    record: Mapping[str, Any],
    handlers: Sequence[Callable[[Mapping[str, Any]], None]],
) -> dict[str, Any]:
    from retinaray.distributed.train_run import run_workers

    def handle(event: dict[str, Any]) -> None:
        for entry in handlers:
            entry(event)

    result = run_workers(job, plan, folder=folder, run_id=record["run_id"], handle_event=handle)
    return _keep_weights(result, Path(job.output), folder)


def _keep_weights(result: Any, output: Path, folder: Path) -> dict[str, Any]:
    """Copy the best weights to the output and the last beside the checkpoints."""
    best = max(result.best_checkpoints, key=lambda pair: pair[1]["score"])
    _copy_weights(result.checkpoint, folder / "last.pth")
    _copy_weights(best[0], output)
    kept = {key: best[1].get(key) for key in ("AP", "AP50", "AP75", "epoch", "step")}
    return {"kept": kept, "steps": result.metrics["step"]}


def _copy_weights(checkpoint: Any, target: Path) -> None:
    with checkpoint.as_directory() as source:
        temporary = target.with_name(target.name + ".part")
        shutil.copyfile(Path(source) / WEIGHTS_FILE, temporary)
        temporary.replace(target)
