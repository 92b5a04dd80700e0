"""One process with a batch of 8, two with 4 and four with 2 take the same steps on real images.

So do two and four that go on from a checkpoint of the one. Run as a script, this file forks the
processes: torch is imported once for all.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from retinaray.data.augmentation import AugmentSettings
from retinaray.data.batching import Batch, TrainingDataset, collate_samples
from retinaray.data.coco import load_coco
from retinaray.data.stream_sampler import StreamSampler
from retinaray.detector.retinanet import RetinaNet
from retinaray.training.loop import (
    CheckpointKind,
    LoopEnd,
    LoopSettings,
    Progress,
    never,
    run_loop,
)
from retinaray.training.schedule import Schedule
from retinaray.training.state import TrainingState
from retinaray.training.step import LossSettings, WeightAverage, make_optimizer

NUM_IMAGES, BATCH = 12, 8
WORLD_SIZES = (2, 4)
STEPS = 6
# Rank 1 wants to stop after step 1: its vote travels with step 2, and is read after step 4.
ASKED_AFTER, STOPPED_AFTER = 1, 4
# In the middle of the second epoch, whose images are in another order than those of the first.
RESUMED_AFTER = 2
CHECKPOINT = "training.pth"


def read_share(data: Path, rank: int, world_size: int, first_step: int = 0) -> list[Batch]:
    """A rank's batches of six steps over twelve blood smears, augmented and shuffled by epoch.

    They begin after `first_step`. Five smears are without their annotations: in a small share may
    be nothing to find.
    """
    coco = json.loads((data / "train.json").read_bytes())
    coco["images"] = coco["images"][:NUM_IMAGES]
    labelled = {image["id"] for image in coco["images"][5:]}
    coco["annotations"] = [row for row in coco["annotations"] if row["image_id"] in labelled]
    dataset = TrainingDataset(
        dataset=load_coco(json.dumps(coco).encode()),
        images_root=str(data / "images"),
        read=lambda uri: Path(uri).read_bytes(),
        canvas=(48, 64),
        augment=AugmentSettings(flip=0.5, scale_range=(0.8, 1.25), crop=0.5, mosaic=0.3),
        seed=3,
        max_pixels=10**6,
        allow_truncated=False,
    )
    sampler = StreamSampler(
        num_images=NUM_IMAGES,
        batch=BATCH,
        rank=rank,
        world_size=world_size,
        seed=3,
        first_step=first_step,
        last_step=STEPS,
    )
    return [collate_samples([dataset[index] for index in indices]) for indices in sampler]


def make_state() -> TrainingState:
    """A training before its first step, the same in each process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = RetinaNet(
        backbone="ResNet10FPN", num_classes=3, norm="gn", fpn_channels=16, head_depth=0
    ).train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TrainingState(
        model=model,
        optimizer=make_optimizer(model, kind="sgd", learning_rate=0.01, weight_decay=0.0),
        average=WeightAverage(model, decay=0.5),
    )


def run(
    state: TrainingState,
    data: Path,
    rank: int,
    world_size: int,
    *,
    on_checkpoint: Callable[[CheckpointKind], bool],
    checkpoint_steps: tuple[int, ...] = (STEPS,),
    wants_stop: Callable[[], bool] = never,
) -> tuple[LoopEnd, dict[str, torch.Tensor]]:
    """How a rank's steps end; their losses, gradients of the last, and what they come to."""
    model = state.model
    wrapped: nn.Module = model
    if world_size > 1:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    reports: list[Progress] = []
    end = run_loop(
        state,
        wrapped,
        read_share(data, rank, world_size, first_step=state.step),
        LoopSettings(
            batch=BATCH,
            num_images=NUM_IMAGES,
            checkpoint_steps=checkpoint_steps,
            log_every=1,
            loss=LossSettings(),
            schedule=Schedule(peak_lr=0.01, total_steps=STEPS),
            clip_norm=10.0,
            autocast_dtype=None,
            # Two workers take theirs in two parts.
            accumulate=2 if world_size == 2 else 1,
        ),
        world_size=world_size,
        on_progress=reports.append,
        on_checkpoint=on_checkpoint,
        wants_stop=wants_stop,
    )
    assert state.average is not None
    values = {f"grad.{name}": p.grad.clone() for name, p in model.named_parameters()}
    values |= {f"weight.{name}": p.detach() for name, p in model.named_parameters()}
    values |= {f"average.{name}": value for name, value in state.average.values.items()}
    for name in ("num_foreground", "gradient_norm", "class_loss", "box_loss"):
        values[name] = torch.tensor([getattr(report, name) for report in reports])
    return end, values


def train(data: Path, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """What a rank comes to that is stopped."""
    state = make_state()
    kept: list[tuple[int, CheckpointKind]] = []
    end, values = run(
        state,
        data,
        rank,
        world_size,
        on_checkpoint=lambda kind: kept.append((state.step, kind)) is None,
        wants_stop=lambda: state.step == ASKED_AFTER and rank == min(1, world_size - 1),
    )
    assert (end, kept) == ("stopped", [(STOPPED_AFTER, "stop")]), (end, kept)
    return values


def resume(data: Path, rank: int, world_size: int, content: bytes) -> dict[str, torch.Tensor]:
    """What a rank comes to that goes on from a checkpoint to the end."""
    state = make_state()
    state.load(content, source=CHECKPOINT)
    assert state.step == RESUMED_AFTER
    end, values = run(state, data, rank, world_size, on_checkpoint=lambda _: False)
    assert (end, state.step) == ("finished", STEPS)
    return values


def run_rank(rank: int, world_size: int, folder: Path, data: Path) -> None:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting{world_size}",
        rank=rank,
        world_size=world_size,
    )
    torch.save(train(data, rank, world_size), folder / f"rank{rank}of{world_size}.pth")
    resumed = resume(data, rank, world_size, (folder / CHECKPOINT).read_bytes())
    torch.save(resumed, folder / f"resumed{rank}of{world_size}.pth")
    torch.distributed.destroy_process_group()


def fork_ranks(folder: Path, data: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=run_rank, args=(rank, world_size, folder, data))
        for world_size in WORLD_SIZES
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(max(abs(rank.exitcode or 0) for rank in ranks))


@pytest.fixture(scope="module")
def uninterrupted(shared_data: Path) -> tuple[dict[str, torch.Tensor], bytes]:
    """What one process comes to that takes all steps, and its checkpoint on the way."""
    before = torch.get_num_threads()
    state = make_state()
    saved: list[bytes] = []
    end, values = run(
        state,
        shared_data / "bccd",
        0,
        1,
        checkpoint_steps=(RESUMED_AFTER, STEPS),
        on_checkpoint=lambda _: saved.append(state.dump()) is not None,
    )
    torch.set_num_threads(before)
    assert (end, len(saved)) == ("finished", 2)
    return values, saved[0]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    shared_data: Path,
    uninterrupted: tuple[dict[str, torch.Tensor], bytes],
) -> Path:
    """What all ranks of both sizes have saved."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / CHECKPOINT).write_bytes(uninterrupted[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, __file__, str(folder), str(shared_data / "bccd")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def expected(shared_data: Path) -> dict[str, torch.Tensor]:
    """What one process with the whole batch comes to."""
    before = torch.get_num_threads()
    values = train(shared_data / "bccd", 0, 1)
    torch.set_num_threads(before)
    return values


def test_some_share_has_nothing_to_find(shared_data: Path) -> None:
    """What the comparison below is to cover."""
    batches = [batch for rank in range(4) for batch in read_share(shared_data / "bccd", rank, 4)]
    assert any(not batch.is_valid.any() for batch in batches)
    assert any(batch.is_valid.any() for batch in batches)


def read_shares(folder: Path, name: str, world_size: int) -> list[dict[str, torch.Tensor]]:
    paths = [folder / f"{name}{rank}of{world_size}.pth" for rank in range(world_size)]
    return [torch.load(path, weights_only=True) for path in paths]


def check_alike(shares: list[dict[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    for key, value in expected.items():
        if key in ("class_loss", "box_loss"):
            # Each reports its share times the number of workers.
            total = torch.stack([share[key] for share in shares]).mean(0)
            torch.testing.assert_close(total, value, rtol=1e-4, atol=0, msg=key)
            continue
        for share in shares:
            torch.testing.assert_close(share[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_run_loop_trains_alike_and_stops_together_when_processes_share_the_batch(
    folder: Path, expected: dict[str, torch.Tensor], world_size: int, one_thread: None
) -> None:
    check_alike(read_shares(folder, "rank", world_size), expected)
    assert len(expected["class_loss"]) == STOPPED_AFTER
    assert len(set(expected["class_loss"].tolist())) == STOPPED_AFTER
    largest = max(value.abs().max() for key, value in expected.items() if "grad." in key)
    assert largest > 1e-2  # so that 1e-5 means something


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_training_that_goes_on_with_other_workers_sees_the_same_images_and_comes_to_the_same(
    folder: Path,
    uninterrupted: tuple[dict[str, torch.Tensor], bytes],
    world_size: int,
    one_thread: None,
) -> None:
    reported = ("num_foreground", "gradient_norm", "class_loss", "box_loss")
    expected = {
        key: value[RESUMED_AFTER:] if key in reported else value
        for key, value in uninterrupted[0].items()
    }
    check_alike(read_shares(folder, "resumed", world_size), expected)
    # Other images would have been noticed: each step has a foreground of its own.
    counts = uninterrupted[0]["num_foreground"]
    assert len(set(counts.tolist())) == STEPS


if __name__ == "__main__":
    fork_ranks(*map(Path, sys.argv[1:]))
