"""One run of Ray Train: from a job and its resources to Ray's result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from retinaray.assembly.job_plan_workers import CHECKPOINTS_KEPT, WorkerPlan
from retinaray.config.loading import to_dict
from retinaray.config.schema import TrainJob
from retinaray.distributed.reporting import follow_events
from retinaray.distributed.train_metrics import TrainErrors
from retinaray.distributed.train_worker import train_worker
from retinaray.errors import ClusterError
from retinaray.log_format import describe_worker_log

RAY_RUN_NAME = "ray_train"


class _TrialTrainer(TorchTrainer):
    """Without Ray's cleaner of stopped runs; the sweep's janitor does its work.

    Ray starts one for each run, and where it cannot do its work it never ends.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        return [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]


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
) -> ray.train.Result:
    """Train with Ray; goes on from the last checkpoint in the folder.

    Args:
        job: With absolute paths.
        plan: Workers and their resources.
        folder: Where Ray Train keeps its checkpoints, below `RAY_RUN_NAME`.
        run_id: Goes into the model's card.
        handle_event: Called in this process with each event of the workers; see `TrainingLog`.
        callbacks: `ray.train.UserCallback`s.
        is_trial: Checkpoints keep raw candidates of the validation set, and validations a latency.
        janitor: Gives the workers' resources back when this process is ended by force; see
            `abandonment`.

    Raises:
        ClusterError: If the training failed more often than allowed, or made no checkpoint.
    """
    errors: Any = TrainErrors(run_id)
    resources = {"CPU": plan.num_cpus, **({"GPU": 1} if plan.num_gpus else {})}
    with follow_events(handle_event) as board:
        trainer = (_TrialTrainer if is_trial else TorchTrainer)(
            train_worker,
            train_loop_config={
                "job": to_dict(job),
                "run_id": run_id,
                "threads": plan.num_threads,
                "board": board,
                "is_trial": is_trial,
                "janitor": janitor,
                "log": describe_worker_log(),
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=plan.num_workers,
                use_gpu=bool(plan.num_gpus),
                resources_per_worker=resources,
            ),
            torch_config=TorchConfig(backend="nccl" if plan.num_gpus else "gloo"),
            run_config=ray.train.RunConfig(
                name=RAY_RUN_NAME,
                storage_path=str(folder),
                failure_config=ray.train.FailureConfig(max_failures=job.run.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(
                    num_to_keep=CHECKPOINTS_KEPT,
                    checkpoint_score_attribute="score",
                    checkpoint_score_order="max",
                ),
                callbacks=[*callbacks, errors],
            ),
        )
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise ClusterError(f"training failed: {_find_cause(error)}") from error
    if result.checkpoint is None:
        raise ClusterError(f"the training ended without a checkpoint; see {folder}")
    return result


def _find_cause(error: BaseException) -> str:
    """What the first failed worker said, without the stack of processes around it."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        text = str(failure).strip().splitlines()
        if text:
            return text[-1]
    return str(error).strip().splitlines()[0]
