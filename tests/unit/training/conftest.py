from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from retinaray.data.augmentation import AugmentSettings
from retinaray.data.batching import Batch, TrainingDataset, collate_samples
from retinaray.data.coco import load_coco
from retinaray.data.stream_sampler import StreamSampler
from retinaray.training.loop import LoopSettings
from retinaray.training.schedule import Schedule
from retinaray.training.state import TrainingState
from retinaray.training.step import LossSettings


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """Batches of noise: make_batch([boxes of image 0, ...]); classes are 0, 1, 2, 0, ..."""

    def make(boxes: Sequence[Tensor], *, height: int = 64, width: int = 96) -> Batch:
        most = max(1, max(len(rows) for rows in boxes))
        padded = torch.zeros(len(boxes), most, 4)
        is_valid = torch.zeros(len(boxes), most, dtype=torch.bool)
        for row, rows in enumerate(boxes):
            padded[row, : len(rows)] = rows
            is_valid[row, : len(rows)] = True
        generator = torch.Generator().manual_seed(len(boxes))
        shape = (len(boxes), 3, height, width)
        return Batch(
            images=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            boxes_xyxy=padded,
            class_indices=torch.arange(most).remainder(3).expand(len(boxes), -1).contiguous(),
            is_valid=is_valid,
            is_crowd=torch.zeros_like(is_valid),
            image_ids=tuple(f"image-{row}" for row in range(len(boxes))),
        )

    return make


@pytest.fixture(scope="session")
def make_batches(image_set: Any) -> Callable[..., list[Batch]]:
    """Batches of `image_set` as a training reads them: make_batches(first_step, last_step)."""
    dataset = TrainingDataset(
        dataset=load_coco(image_set.annotations),
        images_root=str(image_set.folder),
        read=image_set.read,
        canvas=(64, 96),
        augment=AugmentSettings(
            flip=0.5, scale_range=(0.8, 1.25), crop=0.3, brightness=0.2, hue=0.02, mosaic=0.2
        ),
        seed=3,
        max_pixels=10**6,
        allow_truncated=False,
    )

    def make(first_step: int, last_step: int, *, batch: int = 4) -> list[Batch]:
        sampler = StreamSampler(
            num_images=len(dataset),
            batch=batch,
            seed=3,
            first_step=first_step,
            last_step=last_step,
        )
        return [collate_samples([dataset[index] for index in indices]) for indices in sampler]

    return make


@pytest.fixture(scope="session")
def make_loop_settings() -> Callable[..., LoopSettings]:
    """Loop settings with the few values that a test cares for."""

    def make(
        *,
        checkpoint_steps: tuple[int, ...],
        log_every: int = 2,
        peak_lr: float = 1e-3,
        warmup_steps: int = 2,
        batch: int = 4,
        num_images: int = 6,
        clip_norm: float = 10.0,
        **changes: Any,
    ) -> LoopSettings:
        settings = LoopSettings(
            batch=batch,
            num_images=num_images,
            checkpoint_steps=checkpoint_steps,
            log_every=log_every,
            loss=LossSettings(),
            schedule=Schedule(
                peak_lr=peak_lr, total_steps=checkpoint_steps[-1], warmup_steps=warmup_steps
            ),
            clip_norm=clip_norm,
            autocast_dtype=None,
        )
        return replace(settings, **changes)

    return make


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of nested dictionaries and lists by its path."""
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list | tuple):
        pairs = enumerate(value)
    else:
        return {prefix: value}
    return {k: v for key, item in pairs for k, v in flatten(item, f"{prefix}/{key}").items()}


@pytest.fixture(scope="session")
def everything() -> Callable[[TrainingState], dict[str, Any]]:
    """All that changes in a training, copied, by path."""

    def gather(state: TrainingState) -> dict[str, Any]:
        parts: dict[str, Any] = {
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "average": state.average.values if state.average else None,
            "scaler": state.scaler.state_dict() if state.scaler else None,
            "rest": [state.step, state.best_ap, state.num_stale, state.num_skipped_in_a_row],
        }
        return {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in flatten(parts).items()
        }

    return gather


@pytest.fixture(scope="session")
def assert_equal_bit_for_bit() -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Compares what `everything` gathers."""

    def compare(one: dict[str, Any], other: dict[str, Any]) -> None:
        assert one.keys() == other.keys()
        for key, value in one.items():
            same = (
                torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
            )
            assert same, key

    return compare
