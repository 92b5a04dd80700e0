"""Training with Ray Train: the driver's side, from a job to kept weights."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from retinaray.assembly.coverage_check import check_coverage
from retinaray.assembly.image_check import check_images
from retinaray.assembly.job_plan_workers import ClusterSize, WorkerPlan, plan_training
from retinaray.assembly.reading import absolute_uri
from retinaray.assembly.tracking import check_tracking, make_experiment_run, make_loggers
from retinaray.assembly.training import (
    TrainingInputs,
    check_settings,
    count_steps,
    find_schedule_oddities,
    make_card,
    read_inputs,
    resolve_paths,
)
from retinaray.assembly.training_inputs import find_size_oddities
from retinaray.config.loading import load_from_dict, to_dict
from retinaray.config.schema import TrainJob
from retinaray.distributed.resources import connect
from retinaray.distributed.run_store import RunStore
from retinaray.distributed.stop_signals import StopSignal, catch_signals, end_process
from retinaray.distributed.train_records import open_run
from retinaray.errors import CheckpointError, ClusterError, ConfigError
from retinaray.log_format import log_fields
from retinaray.reporting.experiment_loggers import ExperimentRun
from retinaray.reporting.training_log import TrainingLog, read_events
from retinaray.reporting.training_progress import TrainingView
from retinaray.storage import Storage, is_s3, join_uri
from retinaray.training.checkpoint_files import read_manifest, read_verified
from retinaray.training.state import WEIGHTS_FILE

if TYPE_CHECKING:
    from retinaray.distributed.train_events import TrainEvents

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOutcome:
    """What a training left.

    Attributes:
        model: Weights file: the best by validation AP, or the last without validation.
        run_folder: Checkpoints, metrics, curves.
        metrics: Of the kept weights: AP, AP50, epoch, step.
        steps: Steps taken in all.
        seconds: Wall time of this command.
        recoveries: Seconds from each interruption to the first step after it.
        skipped_images: Images in steps without a finite gradient; listed in the run folder.
        exit_code: 0.
    """

    model: str
    run_folder: str
    metrics: Mapping[str, Any]
    steps: int
    seconds: float
    recoveries: tuple[float, ...] = ()
    skipped_images: int = 0
    exit_code: int = 0

    def to_json(self) -> str:
        """One line for machines."""
        return json.dumps(asdict(self))

    def to_text(self) -> str:
        """A few lines for people."""
        score = self.metrics.get("AP")
        kept = "last weights, no validation set"
        if score is not None:
            kept = f"epoch {self.metrics['epoch']:.4g}, validation AP {score:.3f}"
            kept += f", AP50 {self.metrics['AP50']:.3f}"
        lines = [
            f"{self.steps} steps in {self.seconds:.0f} s",
            f"weights  {self.model}  ({kept})",
            f"run      {self.run_folder}  (loss.png, metrics.jsonl, tensorboard/, last.pth)",
        ]
        if self.recoveries:
            times = ", ".join(f"{seconds:.0f} s" for seconds in self.recoveries)
            lines.append(f"survived {len(self.recoveries)} interruptions, going on after {times}")
        if self.skipped_images:
            lines.append(
                f"skipped  {self.skipped_images} images in steps without a finite gradient "
                "(skipped_images.jsonl)"
            )
        return "\n".join(lines)


def run_training(job: TrainJob) -> TrainOutcome:
    """Train a detector; resumes by itself where an interrupted run of the same settings left off.

    Raises:
        ConfigError: If the output is not local, or holds a run with other settings, or a tracker's
            package is not installed.
        DatasetError: If the data cannot be learnt from.
        CheckpointError: If backbone weights cannot be used, or none of the run's checkpoints.
        StorageError: If checkpoints cannot be reached, or a tracker does not answer at the start.
        ClusterError: If the cluster is too small, or the training failed more often than allowed.
        SystemExit: After SIGTERM, when a checkpoint is kept.
        KeyboardInterrupt: After Ctrl-C, when a checkpoint is kept.
    """
    start = time.monotonic()
    if is_s3(job.output):
        raise ConfigError(f"output={job.output!r}: expected a local path for the weights file")
    check_tracking(job.tracking)
    job = _resolve_storage(resolve_paths(job))
    inputs = read_inputs(job)
    check_settings(job, inputs)
    check_images(job, inputs)
    folder = Path(job.output).with_suffix("")
    folder = folder.with_name(folder.name + "_run")
    if not job.model.is_random:
        # What a worker would refuse late, and where the user reads what was taken.
        make_card(job, inputs, run_id="")
    _announce(job, inputs)
    check_coverage(job, inputs)
    store = RunStore(job.run.storage or str(folder), job.reading.endpoint_url)
    record = open_run(job, folder, store)
    # The trackers are asked before a worker starts, and told last, when all files are there.
    with (
        log_fields(run_id=record["run_id"]),
        _track(job, folder, record) as tracked,
        connect(min_cpus=job.run.workers, counting_on=job.cluster) as cluster,
        catch_signals() as stop,
    ):
        plan = _plan_workers(job, cluster)
        with TrainingLog(folder) as log, TrainingView() as view:

            def handle(event: Mapping[str, Any]) -> None:
                log.write(event)
                if event["kind"] != "recovery":
                    view.show(event)
                tracked.write(event)

            events = _make_events(folder, handle)
            result = _fit(job, plan, record["run_id"], store, events, stop)
            metrics = _keep_weights(result, job, folder, store, record["run_id"])
        tracked.write({"kind": "kept", **metrics["kept"]})
    return TrainOutcome(
        model=job.output,
        run_folder=str(folder),
        metrics=metrics["kept"],
        steps=metrics["steps"],
        seconds=round(time.monotonic() - start, 1),
        recoveries=tuple(events.recoveries),
        skipped_images=events.num_skipped_images,
    )


def _resolve_storage(job: TrainJob) -> TrainJob:
    if job.run.storage is None:
        return job
    changes = {"run.storage": absolute_uri(job.run.storage)}
    return load_from_dict(TrainJob, to_dict(job), changes)


def _plan_workers(job: TrainJob, cluster: ClusterSize) -> WorkerPlan:
    """The workers of a full cluster; refused only if not even the least number fits now."""
    least = job.run.min_workers or job.run.workers
    plan = plan_training(least, cluster)
    threads = max(1, int(cluster.num_cpus / job.run.workers))
    return replace(plan, num_workers=job.run.workers, num_threads=threads)


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
    oddities = find_schedule_oddities(job, len(train)) + find_size_oddities(job, inputs)
    for oddity in oddities:
        logger.warning("%s", oddity)


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


def _make_events(folder: Path, handle: Any) -> TrainEvents:
    from retinaray.distributed.train_events import TrainEvents

    steps = [event["step"] for event in read_events(folder) if event["kind"] == "progress"]
    return TrainEvents(folder, handle, last_step=max(steps, default=0))


def _fit(
    job: TrainJob,
    plan: WorkerPlan,
    run_id: str,
    store: RunStore,
    events: TrainEvents,
    stop: StopSignal,
) -> Any:
    """Ray's result of a training that came to its end.

    Raises:
        ClusterError: If it failed.
        SystemExit: If a signal stopped it; KeyboardInterrupt if that was Ctrl-C.
    """
    from retinaray.distributed.train_run import RunSetup, fit_workers

    setup = RunSetup(
        run_id=run_id,
        store=store,
        events=events,
        stop=stop,
        min_workers=job.run.min_workers,
        keep_every=job.run.keep_every,
        checkpoint_minutes=job.run.checkpoint_minutes,
    )
    cause, result = "", None
    try:
        result = fit_workers(job, plan, setup)
    except ClusterError as error:
        if stop.number is None:
            raise
        cause = f" ({error})"
    if stop.number is None or (result is not None and result.return_value != "stopped"):
        return result
    kept = "no checkpoint yet"
    if events.checkpoint is not None:
        kept = f"kept {events.checkpoint['folder']}"
    name = signal.Signals(stop.number).name
    logger.warning("stopped by %s: %s%s; the same command goes on from there", name, kept, cause)
    return end_process(stop.number)


def _keep_weights(
    result: Any, job: TrainJob, folder: Path, store: RunStore, run_id: str
) -> dict[str, Any]:
    """Copy the best weights to the output and the last beside the run's other files.

    Raises:
        CheckpointError: If the last weights, or those of every good checkpoint, are damaged.
    """

    def copy(checkpoint: Any, target: Path) -> None:
        source = join_uri(store.checkpoints, PurePosixPath(checkpoint.path).name)
        manifest = read_manifest(source, run_id=run_id, files=store.files)
        content = read_verified(source, WEIGHTS_FILE, manifest=manifest, files=store.files)
        Storage().write_bytes(str(target), content)

    copy(result.checkpoint, folder / "last.pth")
    ranked = sorted(result.best_checkpoints, key=lambda pair: pair[1]["score"], reverse=True)
    for checkpoint, metrics in ranked:
        try:
            copy(checkpoint, Path(job.output))
        except CheckpointError as error:
            logger.warning("weights are not used, the next best are: %s", error)
            continue
        kept = {key: metrics.get(key) for key in ("AP", "AP50", "AP75", "epoch", "step")}
        return {"kept": kept, "steps": result.metrics["step"]}
    raise CheckpointError(f"no weights in {store.checkpoints} can be used; train again")
