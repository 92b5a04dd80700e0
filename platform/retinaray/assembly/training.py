"""A training job as core objects: data, canvas, network, optimizer, loader, loop settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from retinaray.artifact import Architecture, ModelCard, hash_content
from retinaray.assembly.provenance import collect_versions
from retinaray.assembly.reading import absolute_uri, make_reader
from retinaray.config.loading import load_from_dict, to_dict
from retinaray.config.schema import AnchorConfig, TrainJob
from retinaray.data.augmentation import AugmentSettings
from retinaray.data.batching import Batch, StreamSampler, TrainingDataset, collate_samples
from retinaray.data.coco import CocoDataset, load_coco
from retinaray.data.transforms import choose_canvas
from retinaray.detector.anchors import AnchorSpec
from retinaray.detector.backbone import load_backbone_state
from retinaray.detector.retinanet import RetinaNet
from retinaray.errors import CheckpointError, ConfigError, DatasetError
from retinaray.training.loop import LoopSettings, plan_checkpoints
from retinaray.training.pretrained import read_backbone_weights
from retinaray.training.schedule import Schedule
from retinaray.training.state import TrainingState
from retinaray.training.step import LossSettings, WeightAverage, make_optimizer

DEFAULT_EPOCHS = 40
DEFAULT_WARMUP_STEPS = 1000
DEFAULT_SCORE_THRESHOLD = 0.05
_LEARNING_RATES = {"adamw": 5e-4, "sgd": 0.01}
_WEIGHT_DECAYS = {"adamw": 0.05, "sgd": 1e-4}


@dataclass(frozen=True)
class TrainingInputs:
    """The data of a training, read and checked.

    Attributes:
        train: Training set.
        val: Validation set; none = no validation.
        canvas: Network height and width.
    """

    train: CocoDataset
    val: CocoDataset | None
    canvas: tuple[int, int]


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
    weights = job.model.backbone_weights
    # A name of torchvision's stays a name.
    if weights is not None and Path(weights).expanduser().is_file():
        changes["model.backbone_weights"] = absolute_uri(weights)
    return load_from_dict(TrainJob, to_dict(job), changes)


def read_inputs(job: TrainJob) -> TrainingInputs:
    """Read both annotation files and choose the canvas.

    Raises:
        DatasetError: If a file is unusable, the sets name different categories, or there is nothing
            to learn.
        StorageError: If a file cannot be read.
    """
    data, read = job.data, make_reader(job.reading)
    train = load_coco(
        read(data.annotations),
        num_classes=data.classes,
        on_bad_box=data.on_bad_box,
        source=data.annotations,
    )
    if len(train) == 0:
        raise DatasetError(f"{data.annotations}: no images; give the annotations of a training set")
    val = None
    if data.val_annotations is not None:
        val = load_coco(
            read(data.val_annotations), on_bad_box=data.on_bad_box, source=data.val_annotations
        )
        if len(val) == 0:
            raise DatasetError(
                f"{data.val_annotations}: no images; leave --val-annotations out to train without "
                "validation"
            )
        if val.categories != train.categories:
            raise DatasetError(
                f"{data.val_annotations} has other categories than {data.annotations}: "
                f"{_differing(train, val)}; both need the same ids and names"
            )
    return TrainingInputs(train=train, val=val, canvas=choose_job_canvas(job, train))


def choose_job_canvas(job: TrainJob, train: CocoDataset) -> tuple[int, int]:
    """Network height and width of a training on these images; at least one."""
    return job.data.size or choose_canvas(
        np.array([record.height for record in train.images]),
        np.array([record.width for record in train.images]),
        resize=job.data.resize,
        max_size=job.data.max_size,
    )


def hash_settings(job: TrainJob) -> str:
    """SHA-256 of a training's resolved settings, in hexadecimal."""
    return hash_content(json.dumps(to_dict(job), sort_keys=True).encode())


def _differing(train: CocoDataset, val: CocoDataset) -> str:
    first = {(category.id, category.name) for category in train.categories.categories}
    second = {(category.id, category.name) for category in val.categories.categories}
    return (
        f"only in training {sorted(map(str, first - second))[:5]}, "
        f"only in validation {sorted(map(str, second - first))[:5]}"
    )


def check_objective(job: TrainJob, inputs: TrainingInputs) -> None:
    """Refuse an objective that no validation will report.

    Raises:
        ConfigError: If there is no validation set, or the class is not in it.
    """
    objective, price = job.run.objective, job.run.latency_price
    if inputs.val is None and (objective != "AP" or price > 0):
        raise ConfigError(
            f"run.objective={objective}, run.latency_price={price:g} without data.val_annotations: "
            "nothing would be measured; give --val-annotations"
        )
    names = inputs.train.categories.names
    if objective.startswith("AP/") and objective.removeprefix("AP/") not in names:
        raise ConfigError(
            f"run.objective={objective}: no such class; expected AP/ and one of "
            f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
        )


def count_steps(job: TrainJob, num_images: int) -> int:
    """Optimizer steps of the whole training."""
    if job.run.iters is not None:
        return job.run.iters
    return -(-(job.run.epochs or DEFAULT_EPOCHS) * num_images // job.run.batch)


def make_anchor_spec(anchors: AnchorConfig) -> AnchorSpec:
    """The anchors of a training or a sweep."""
    return AnchorSpec(
        scales=anchors.scales,
        ratios=anchors.ratios,
        strides=anchors.strides,
        convention=anchors.convention,
    )


def make_card(job: TrainJob, inputs: TrainingInputs, *, run_id: str) -> tuple[ModelCard, RetinaNet]:
    """The card, and the network with its initial weights (the same for the same seed).

    Raises:
        CheckpointError: If the backbone weights cannot be read or do not fit.
    """
    state, is_caffe = None, False
    if job.model.backbone_weights is not None:
        state, is_caffe = read_backbone_weights(
            job.model.backbone_weights, backbone=job.model.backbone
        )
    stride_in_1x1 = is_caffe if job.model.stride_in_1x1 is None else job.model.stride_in_1x1
    norm = job.model.norm
    if norm == "auto":
        norm = "gn" if state is None else "frozen_bn"
    card = ModelCard(
        architecture=Architecture(
            backbone=job.model.backbone,
            norm=norm,
            fpn_channels=job.model.fpn_channels,
            head_depth=job.model.head_depth,
            stride_in_1x1=stride_in_1x1,
        ),
        anchors=make_anchor_spec(job.anchors),
        categories=inputs.train.categories,
        canvas=inputs.canvas,
        score_thresholds=(DEFAULT_SCORE_THRESHOLD,) * len(inputs.train.categories),
        run_id=run_id,
        versions=collect_versions(),
        training=to_dict(job),
    )
    torch.manual_seed(job.run.seed)
    model = card.build_model()
    if state is not None:
        try:
            load_backbone_state(model.backbone, state)
        except ValueError as error:
            raise CheckpointError(f"{job.model.backbone_weights}: {error}") from error
    return card, model


def make_state(job: TrainJob, model: RetinaNet) -> TrainingState:
    """Optimizer and averages for a network that is on its device already."""
    kind = job.optim.optimizer
    decay = job.optim.weight_decay
    return TrainingState(
        model=model,
        optimizer=make_optimizer(
            model,
            kind=kind,
            learning_rate=job.optim.peak_lr or _LEARNING_RATES[kind],
            weight_decay=_WEIGHT_DECAYS[kind] if decay is None else decay,
        ),
        average=WeightAverage(model, decay=job.optim.ema_decay) if job.optim.ema_decay else None,
    )


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
    dataset: Any = TrainingDataset(
        dataset=inputs.train,
        images_root=job.data.images,
        read=make_reader(job.reading),
        canvas=inputs.canvas,
        augment=make_augment_settings(job),
        seed=job.run.seed,
        max_pixels=job.reading.max_pixels,
        allow_truncated=job.reading.allow_truncated,
    )
    sampler = StreamSampler(
        num_images=len(inputs.train),
        batch=job.run.batch,
        rank=rank,
        world_size=world_size,
        seed=job.run.seed,
        first_step=first_step,
        last_step=count_steps(job, len(inputs.train)),
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
        scale_range = (low / job.data.resize, high / job.data.resize)
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
        precision: `auto`, `bf16` or `fp32`.
        device: Where the network runs.
    """
    if precision == "fp32":
        return None
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None
