"""One Ray Train worker: runs its share of the loop, validates, reports checkpoints."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from retinaray.artifact import ModelCard, dump_weights
from retinaray.assembly.job_plan_workers import count_loaders
from retinaray.assembly.training import (
    choose_autocast,
    hash_settings,
    make_card,
    make_loader,
    make_loop_settings,
    make_state,
    read_inputs,
)
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import TrainJob
from retinaray.detector.anchors import hash_anchors
from retinaray.detector.retinanet import RetinaNet
from retinaray.distributed.train_metrics import TrainMetrics
from retinaray.distributed.validation import Validator, make_validator, rate
from retinaray.evaluation.candidates import CandidateSet
from retinaray.log_format import start_worker_log
from retinaray.training.loop import Progress, run_loop
from retinaray.training.state import CANDIDATES_FILE, STATE_FILE, WEIGHTS_FILE, TrainingState

logger = logging.getLogger(__name__)


def train_worker(config: dict[str, Any]) -> None:
    """Train as one of the workers of a run; entered by Ray in a process of its own.

    Args:
        config: `job` (a resolved TrainJob as plain values), `run_id`, `threads`, `board` (an
            EventBoard actor), `is_trial` (keep raw candidates, measure the latency), `janitor` (a
            Janitor actor for a trial; None otherwise), `log` (how the driver logs).
    """
    torch.set_num_threads(config["threads"])
    job = load_from_dict(TrainJob, config["job"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    start_worker_log(config["log"], run_id=config["run_id"], rank=rank)
    _report_to_janitor(config)
    inputs = read_inputs(job)
    card, model = make_card(job, inputs, run_id=config["run_id"])
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = make_state(job, model)
    _restore(state)
    settings = make_loop_settings(
        job, len(inputs.train), autocast_dtype=choose_autocast(job.run.precision, device)
    )
    metrics = TrainMetrics(config["run_id"], rank=rank, batch=job.run.batch, first_step=state.step)
    keeper = _Keeper(
        job=job,
        num_images=len(inputs.train),
        card=card,
        state=state,
        board=config["board"],
        validator=make_validator(
            job, inputs, card, autocast_dtype=settings.autocast_dtype, is_trial=config["is_trial"]
        ),
        is_trial=config["is_trial"],
        proof=_prove(job, model, inputs.canvas),
        metrics=metrics,
    )
    logger.info("worker %d of %d trains on %s from step %d", rank, world_size, device, state.step)

    def post_progress(progress: Progress) -> None:
        shared = _average_losses(progress, device, world_size)
        metrics.count_progress(shared)
        if rank == 0:
            config["board"].post.remote({"kind": "progress", **asdict(shared)})

    run_loop(
        state,
        _wrap(model, device, world_size),
        make_loader(
            job,
            inputs,
            rank=rank,
            world_size=world_size,
            first_step=state.step,
            num_processes=count_loaders(
                job.data.loader_processes,
                num_threads=config["threads"],
                has_gpu=device.type == "cuda",
            ),
            pin_memory=device.type == "cuda",
        ),
        settings,
        world_size=world_size,
        on_progress=post_progress,
        on_checkpoint=keeper.keep,
    )


def _report_to_janitor(config: dict[str, Any]) -> None:
    """Say which placement group is this trial's, for whoever gives it back."""
    if config["janitor"] is not None:
        group = ray.util.get_current_placement_group()
        ray.get(config["janitor"].watch.remote(group, config["board"]))


def _average_losses(progress: Progress, device: torch.device, world_size: int) -> Progress:
    """The report with the losses of the whole batch; all workers come here at the same steps."""
    if world_size == 1:
        return progress
    losses = torch.tensor([progress.class_loss, progress.box_loss], device=device)
    torch.distributed.all_reduce(losses)
    class_loss, box_loss = (losses / world_size).tolist()
    return replace(progress, class_loss=class_loss, box_loss=box_loss)


def _wrap(model: RetinaNet, device: torch.device, world_size: int) -> nn.Module:
    if world_size == 1:
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def _restore(state: TrainingState) -> None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return
    with checkpoint.as_directory() as folder:
        path = Path(folder) / STATE_FILE
        state.load(path.read_bytes(), source=str(path))


@dataclass
class _Keeper:
    """Validates, writes and reports a checkpoint on all workers together."""

    job: TrainJob
    num_images: int
    card: ModelCard
    state: TrainingState
    board: Any
    validator: Validator | None
    is_trial: bool
    proof: dict[str, str]
    metrics: TrainMetrics

    def keep(self, is_last: bool) -> bool:
        """Make one checkpoint; returns whether the training should stop early."""
        run, state = self.job.run, self.state
        metrics: dict[str, Any] = {
            "step": state.step,
            "epoch": state.step * run.batch / self.num_images,
        }
        # Without a validation the newest weights are the best.
        score = float(state.step)
        should_stop = False
        validation = None
        if self.validator is not None:
            device = next(state.model.parameters()).device
            validation = self.validator.validate(state.exported_state(), device)
            metrics |= validation.metrics
            score = rate(metrics, objective=run.objective, latency_price=run.latency_price)
            state.note_validation(score if metrics.get(run.objective) is not None else None)
            should_stop = run.patience > 0 and state.num_stale >= run.patience and not is_last
        metrics["score"] = score
        if self.is_trial:
            metrics |= self.proof
        if ray.train.get_context().get_world_rank() != 0:
            ray.train.report(metrics)
            return should_stop
        if validation is not None:
            self.metrics.note_map(metrics.get("AP"))
            self.board.post.remote({"kind": "validation", **metrics})
        candidates = validation.candidates if validation is not None and self.is_trial else None
        self._report(metrics, candidates)
        return should_stop

    def _report(self, metrics: dict[str, Any], candidates: CandidateSet | None) -> None:
        start_s = time.perf_counter()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / STATE_FILE).write_bytes(self.state.dump())
            weights = dump_weights(self.card, self.state.exported_state())
            (folder / WEIGHTS_FILE).write_bytes(weights)
            if candidates is not None:
                (folder / CANDIDATES_FILE).write_bytes(candidates.dump())
            ray.train.report(
                metrics,
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=f"step_{self.state.step:08d}",
            )
        seconds = time.perf_counter() - start_s
        self.metrics.count_checkpoint(seconds)
        logger.info("checkpoint after step %d in %.2f s", self.state.step, seconds)


def _prove(job: TrainJob, model: RetinaNet, canvas: tuple[int, int]) -> dict[str, str]:
    """What this worker really trains with, for a sweep to compare with what it drew."""
    anchors = model.anchors_for(torch.empty(1, 3, *canvas))
    return {"settings_sha256": hash_settings(job), "anchors_sha256": hash_anchors(anchors)}
