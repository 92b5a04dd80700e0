"""`tune`: the driver of a sweep, from a space to a tuned model that knows its thresholds."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from retinaray.assembly.coverage_check import check_coverage
from retinaray.assembly.image_check import check_images
from retinaray.assembly.job_plan_training import count_trials
from retinaray.assembly.job_plan_workers import SweepPlan, plan_sweep
from retinaray.assembly.provenance import collect_versions
from retinaray.assembly.reading import make_reader
from retinaray.assembly.tracking import check_tracking
from retinaray.assembly.training import (
    TrainingInputs,
    check_settings,
    read_inputs,
    resolve_paths,
)
from retinaray.assembly.warm_start import make_first_points
from retinaray.config.loading import load_from_dict, to_dict
from retinaray.config.schema import TrainJob, TuneJob
from retinaray.config.search_space import parse_space
from retinaray.distributed.resources import connect
from retinaray.distributed.run_settings import (
    CACHE_SETTINGS,
    CLUSTER_SETTINGS,
    compare_settings,
)
from retinaray.errors import ConfigError
from retinaray.log_format import describe_worker_log, log_fields
from retinaray.storage import Storage, is_s3

logger = logging.getLogger(__name__)

_TUNE_NAME = "ray_tune"
_RECORD_FILE = "sweep.json"
# Settings that may change when a sweep is resumed: they do not change what its trials compute.
_FREE_SETTINGS = (
    "run.override",
    "run.log_every",
    "run.max_failures",
    "run.checkpoint_minutes",
    "run.strict_anchors",
    "data.loader_processes",
    *CACHE_SETTINGS,
    "reading.threads",
    "sweep.rule",
    # As a whole, because the records of older sweeps do not have it.
    "tracking",
    *CLUSTER_SETTINGS,
)


@dataclass(frozen=True)
class SweepOutcome:
    """What a sweep left.

    Attributes:
        sweep: Its folder.
        best: The best trial: its id, point, score and metrics.
        model: Weights of the best trial, with the chosen thresholds and NMS in their card.
        config: Settings to train the best trial again.
        trials: Number of trials by status: done, stopped, failed.
        thresholds: Best suppression on the validation set, and the operating point of each class.
        table: Leaderboard, for people.
        seconds: Wall time of this command.
        exit_code: 0.
    """

    sweep: str
    best: Mapping[str, Any]
    model: str
    config: str
    trials: Mapping[str, int]
    thresholds: Mapping[str, Any]
    table: str
    seconds: float
    exit_code: int = 0

    def to_json(self) -> str:
        """One line for machines."""
        return json.dumps({key: value for key, value in asdict(self).items() if key != "table"})

    def to_text(self) -> str:
        """A table for people."""
        return (
            f"{self.table}\n"
            f"weights  {self.model}  (thresholds and NMS inside)\n"
            f"again    retinaray train retrained.pth --config {self.config}\n"
            f"sweep    {self.sweep}  (trials.csv, trials.parquet, plots)"
        )


def run_sweep(job: TuneJob) -> SweepOutcome:
    """Search a space; the same command resumes a sweep that was killed.

    Raises:
        ConfigError: If the output is not local, or holds a sweep with other settings, or a
            tracker's package is not installed.
        DatasetError: If the data cannot be learnt from.
        StorageError: If a tracker does not answer at the start.
        ClusterError: If the cluster is too small, or no trial succeeded.
    """
    start = time.monotonic()
    if is_s3(job.output):
        raise ConfigError(f"output={job.output!r}: expected a local folder for the sweep")
    check_tracking(job.tracking)
    folder = Path(job.output).expanduser().resolve()
    base = _make_base(job, folder)
    inputs = read_inputs(base)
    check_settings(base, inputs)
    check_images(base, inputs)
    check_coverage(base, inputs)
    record = _make_record(job, base)
    is_resumed = _is_resumed(job, record, folder)
    num_trials = count_trials(job)
    with ExitStack() as trackers:
        with connect(min_cpus=base.run.workers, counting_on=job.cluster) as cluster:
            plan = plan_sweep(
                num_trials=num_trials,
                # Ray Tune restores the number that the sweep was started with.
                num_concurrent=_read_concurrent(folder) if is_resumed else job.sweep.concurrent,
                num_workers=base.run.workers,
                cluster=cluster,
            )
            if not is_resumed:
                _begin(job, record, plan, folder)
            tracking = _track(job, record, folder, trackers)
            logger.info(
                "%d trials of %d worker%s, %d at once",
                num_trials,
                base.run.workers,
                "s" if base.run.workers > 1 else "",
                plan.num_concurrent,
            )
            records, task = _search(job, base, inputs, plan, folder)
        from retinaray.distributed.sweep_outputs import write_outputs

        tracking.tell_trials(records, task)
        outputs = write_outputs(records, task, inputs, job.sweep.rule, folder)
        tracking.run.write({"kind": "best", "step": 0, **outputs["best"]})
    return SweepOutcome(**outputs, sweep=str(folder), seconds=round(time.monotonic() - start, 1))


def _track(job: TuneJob, record: Mapping[str, Any], folder: Path, stack: ExitStack) -> Any:
    """Begin the sweep's run with its trackers, and its id in the log; the stack ends both."""
    from retinaray.distributed.trial_tracking import SweepTracking

    tracking = SweepTracking(job.tracking, record, folder)
    stack.enter_context(log_fields(run_id=folder.name))
    stack.enter_context(tracking.run)
    return tracking


def _make_base(job: TuneJob, folder: Path) -> TrainJob:
    """The training that the sweep varies."""
    # The sweep tells the trackers; its trials stay what they are whoever listens.
    own = ("space", "sweep", "tracking")
    tree = {key: value for key, value in to_dict(job).items() if key not in own}
    return resolve_paths(load_from_dict(TrainJob, tree, {"output": str(folder / "best.pth")}))


def _make_record(job: TuneJob, base: TrainJob) -> dict[str, Any]:
    read = make_reader(job.reading)
    return {
        "settings": {**to_dict(base), "space": dict(job.space), "sweep": to_dict(job)["sweep"]},
        "annotations_sha256": {
            uri: hashlib.sha256(read(uri)).hexdigest()
            for uri in (base.data.annotations, str(base.data.val_annotations))
        },
        "versions": collect_versions(),
    }


def _is_resumed(job: TuneJob, record: Mapping[str, Any], folder: Path) -> bool:
    """Whether the folder holds this very sweep.

    Raises:
        ConfigError: If it holds something else, and --override is not given.
    """
    if job.run.override or not folder.exists():
        return False
    path = folder / _RECORD_FILE
    if not path.exists():
        if folder.is_dir() and not any(folder.iterdir()):
            return False
        raise ConfigError(
            f"{folder} is needed for the sweep, but it is there with no {_RECORD_FILE} in it: "
            "give another folder, move it away, or --override to remove it"
        )
    found = json.loads(path.read_text(encoding="utf-8"))
    differences = compare_settings(found["settings"], record["settings"], free=_FREE_SETTINGS)
    if found["annotations_sha256"] != record["annotations_sha256"]:
        differences.append("the annotation files have changed")
    if differences:
        raise ConfigError(
            f"{folder} holds a sweep with other settings: {'; '.join(differences)}. "
            "Give another folder, or --override to start over (its trials are removed)"
        )
    logger.info("resuming the sweep in %s", folder)
    return True


def _begin(job: TuneJob, record: Mapping[str, Any], plan: SweepPlan, folder: Path) -> None:
    """Make the folder of a new sweep; --override may remove what is there."""
    if folder.is_dir():
        shutil.rmtree(folder)
    elif folder.exists() and job.run.override:
        folder.unlink()
    folder.mkdir(parents=True)
    content = json.dumps({**record, "concurrent": plan.num_concurrent}, indent=1)
    Storage().write_bytes(str(folder / _RECORD_FILE), content.encode())


def _read_concurrent(folder: Path) -> int:
    record = json.loads((folder / _RECORD_FILE).read_text(encoding="utf-8"))
    return int(record["concurrent"])


def _search(
    job: TuneJob, base: TrainJob, inputs: TrainingInputs, plan: SweepPlan, folder: Path
) -> tuple[list[Any], Any]:
    """Run, or go on with, Ray Tune's experiment; returns the trials and what they share."""
    # Tune's notes of what has finished are what a killed sweep goes on from.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "2")
    # Its newer tables go to standard output, which is for the result alone.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune

    from retinaray.distributed.abandonment import start_janitor
    from retinaray.distributed.leaderboard import Leaderboard
    from retinaray.distributed.sweep_results import collect_trials
    from retinaray.distributed.trial import TrialTask, run_trial
    from retinaray.distributed.tune_search import make_scheduler, make_search, make_space

    tree = to_dict(base)
    log = describe_worker_log()
    task = TrialTask(tree, str(folder), plan.workers, janitor=start_janitor(), log=log)
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, task=task), {"node:__internal_head__": 0.001}
    )
    experiment = str(folder / _TUNE_NAME)
    if tune.Tuner.can_restore(experiment):
        tuner = tune.Tuner.restore(
            experiment, trainable=trainable, resume_unfinished=True, resume_errored=True
        )
    else:
        domains = parse_space(job.space, TrainJob)
        sweep = job.sweep
        is_grid = sweep.search == "grid"
        points = (
            make_first_points(domains, tree, inputs) if sweep.warm_start and not is_grid else []
        )
        for number, (name, point) in enumerate(points):
            logger.info("trial %d is %s: %s", number + 1, name, json.dumps(point))
        tuner = tune.Tuner(
            trainable,
            param_space=make_space(domains, is_grid=is_grid),
            tune_config=tune.TuneConfig(
                metric="score",
                mode="max",
                num_samples=1 if is_grid else sweep.trials,
                search_alg=make_search(sweep, [point for _, point in points], seed=base.run.seed),
                scheduler=make_scheduler(sweep),
                max_concurrent_trials=plan.num_concurrent,
                time_budget_s=sweep.time_budget_s,
                trial_name_creator=_name_trial,
                trial_dirname_creator=_name_trial,
            ),
            run_config=tune.RunConfig(
                name=_TUNE_NAME,
                storage_path=str(folder),
                failure_config=tune.FailureConfig(max_failures=sweep.retries),
                callbacks=[Leaderboard()],
                verbose=0,
            ),
        )
    results = tuner.fit()
    trials = [results[index] for index in range(len(results))]
    return collect_trials(trials, task, inputs.train), task


def _name_trial(trial: Any) -> str:
    return str(trial.trial_id)
