"""The resume law on real pictures: a training may stop after any step, and goes on as if not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from retinaray.artifact import ModelCard
from retinaray.data.augmentation import AugmentSettings
from retinaray.data.batching import Batch, TrainingDataset, collate_samples
from retinaray.data.coco import load_coco
from retinaray.data.stream_sampler import StreamSampler
from retinaray.training.loop import LoopSettings, Progress, run_loop
from retinaray.training.schedule import Schedule
from retinaray.training.state import TrainingState
from retinaray.training.step import WeightAverage, make_optimizer

NUM_IMAGES, BATCH, STEPS = 5, 2, 4


@pytest.fixture
def read_batches(shared_data: Path) -> Callable[[int], list[Batch]]:
    """Batches of five blood smears from a step on, augmented in every way."""
    folder = shared_data / "bccd"
    coco = json.loads((folder / "train.json").read_bytes())
    coco["images"] = coco["images"][:NUM_IMAGES]
    kept = {image["id"] for image in coco["images"]}
    coco["annotations"] = [row for row in coco["annotations"] if row["image_id"] in kept]
    augment = AugmentSettings(
        flip=0.5, vertical_flip=0.5, scale_range=(0.8, 1.25), crop=0.5, hue=0.05, mosaic=0.3
    )
    dataset = TrainingDataset(
        dataset=load_coco(json.dumps(coco).encode()),
        images_root=str(folder / "images"),
        read=lambda uri: Path(uri).read_bytes(),
        canvas=(48, 64),
        augment=augment,
        seed=3,
        max_pixels=10**6,
        allow_truncated=False,
    )

    def read(first_step: int) -> list[Batch]:
        sampler = StreamSampler(
            num_images=NUM_IMAGES, batch=BATCH, seed=3, first_step=first_step, last_step=STEPS
        )
        return [collate_samples([dataset[index] for index in indices]) for indices in sampler]

    return read


@pytest.fixture
def make_state(
    make_tiny_card: Callable[..., ModelCard], one_thread: None
) -> Callable[[str, str], TrainingState]:
    def make(kind: str, norm: str) -> TrainingState:
        torch.manual_seed(0)
        model = make_tiny_card(norm=norm, head_depth=0).build_model()
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return TrainingState(
            model=model,
            optimizer=make_optimizer(model, kind=kind, learning_rate=1e-3, weight_decay=0.05),
            average=WeightAverage(model, decay=0.9),
            scaler=torch.amp.GradScaler("cpu", growth_interval=2) if kind == "sgd" else None,
        )

    return make


@pytest.mark.parametrize(
    ("kind", "norm", "accumulate", "milestones"),
    [("adamw", "gn", 2, ()), ("sgd", "bn", 1, (2, 3))],
)
def test_a_training_that_is_resumed_after_any_step_equals_the_uninterrupted_one(
    read_batches: Callable[[int], list[Batch]],
    make_state: Callable[[str, str], TrainingState],
    make_loop_settings: Callable[..., LoopSettings],
    everything: Callable[[TrainingState], dict[str, Any]],
    assert_equal_bit_for_bit: Callable[[dict[str, Any], dict[str, Any]], None],
    kind: str,
    norm: str,
    accumulate: int,
    milestones: tuple[int, ...],
) -> None:
    settings: LoopSettings = make_loop_settings(
        checkpoint_steps=tuple(range(1, STEPS + 1)),
        log_every=1,
        accumulate=accumulate,
        schedule=Schedule(
            peak_lr=1e-3,
            total_steps=STEPS,
            warmup_steps=1,
            kind="milestones" if milestones else "cosine",
            milestones=milestones,
        ),
    )

    def train(state: TrainingState, saved: list[bytes]) -> list[tuple[float, ...]]:
        reports: list[Progress] = []

        def keep(_: str) -> bool:
            saved.append(state.dump())
            return False

        end = run_loop(
            state,
            state.model,
            read_batches(state.step),
            settings,
            world_size=1,
            on_progress=reports.append,
            on_checkpoint=keep,
        )
        assert end == "finished"
        return [(r.class_loss, r.box_loss, r.gradient_norm, r.learning_rate) for r in reports]

    whole = make_state(kind, norm)
    saved = [whole.dump()]
    start = everything(whole)
    losses = train(whole, saved)
    end = everything(whole)
    assert len(saved) == STEPS + 1
    assert len(set(losses)) == STEPS
    moved = [key for key in start if key.startswith("/model/") and not end[key].equal(start[key])]
    assert len(moved) == len(whole.model.state_dict())
    resumed = make_state(kind, norm)
    for step in range(STEPS):
        # Nothing of what it has come to before may remain.
        resumed.load(saved[step], source="training.pth")
        assert resumed.step == step
        assert train(resumed, []) == losses[step:], step
        assert_equal_bit_for_bit(everything(resumed), end)
