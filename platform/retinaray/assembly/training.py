"""A training job as core objects: network, optimizer, loader, loop settings."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.utils.data import DataLoader

from retinaray.artifact import Architecture, ModelCard, hash_content
from retinaray.assembly.provenance import collect_versions
from retinaray.assembly.reading import absolute_uri, make_image_sources, make_reader
from retinaray.assembly.training_inputs import (
    TrainingInputs,
    check_settings,
    choose_job_canvas,
    choose_training_canvas,
    find_short_side,
    read_inputs,
)
from retinaray.config.loading import load_from_dict, to_dict
from retinaray.config.schema import AnchorConfig, ModelConfig, TrainJob
from retinaray.data.augmentation import AugmentSettings
from retinaray.data.batching import Batch, TrainingDataset, collate_samples
from retinaray.data.stream_sampler import StreamSampler, find_portraits
from retinaray.detector.anchors import AnchorSpec
from retinaray.detector.backbone import load_backbone_state, share_statistics
from retinaray.detector.retinanet import RetinaNet
from retinaray.errors import CheckpointError, ConfigError
from retinaray.training.batch_loss import LossSettings
from retinaray.training.fine_tuning import adopt_start, load_start, read_start
from retinaray.training.loop import LoopSettings, plan_checkpoints
from retinaray.training.optimizer import DEFAULT_MOMENTUM, make_optimizer
from retinaray.training.pretrained import read_backbone_weights
from retinaray.training.schedule import Schedule
from retinaray.training.state import TrainingState
from retinaray.training.weight_average import WeightAverage

__all__ = [
    "DEFAULT_EPOCHS",
    "DEFAULT_SCORE_THRESHOLD",
    "DEFAULT_WARMUP_STEPS",
    "TrainingInputs",
    "check_settings",
    "choose_autocast",
    "choose_job_canvas",
    "count_steps",
    "hash_settings",
    "make_anchor_spec",
    "make_augment_settings",
    "make_card",
    "make_loader",
    "make_loop_settings",
    "make_state",
    "read_inputs",
    "resolve_paths",
]

logger = logging.getLogger(__name__)

DEFAULT_EPOCHS = 40
DEFAULT_WARMUP_STEPS = 1000
DEFAULT_SCORE_THRESHOLD = 0.05
_LEARNING_RATES = {"adamw": 5e-4, "sgd": 0.01}
_MANY_TIMES = 10
_WEIGHT_DECAYS = {"adamw": 0.05, "sgd": 1e-4}


def resolve_paths(job: TrainJob) -> TrainJob:
    """The job with absolute local paths."""
    data = job.data
    changes: dict[str, object] = {
        "output": absolute_uri(job.output),
        "data.images": absolute_uri(data.images),
        "data.annotations": absolute_uri(data.annotations),
    }
    if data.val_annotations is not None:
        changes["data.val_annotations"] = absolute_uri(data.val_annotations)
        changes["data.val_images"] = absolute_uri(data.val_images or data.images)
    if data.cache is not None:
        changes["data.cache"] = absolute_uri(data.cache)
    weights = job.model.backbone_weights
    # A name of torchvision's stays a name.
    if weights is not None and Path(weights).expanduser().is_file():
        changes["model.backbone_weights"] = absolute_uri(weights)
    if job.model.fine_tune is not None:
        changes["model.fine_tune"] = absolute_uri(job.model.fine_tune)
    return load_from_dict(TrainJob, to_dict(job), changes)


def hash_settings(job: TrainJob) -> str:
    """SHA-256 of a training's resolved settings, in hexadecimal."""
    return hash_content(json.dumps(to_dict(job), sort_keys=True).encode())


def count_steps(job: TrainJob, num_images: int) -> int:
    """Optimizer steps of the whole training."""
    if job.run.iters is not None:
        return job.run.iters
    return -(-(job.run.epochs or DEFAULT_EPOCHS) * num_images // job.run.batch)


def find_schedule_oddities(job: TrainJob, num_images: int) -> list[str]:
    """What a training can be run with and hardly anybody means, a line each; empty = nothing."""
    optim, steps = job.optim, count_steps(job, num_images)
    found = []
    late = [step for step in optim.milestones if step >= steps]
    if late:
        found.append(
            f"optim.milestones (--milestones): {', '.join(map(str, late))} of {steps} steps are "
            "never reached, and the learning rate does not fall there; give more --iters, or "
            "earlier --milestones"
        )
    if optim.warmup_steps is not None and optim.warmup_steps >= steps:
        found.append(
            f"optim.warmup_steps={optim.warmup_steps} (--warmup) of {steps} steps: the learning "
            "rate never reaches its peak; give fewer, or leave it out for a tenth of the run"
        )
    usual, peak = _LEARNING_RATES[optim.optimizer], optim.peak_lr or 0.0
    if optim.optimizer == "adamw" and peak >= _MANY_TIMES * usual:
        found.append(
            f"optim.peak_lr={peak:g} (--lr) is {peak / usual:.0f} times AdamW's "
            f"usual {usual:g}: a rate of SGD's goes with --optimizer sgd"
        )
    return found


def make_anchor_spec(anchors: AnchorConfig) -> AnchorSpec:
    """The anchors of a training or a sweep."""
    return AnchorSpec(
        scales=anchors.scales,
        ratios=anchors.ratios,
        strides=anchors.strides,
        convention=anchors.convention,
    )


def make_architecture(model: ModelConfig, *, is_random: bool, is_caffe: bool) -> Architecture:
    """The network that settings ask for.

    Args:
        model: The settings.
        is_random: Whether the backbone starts from no weights.
        is_caffe: Whether these come from Caffe, whose bottlenecks stride in their first 1x1.
    """
    norm = model.norm
    if norm == "auto":
        norm = "gn" if is_random else "frozen_bn"
    return Architecture(
        backbone=model.backbone,
        # What several workers do with its statistics is no part of the network.
        norm="bn" if norm == "sync_bn" else norm,
        fpn_channels=model.fpn_channels,
        head_depth=model.head_depth,
        stride_in_1x1=is_caffe if model.stride_in_1x1 is None else model.stride_in_1x1,
        has_head_norm=model.head_norm == "gn",
    )


def make_card(job: TrainJob, inputs: TrainingInputs, *, run_id: str) -> tuple[ModelCard, RetinaNet]:
    """The card, and the network with its initial weights (the same for the same seed).

    Raises:
        CheckpointError: If the weights to start from cannot be read or do not fit.
        StorageError: If the model to start from is not there.
    """
    state, is_caffe = None, False
    if job.model.backbone_weights is not None:
        state, is_caffe = read_backbone_weights(
            job.model.backbone_weights, backbone=job.model.backbone
        )
    card = ModelCard(
        architecture=make_architecture(job.model, is_random=state is None, is_caffe=is_caffe),
        anchors=make_anchor_spec(job.anchors),
        categories=inputs.train.categories,
        canvas=inputs.canvas,
        score_thresholds=(DEFAULT_SCORE_THRESHOLD,) * len(inputs.train.categories),
        run_id=run_id,
        versions=collect_versions(),
        training=to_dict(job),
    )
    start = None
    if job.model.fine_tune is not None:
        content = make_reader(job.reading)(job.model.fine_tune)
        start = read_start(content, source=job.model.fine_tune)
        card = adopt_start(card, start, norm=job.model.norm, stride_in_1x1=job.model.stride_in_1x1)
    torch.manual_seed(job.run.seed)
    model = card.build_model()
    if start is not None:
        logger.info("%s", load_start(model, card, start).to_text())
    if state is not None:
        try:
            load_backbone_state(model.backbone, state)
        except ValueError as error:
            raise CheckpointError(f"{job.model.backbone_weights}: {error}") from error
    model.backbone.freeze(job.model.freeze_at)
    return card, model


def make_state(job: TrainJob, model: RetinaNet) -> TrainingState:
    """A training before its first step.

    Args:
        job: The training.
        model: From `make_card`, on its device, in its memory format; in a worker of several, after
            these have found each other. Its batch norms are shared and it is compiled in place, as
            the job wishes: its keys stay as they are.

    Raises:
        ConfigError: If the device has no float16 and the job wants it.
    """
    device = next(model.parameters()).device
    if job.model.norm == "sync_bn" and device.type == "cuda" and _has_other_workers():
        share_statistics(model.backbone)
    if job.run.compile:
        model.compile(dynamic=False)
    kind, decay, momentum = job.optim.optimizer, job.optim.weight_decay, job.optim.momentum
    is_float16 = choose_autocast(job.run.precision, device) == torch.float16
    return TrainingState(
        model=model,
        optimizer=make_optimizer(
            model,
            kind=kind,
            learning_rate=job.optim.peak_lr or _LEARNING_RATES[kind],
            weight_decay=_WEIGHT_DECAYS[kind] if decay is None else decay,
            momentum=DEFAULT_MOMENTUM if momentum is None else momentum,
        ),
        average=WeightAverage(model, decay=job.optim.ema_decay) if job.optim.ema_decay else None,
        scaler=torch.amp.GradScaler(device.type) if is_float16 else None,
    )


def _has_other_workers() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def make_loop_settings(
    job: TrainJob, num_images: int, *, autocast_dtype: torch.dtype | None
) -> LoopSettings:
    """The loop's settings with all automatic values filled in."""
    total_steps = count_steps(job, num_images)
    optim, loss = job.optim, job.loss
    warmup = optim.warmup_steps
    if warmup is None:
        warmup = min(DEFAULT_WARMUP_STEPS, total_steps // 10)
    return LoopSettings(
        batch=job.run.batch,
        num_images=num_images,
        checkpoint_steps=plan_checkpoints(
            total_steps=total_steps,
            num_images=num_images,
            batch=job.run.batch,
            every_epochs=job.run.val_every,
        ),
        log_every=job.run.log_every,
        loss=LossSettings(
            focal_alpha=loss.focal_alpha,
            focal_gamma=loss.focal_gamma,
            box_loss=loss.box_loss,
            box_beta=loss.box_beta,
            box_weight=loss.box_weight,
            background_iou=loss.anchor_ious[0],
            foreground_iou=loss.anchor_ious[1],
            keep_best_anchor=loss.keep_best_anchor,
        ),
        schedule=Schedule(
            peak_lr=optim.peak_lr or _LEARNING_RATES[optim.optimizer],
            total_steps=total_steps,
            warmup_steps=warmup,
            kind="milestones" if optim.milestones else optim.schedule,
            milestones=optim.milestones,
            gamma=optim.gamma,
        ),
        clip_norm=optim.clip_norm,
        autocast_dtype=autocast_dtype,
        accumulate=job.run.accumulate,
        max_skipped_steps=optim.max_skipped_steps,
    )


def make_loader(
    job: TrainJob,
    inputs: TrainingInputs,
    *,
    rank: int,
    world_size: int,
    first_step: int,
    num_processes: int,
    pin_memory: bool,
) -> DataLoader[Batch]:
    """This worker's batches from a step on.

    Args:
        job: The training.
        inputs: Its data.
        rank: This worker.
        world_size: Number of workers.
        first_step: Step to begin with.
        num_processes: Processes that decode; 0 = in this one.
        pin_memory: Whether batches go to a GPU.
    """
    read, decoded = make_image_sources(job.data, job.reading)
    dataset: Any = TrainingDataset(
        dataset=inputs.train,
        images_root=job.data.images,
        read=read,
        canvas=choose_training_canvas(job, inputs),
        augment=make_augment_settings(job),
        seed=job.run.seed,
        max_pixels=job.reading.max_pixels,
        allow_truncated=job.reading.allow_truncated,
        turns_for_portraits=job.data.two_canvases,
        fit=inputs.canvas if job.data.windows else None,
        decoded=decoded,
    )
    sampler = StreamSampler(
        num_images=len(inputs.train),
        batch=job.run.batch,
        rank=rank,
        world_size=world_size,
        seed=job.run.seed,
        first_step=first_step,
        last_step=count_steps(job, len(inputs.train)),
        portraits=find_portraits(inputs.train) if job.data.two_canvases else (),
    )
    options: Mapping[str, Any] = {}
    if num_processes:
        # Forked children of a process with CUDA and Ray threads can hang; a fork server has
        # neither.
        options = {"multiprocessing_context": "forkserver", "prefetch_factor": 4}
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate_samples,
        num_workers=num_processes,
        pin_memory=pin_memory,
        **options,
    )


def make_augment_settings(job: TrainJob) -> AugmentSettings:
    """Strengths of the random changes; the jitter in pixels becomes a factor on the fitted size."""
    augment = job.augment
    scale_range = (0.8, 1.25)
    if augment.jitter is not None:
        low, high = augment.jitter
        short_side = find_short_side(job)
        scale_range = (low / short_side, high / short_side)
    return AugmentSettings(
        flip=augment.flip,
        vertical_flip=augment.vertical_flip,
        scale_range=scale_range,
        crop=augment.crop,
        brightness=augment.brightness,
        contrast=augment.contrast,
        saturation=augment.saturation,
        hue=augment.hue,
        mosaic=augment.mosaic,
    )


def choose_autocast(precision: str, device: torch.device) -> torch.dtype | None:
    """Type of the convolutions: bf16 where the device computes it, or where it is asked for.

    Args:
        precision: `auto`, `bf16`, `fp16` or `fp32`.
        device: Where the network runs.

    Raises:
        ConfigError: If fp16 is asked for and there is no GPU.
    """
    if precision == "fp32":
        return None
    if precision == "fp16":
        if device.type != "cuda":
            raise ConfigError(
                "run.precision=fp16 (--precision fp16) needs a GPU in each worker, and this one "
                f"computes on {device.type}: use auto, bf16 or fp32"
            )
        return torch.float16
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None
