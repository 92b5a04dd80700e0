"""One Ray Train worker: runs its share of the loop, validates, reports checkpoints."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, replace
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from retinaray.artifact import ModelCard
from retinaray.assembly.job_plan_workers import count_loaders, count_threads
from retinaray.assembly.training import (
    TrainingInputs,
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
from retinaray.distributed.checkpoint_keeping import CheckpointKeeper
from retinaray.distributed.notices import NoticeWatch, ask_board
from retinaray.distributed.resuming import agree_on_beginning, read_state
from retinaray.distributed.run_store import RunStore
from retinaray.distributed.train_metrics import TrainMetrics
from retinaray.distributed.validation import make_validator
from retinaray.log_format import start_worker_log
from retinaray.storage import join_uri
from retinaray.training.checkpoint_files import find_checkpoints
from retinaray.training.loop import (
    CheckpointKind,
    LoopEnd,
    LoopSettings,
    Progress,
    plan_kept,
    run_loop,
)
from retinaray.training.state import TrainingState

logger = logging.getLogger(__name__)

_INPUT_FIGURES = ("wait_share", "step_images_per_s", "loader_images_per_s", "core_images_per_s")


def train_worker(config: dict[str, Any]) -> LoopEnd:
    """Train as one of the workers of a run; entered by Ray in a process of its own.

    Args:
        config: `job` (a resolved TrainJob as plain values), `run_id`, `threads`, `board` (an
            EventBoard actor), `store` (where checkpoints go), `keep_every` (epochs between weights
            that are kept for good), `checkpoint_minutes` (between two checkpoints; None = only
            planned ones), `is_trial` (keep raw candidates, measure the latency), `janitor` (a
            Janitor actor for a trial; None otherwise), `log` (how the driver logs).

    Returns:
        Why the training ended.
    """
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    num_threads = _count_own_threads(config["threads"], device)
    torch.set_num_threads(num_threads)
    if device.type == "cuda":
        # What is sent between workers goes through the present device of each.
        torch.cuda.set_device(device)
        # Every step has the same shapes: trying all kernels once pays.
        torch.backends.cudnn.benchmark = True
    start_worker_log(config["log"], run_id=config["run_id"], rank=rank)
    _report_to_janitor(config)
    store: RunStore = config["store"]
    beginning = agree_on_beginning(
        store.checkpoints, run_id=config["run_id"], board=config["board"], files=store.files
    )
    if beginning.is_stopping:
        return "stopped"
    job = load_from_dict(TrainJob, config["job"])
    inputs = read_inputs(job)
    card, model = make_card(job, inputs, run_id=config["run_id"])
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = make_state(job, model)
    if beginning.name is not None:
        source = join_uri(store.checkpoints, beginning.name)
        content = read_state(
            store.checkpoints, beginning.name, run_id=config["run_id"], files=store.files
        )
        state.load(content, source=source)
        del content
        if job.run.patience > 0 and state.num_stale >= job.run.patience:
            # The run that is gone on with had ended here.
            return "early"
    if rank == 0:
        for reason in beginning.refused:
            config["board"].post.remote({"kind": "refused", "reason": reason})
    settings = make_loop_settings(
        job, len(inputs.train), autocast_dtype=choose_autocast(job.run.precision, device)
    )
    metrics = TrainMetrics(config["run_id"], rank=rank, batch=job.run.batch, first_step=state.step)
    keeper = _make_keeper(config, job, inputs, card, state, settings, metrics)
    logger.info("worker %d of %d trains on %s from step %d", rank, world_size, device, state.step)
    loader = make_loader(
        job,
        inputs,
        rank=rank,
        world_size=world_size,
        first_step=state.step,
        num_processes=count_loaders(
            job.data.loader_processes,
            num_threads=num_threads,
            has_gpu=device.type == "cuda",
        ),
        pin_memory=device.type == "cuda",
    )
    wrapped = _wrap(model, device, world_size)
    return _run(wrapped, loader, settings, keeper, minutes=config["checkpoint_minutes"])


def _count_own_threads(planned: int, device: torch.device) -> int:
    if device.type != "cuda":
        return planned
    node_id = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    (own,) = (node["Resources"] for node in nodes if node["NodeID"] == node_id)
    return count_threads(planned, num_cpus=own.get("CPU", 0), num_gpus=own.get("GPU", 0))


def _make_keeper(
    config: dict[str, Any],
    job: TrainJob,
    inputs: TrainingInputs,
    card: ModelCard,
    state: TrainingState,
    settings: LoopSettings,
    metrics: TrainMetrics,
) -> CheckpointKeeper:
    store: RunStore = config["store"]
    return CheckpointKeeper(
        job=job,
        num_images=len(inputs.train),
        card=card,
        state=state,
        board=config["board"],
        validator=make_validator(
            job, inputs, card, autocast_dtype=settings.autocast_dtype, is_trial=config["is_trial"]
        ),
        is_trial=config["is_trial"],
        proof=_prove(job, state.model, inputs.canvas),
        metrics=metrics,
        store=store,
        run_id=config["run_id"],
        kept_steps=plan_kept(
            settings.checkpoint_steps,
            num_images=len(inputs.train),
            batch=job.run.batch,
            every_epochs=config["keep_every"],
        ),
        taken=set(find_checkpoints(store.checkpoints, store.files)),
    )


def _run(
    wrapped: nn.Module,
    loader: Any,
    settings: LoopSettings,
    keeper: CheckpointKeeper,
    *,
    minutes: float | None,
) -> LoopEnd:
    """Take the steps; a notice or the clock interrupts them for a checkpoint, the driver ends."""
    state, board, metrics = keeper.state, keeper.board, keeper.metrics
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = next(state.model.parameters()).device
    # One worker is enough to ask and to look at the clock: a vote of one is a vote of all.
    watch = NoticeWatch(None)
    if rank == 0:
        period_s = math.inf if minutes is None else 60 * minutes
        watch = NoticeWatch(ask_board(board), period_s=period_s)
    first_step = _FirstStep(state, board)

    def post_progress(progress: Progress) -> None:
        first_step.tell()
        if progress.skipped_image_ids:
            image_ids = list(progress.skipped_image_ids)
            board.post.remote({"kind": "skipped", "step": progress.step, "image_ids": image_ids})
        shared = _share_progress(progress, device, world_size)
        metrics.count_progress(shared)
        if rank == 0:
            values = {k: v for k, v in asdict(shared).items() if k != "skipped_image_ids"}
            board.post.remote({"kind": "progress", **values})

    def keep(kind: CheckpointKind) -> bool:
        is_enough = keeper.keep(kind)
        watch.note_checkpoint()
        return is_enough

    def wants_checkpoint() -> bool:
        first_step.tell()
        return watch.wants_checkpoint()

    # What a checkpoint interrupts goes on with the very batches that are on their way.
    batches = iter(loader)
    watch.ask()
    watch.start()
    try:
        while True:
            end = run_loop(
                state,
                wrapped,
                batches,
                settings,
                world_size=world_size,
                on_progress=post_progress,
                on_checkpoint=keep,
                wants_stop=wants_checkpoint,
            )
            if end != "stopped" or _is_end_wanted(watch, device, world_size):
                return end
    finally:
        watch.close()


class _FirstStep:
    """Tells the driver of a group's first step, before any report of it, and only once."""

    def __init__(self, state: TrainingState, board: Any) -> None:
        context = ray.train.get_context()
        self._state = state
        self._board = board
        self._restored_step = state.step
        self._num_workers = context.get_world_size()
        self._is_told = context.get_world_rank() != 0

    def tell(self) -> None:
        """Called after each step."""
        if self._is_told:
            return
        self._is_told = True
        event = {"kind": "running", "step": self._state.step, "num_workers": self._num_workers}
        self._board.post.remote({**event, "restored_step": self._restored_step})


def _is_end_wanted(watch: NoticeWatch, device: torch.device, world_size: int) -> bool:
    """Whether the driver stops the training; all workers come here together."""
    if world_size == 1:
        return watch.is_stopping
    answer = torch.tensor([float(watch.is_stopping)], device=device)
    torch.distributed.broadcast(answer, src=0)
    return bool(answer.item())


def _report_to_janitor(config: dict[str, Any]) -> None:
    """Say which placement group is this trial's, for whoever gives it back."""
    if config["janitor"] is not None:
        group = ray.util.get_current_placement_group()
        ray.get(config["janitor"].watch.remote(group, config["board"]))


def _share_progress(progress: Progress, device: torch.device, world_size: int) -> Progress:
    """The report with the losses of the whole batch, and the input of the worker that waits most.

    All workers come here at the same steps. Where one waits for its images, the others wait for it
    in the exchange of gradients, which looks like work.
    """
    if world_size == 1:
        return progress
    figures = [getattr(progress, name) for name in _INPUT_FIGURES]
    own = torch.tensor(
        [progress.class_loss, progress.box_loss, *(math.nan if f is None else f for f in figures)],
        dtype=torch.float64,
        device=device,
    )
    rows = [torch.empty_like(own) for _ in range(world_size)]
    torch.distributed.all_gather(rows, own)
    values = torch.stack(rows).tolist()
    class_loss, box_loss = (sum(row[i] for row in values) / world_size for i in (0, 1))
    worst = max(values, key=lambda row: float(row[2]))[2:]
    shown: dict[str, Any] = {
        name: None if math.isnan(figure) else figure
        for name, figure in zip(_INPUT_FIGURES, worst, strict=True)
    }
    return replace(progress, class_loss=class_loss, box_loss=box_loss, **shown)


def _wrap(model: RetinaNet, device: torch.device, world_size: int) -> nn.Module:
    if world_size == 1:
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def _prove(job: TrainJob, model: RetinaNet, canvas: tuple[int, int]) -> dict[str, str]:
    """What this worker really trains with, for a sweep to compare with what it drew."""
    anchors = model.anchors_for(torch.empty(1, 3, *canvas))
    return {"settings_sha256": hash_settings(job), "anchors_sha256": hash_anchors(anchors)}
