"""One run of Ray Train: from a job and its resources to Ray's result."""

from __future__ import annotations

import contextvars
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchConfig

from retinaray.assembly.job_plan_workers import CHECKPOINTS_KEPT, WorkerPlan
from retinaray.config.loading import to_dict
from retinaray.config.schema import TrainJob
from retinaray.distributed.elastic_scaling import BatchScalingPolicy, RunTrainer, make_scaling
from retinaray.distributed.failure_policy import find_users_fault
from retinaray.distributed.notices import NoticeOnSigterm
from retinaray.distributed.reporting import follow_events
from retinaray.distributed.run_store import RAY_RUN_NAME, RunStore
from retinaray.distributed.stop_signals import StopSignal
from retinaray.distributed.train_events import FailureNotes, TrainEvents
from retinaray.distributed.train_metrics import TrainErrors
from retinaray.distributed.train_worker import train_worker
from retinaray.errors import ClusterError
from retinaray.log_format import describe_worker_log

logger = logging.getLogger(__name__)

__all__ = ["RAY_RUN_NAME", "RunSetup", "fit_workers", "run_workers"]

_LOOK_S = 0.1


@dataclass(frozen=True)
class RunSetup:
    """What a run is besides its job.

    Attributes:
        run_id: Goes into the model's card.
        store: Where checkpoints go.
        events: Takes the workers' events in this process.
        stop: When it has a number, a checkpoint is kept and the workers end.
        min_workers: Fewer are waited for; None = as many as the job has, always.
        keep_every: Epochs between weights that are kept for good; 0 = none are.
        checkpoint_minutes: Between two checkpoints at most; None = only planned ones are made.
        callbacks: `ray.train.UserCallback`s.
        is_trial: Checkpoints keep raw candidates of the validation set, and validations a latency.
        janitor: Gives the workers' resources back when this process is ended by force; see
            `abandonment`.
    """

    run_id: str
    store: RunStore
    events: TrainEvents
    stop: StopSignal
    min_workers: int | None = None
    keep_every: int = 0
    checkpoint_minutes: float | None = None
    callbacks: Sequence[Any] = ()
    is_trial: bool = False
    janitor: Any = None


def run_workers(
    job: TrainJob,
    plan: WorkerPlan,
    *,
    folder: Path,
    run_id: str,
    handle_event: Callable[[dict[str, Any]], None],
    callbacks: Sequence[Any] = (),
    is_trial: bool = False,
    janitor: Any = None,
) -> Any:
    """Train with checkpoints in a local folder, for whoever needs neither signals nor elasticity.

    Args:
        job: With absolute paths.
        plan: Workers and their resources.
        folder: Where Ray Train keeps its checkpoints, below `RAY_RUN_NAME`.
        run_id: Goes into the model's card.
        handle_event: Called in this process with each event to be kept; see `TrainingLog`.
        callbacks: See `RunSetup`.
        is_trial: See `RunSetup`.
        janitor: See `RunSetup`.

    Returns:
        Ray's `Result`.

    Raises:
        ClusterError: If the training failed more often than allowed, or made no checkpoint.
        ConfigError: If a worker cannot do what the settings ask for.
        DatasetError: If an image cannot be used.
        CheckpointError: If a checkpoint cannot be used.
    """
    setup = RunSetup(
        run_id=run_id,
        store=RunStore(str(folder)),
        events=TrainEvents(folder, lambda event: handle_event(dict(event))),
        stop=StopSignal(),
        checkpoint_minutes=job.run.checkpoint_minutes,
        callbacks=callbacks,
        is_trial=is_trial,
        janitor=janitor,
    )
    return fit_workers(job, plan, setup)


def fit_workers(job: TrainJob, plan: WorkerPlan, setup: RunSetup) -> Any:
    """Train with Ray; goes on from the last checkpoint in the store.

    Args:
        job: With absolute paths.
        plan: Workers and their resources.
        setup: Everything else.

    Returns:
        Ray's `Result`; its `return_value` says why the training ended. After a stop it may have no
        checkpoint.

    Raises:
        ClusterError: If the training failed more often than allowed, or made no checkpoint.
        ConfigError: If a worker cannot do what the settings ask for.
        DatasetError: If an image cannot be used.
        CheckpointError: If a checkpoint cannot be used.
    """
    # A drained node is noticed after so long; Ray's own interval is longer than some notices.
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    if setup.min_workers is not None:
        # Until a group of the old size is given up, the smaller one cannot start.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
    for attempt in range(job.run.max_failures + 1):
        try:
            result = _fit_once(job, plan, setup)
            break
        except ray.train.ControllerError as error:
            # Ray gives up at once when its own part fails, such as writing its list to S3.
            if attempt == job.run.max_failures or setup.stop.number is not None:
                raise ClusterError(f"training failed: {_find_cause(error)}") from error
            setup.events.handle({"kind": "failure", "num_workers": plan.num_workers})
            logger.warning("Ray's controller failed, the training is taken up again: %s", error)
        except ray.train.TrainingFailedError as error:
            fault = find_users_fault(error)
            if fault is not None:
                raise fault from error
            raise ClusterError(f"training failed: {_find_cause(error)}") from error
    if result.checkpoint is None and result.return_value != "stopped":
        raise ClusterError(
            f"the training ended without a checkpoint; see {setup.store.checkpoints}"
        )
    return result


def _fit_once(job: TrainJob, plan: WorkerPlan, setup: RunSetup) -> Any:
    resources = {"CPU": plan.num_cpus, **({"GPU": 1.0} if plan.num_gpus else {})}
    scaling = make_scaling(
        plan.num_workers, setup.min_workers or plan.num_workers, resources=resources
    )
    storage_path, storage_filesystem = setup.store.locate_for_ray()
    with follow_events(setup.events.handle) as board:
        policy = None
        if scaling.elasticity_enabled:
            shares = job.run.batch // job.run.accumulate
            policy = BatchScalingPolicy(scaling, num_shares=shares, board=board)
        own_callbacks: list[Any] = [
            TrainErrors(setup.run_id),
            FailureNotes(board),
            NoticeOnSigterm(),
        ]
        trainer = RunTrainer(
            train_worker,
            policy=policy,
            board=board,
            is_cleaned=not setup.is_trial,
            train_loop_config={
                "job": to_dict(job),
                "run_id": setup.run_id,
                "threads": plan.num_threads,
                "board": board,
                "store": setup.store,
                "keep_every": setup.keep_every,
                "checkpoint_minutes": setup.checkpoint_minutes,
                "is_trial": setup.is_trial,
                "janitor": setup.janitor,
                "log": describe_worker_log(),
            },
            scaling_config=scaling,
            torch_config=TorchConfig(backend="nccl" if plan.num_gpus else "gloo"),
            run_config=ray.train.RunConfig(
                name=RAY_RUN_NAME,
                storage_path=storage_path,
                storage_filesystem=storage_filesystem,
                failure_config=ray.train.FailureConfig(max_failures=job.run.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(
                    num_to_keep=CHECKPOINTS_KEPT,
                    checkpoint_score_attribute="score",
                    checkpoint_score_order="max",
                ),
                callbacks=[*setup.callbacks, *own_callbacks],
            ),
        )
        return _fit_beside(trainer, board, setup)


def _fit_beside(trainer: RunTrainer, board: Any, setup: RunSetup) -> Any:
    """Let Ray train in a thread of its own, and hand a signal on to the workers meanwhile.

    In the main thread Ray would take over Ctrl-C, and a signal would wait for its answers.

    Raises:
        ClusterError: If a signal comes before there is a step to keep.
    """
    if threading.current_thread() is not threading.main_thread():
        return trainer.fit()
    answers: list[Any] = []

    def fit() -> None:
        try:
            answers.append(trainer.fit())
        except BaseException as error:
            answers.append(error)

    run = contextvars.copy_context().run
    thread = threading.Thread(target=run, args=(fit,), name="ray-train", daemon=True)
    thread.start()
    is_told = False
    while thread.is_alive():
        thread.join(_LOOK_S)
        if setup.stop.number is None or is_told:
            continue
        if not setup.events.is_running:
            # Nobody may be there to answer: workers can wait for a machine for hours.
            raise ClusterError("the training was stopped before its workers took a step")
        is_told = True
        board.ask_to_stop.remote()
    answer = answers[0]
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _find_cause(error: BaseException) -> str:
    """What the first failed worker or Ray itself said, without the stack of processes around it."""
    error = getattr(error, "controller_failure", None) or error
    failures: dict[int, BaseException] = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        text = str(failure).strip().splitlines()
        if text:
            return text[-1]
    return str(error).strip().splitlines()[0]
