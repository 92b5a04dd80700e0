"""One Ray Train worker: runs its share of the loop, validates, reports checkpoints."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from retinaray.artifact import ModelCard, dump_weights
from retinaray.assembly.reading import make_read_settings, make_reader, read_json
from retinaray.assembly.training import (
    TrainingInputs,
    choose_autocast,
    make_card,
    make_loader,
    make_loop_settings,
    make_state,
    read_inputs,
)
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import TrainJob
from retinaray.data.coco import resolve_image_uri
from retinaray.detector.retinanet import RetinaNet
from retinaray.evaluation.coco_map import CocoScores, evaluate_detections
from retinaray.inference.pipeline import ImageSource, detect_images
from retinaray.inference.predictor import PredictorSettings
from retinaray.inference.torch_backend import TorchPredictor
from retinaray.training.loop import Progress, run_loop
from retinaray.training.state import STATE_FILE, WEIGHTS_FILE, TrainingState


def train_worker(config: dict[str, Any]) -> None:
    """Train as one of the workers of a run; entered by Ray in a process of its own.

    Args:
        config: `job` (a resolved TrainJob as plain values), `run_id`, `threads`, `board` (an
            EventBoard actor).
    """
    torch.set_num_threads(config["threads"])
    job = load_from_dict(TrainJob, config["job"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    inputs = read_inputs(job)
    card, model = make_card(job, inputs, run_id=config["run_id"])
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = make_state(job, model)
    _restore(state)
    settings = make_loop_settings(
        job, len(inputs.train), autocast_dtype=choose_autocast(job.run.precision, device)
    )
    keeper = _Keeper(job, inputs, card, state, config["board"], settings.autocast_dtype)

    def post_progress(progress: Progress) -> None:
        shared = _average_losses(progress, device, world_size)
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
            num_processes=_count_loaders(job, config["threads"], device),
            pin_memory=device.type == "cuda",
        ),
        settings,
        world_size=world_size,
        on_progress=post_progress,
        on_checkpoint=keeper.keep,
    )


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


def _count_loaders(job: TrainJob, threads: int, device: torch.device) -> int:
    """Decoding processes: one per core beside a GPU; on a CPU they would only fight the step."""
    if job.data.loader_processes is not None:
        return job.data.loader_processes
    return min(16, max(1, threads - 1)) if device.type == "cuda" else 0


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
    inputs: TrainingInputs
    card: ModelCard
    state: TrainingState
    board: Any
    autocast_dtype: torch.dtype | None

    def keep(self, is_last: bool) -> bool:
        """Make one checkpoint; returns whether the training should stop early."""
        context = ray.train.get_context()
        is_due = self.inputs.val is not None
        scores = self._validate() if is_due else None
        ap = scores.summary["AP"] if scores else None
        should_stop = False
        if is_due:
            self.state.note_validation(ap)
            patience = self.job.run.patience
            should_stop = patience > 0 and self.state.num_stale >= patience and not is_last
        epoch = self.state.step * self.job.run.batch / len(self.inputs.train)
        metrics: dict[str, Any] = {"step": self.state.step, "epoch": epoch}
        if scores:
            metrics |= scores.summary
        # Without a validation the newest weights are the best.
        metrics["score"] = (ap if ap is not None else -1.0) if is_due else float(self.state.step)
        if context.get_world_rank() != 0:
            ray.train.report(metrics)
            return should_stop
        if is_due:
            self.board.post.remote({"kind": "validation", **metrics})
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / STATE_FILE).write_bytes(self.state.dump())
            weights = dump_weights(self.card, self.state.exported_state())
            (Path(folder) / WEIGHTS_FILE).write_bytes(weights)
            ray.train.report(
                metrics,
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=f"step_{self.state.step:08d}",
            )
        return should_stop

    def _validate(self) -> CocoScores:
        """Scores of the exported weights; each worker detects in its share of the images."""
        context = ray.train.get_context()
        rank, world_size = context.get_world_rank(), context.get_world_size()
        found = self._detect(range(rank, len(self.inputs.val or ()), world_size))
        if world_size > 1:
            shares: list[list[dict[str, Any]]] = [[] for _ in range(world_size)]
            torch.distributed.all_gather_object(shares, found)
            found = [detection for share in shares for detection in share]
        truth = read_json(str(self.job.data.val_annotations), self.job.reading)
        return evaluate_detections(truth, found)

    def _detect(self, positions: range) -> list[dict[str, Any]]:
        job, val = self.job, self.inputs.val
        if val is None:
            return []
        root = job.data.val_images or job.data.images
        device = next(self.state.model.parameters()).device
        model = self.card.build_model()
        model.load_state_dict(self.state.exported_state())
        predictor = TorchPredictor(
            model.to(device=device, memory_format=torch.channels_last),  # type: ignore[call-overload]
            card=self.card,
            settings=PredictorSettings(batch=4),
            autocast_dtype=self.autocast_dtype,
        )
        sources = [
            ImageSource(record.image_id, resolve_image_uri(root, record.file_name))
            for record in (val.images[position] for position in positions)
        ]
        results = detect_images(
            predictor,
            sources,
            read=make_reader(job.reading),
            batch=4,
            settings=make_read_settings(job.reading),
        )
        return [detection for result in results for detection in result.coco_results]
