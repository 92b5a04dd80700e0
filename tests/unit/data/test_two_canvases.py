"""Landscape and portrait images on a canvas each, in batches of their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retinaray.assembly.training import choose_training_canvas, make_loader, read_inputs
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import TrainJob
from retinaray.data.batching import Batch
from retinaray.data.stream_sampler import StreamSampler
from retinaray.data.transforms import fit_size

Step = list[tuple[int, int]]


def steps_of(**changes: Any) -> list[Step]:
    settings = {"num_images": 10, "batch": 4, "last_step": 10, "portraits": (1, 4, 7), **changes}
    return list(StreamSampler(**settings))


@pytest.mark.parametrize(
    ("num_images", "portraits", "batch"),
    [(10, (1, 4, 7), 4), (12, (0, 1, 2, 3, 4, 5), 4), (7, (6,), 2), (9, (0, 2, 3, 5, 6, 7, 8), 5)],
)
def test_stream_sampler_takes_a_batch_from_one_stream_and_every_image_once_per_epoch(
    num_images: int, portraits: tuple[int, ...], batch: int
) -> None:
    num_steps = 4 * num_images  # 4 x batch epochs
    steps = steps_of(
        num_images=num_images, portraits=portraits, batch=batch, last_step=num_steps, seed=3
    )
    assert all(len(step) == batch for step in steps)
    streams: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for step in steps:
        kinds = {position in portraits for _, position in step}
        assert len(kinds) == 1
        streams[kinds.pop()] += step
    for is_portrait, stream in streams.items():
        own = [i for i in range(num_images) if (i in portraits) == is_portrait]
        assert len(stream) == 4 * batch * len(own)
        for epoch in range(4 * batch):
            places = stream[epoch * len(own) : (epoch + 1) * len(own)]
            assert {e for e, _ in places} == {epoch}
            assert sorted(position for _, position in places) == own


def test_stream_sampler_keeps_both_streams_in_the_same_epoch_but_for_half_a_batch() -> None:
    num_portraits = 0
    for number, step in enumerate(steps_of(last_step=200), start=1):
        num_portraits += sum(position in (1, 4, 7) for _, position in step)
        assert abs(num_portraits - 4 * number * 3 / 10) <= 2


@pytest.mark.parametrize("world_size", [2, 4])
def test_stream_sampler_gives_all_workers_the_same_shape_in_a_step(world_size: int) -> None:
    whole = steps_of()
    ranks = [steps_of(rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [list(itertools.chain(*shares)) for shares in zip(*ranks, strict=True)]
    assert joined == whole


@pytest.mark.parametrize("first_step", [0, 1, 5, 10])
def test_stream_sampler_resumes_with_the_tail_when_there_are_two_streams(first_step: int) -> None:
    assert steps_of(first_step=first_step) == steps_of()[first_step:]


@pytest.mark.parametrize("portraits", [(), tuple(range(10))])
def test_stream_sampler_has_one_stream_when_all_images_are_of_a_shape(
    portraits: tuple[int, ...],
) -> None:
    assert steps_of(portraits=portraits) == list(
        StreamSampler(num_images=10, batch=4, last_step=10)
    )


def test_stream_sampler_shuffles_both_streams_by_seed() -> None:
    orders = [
        [step for step in steps_of(num_images=40, portraits=range(20), last_step=10, seed=seed)]
        for seed in (0, 1)
    ]
    assert orders[0] != orders[1]
    # Equally long streams are not shuffled alike.
    portraits = [p for step in orders[0] for _, p in step if p < 20]
    others = [p - 20 for step in orders[0] for _, p in step if p >= 20]
    assert len(portraits) == len(others) == 20
    assert portraits != others


@pytest.fixture
def make_job(image_set: Any) -> Callable[..., TrainJob]:
    """Jobs on `image_set`: four images of 2:3 and 3:2 in landscape, two of 4:3 upright."""

    def make(**changes: object) -> TrainJob:
        data = {
            "images": str(image_set.folder),
            "annotations": str(image_set.annotations),
            "resize": 64,
            "max_size": 96,
            **changes,
        }
        return load_from_dict(
            TrainJob, {"output": "m.pth", "data": data, "run": {"batch": 2, "iters": 6}}, {}
        )

    return make


def load(job: TrainJob) -> list[Batch]:
    inputs = read_inputs(job)
    options: dict[str, Any] = {"rank": 0, "world_size": 1, "first_step": 0}
    return list(make_loader(job, inputs, **options, num_processes=0, pin_memory=False))


def test_make_loader_turns_the_canvas_for_portraits(make_job: Callable[..., TrainJob]) -> None:
    job = make_job(two_canvases=True)
    inputs = read_inputs(job)
    # 80x60 has its short side at 64 with 86 rows, 64x96 and 96x144 with 96 columns.
    assert choose_training_canvas(job, inputs) == (64, 96)
    assert inputs.canvas == (96, 96), "validation and the model have room for both"
    batches = load(job)
    upright = {record.image_id for record in inputs.train.images if record.height > record.width}
    shapes = []
    for batch in batches:
        is_upright = {image_id in upright for image_id in batch.image_ids}
        assert len(is_upright) == 1
        height, width = batch.images.shape[-2:]
        assert (height, width) == ((96, 64) if is_upright.pop() else (64, 96))
        shapes.append((height, width))
        assert (batch.boxes_xyxy <= torch.tensor([width, height, width, height])).all()
        assert batch.is_valid.any()
    assert shapes.count((96, 64)) == 2  # a third of six steps


def test_make_loader_has_one_canvas_by_default(make_job: Callable[..., TrainJob]) -> None:
    assert {tuple(batch.images.shape[-2:]) for batch in load(make_job())} == {(96, 96)}


def test_two_canvases_spare_padding_and_keep_the_scale_of_real_photographs(
    shared_data: Path,
) -> None:
    folder = shared_data / "coco128"
    data = {"images": str(folder / "images"), "annotations": str(folder / "train.json")}
    one, two = (
        load_from_dict(TrainJob, {"output": "m.pth", "data": {**data, "two_canvases": wanted}}, {})
        for wanted in (False, True)
    )
    inputs = read_inputs(two)
    height, width = choose_training_canvas(two, inputs)
    assert height < width
    single = read_inputs(one).canvas
    assert height * width < 0.65 * single[0] * single[1]
    # The model's own canvas shows an image at about the size in which it was trained.
    ratios = []
    for record in inputs.train.images:
        canvas = (width, height) if record.height > record.width else (height, width)
        trained = fit_size(record.height, record.width, *canvas)
        shown = fit_size(record.height, record.width, *inputs.canvas)
        ratios.append(shown[0] / trained[0])
    assert 1.0 <= np.median(ratios) < 1.05
    # The scale jitter of a training is 0.8 to 1.25.
    assert np.mean([0.8 < ratio < 1.25 for ratio in ratios]) > 0.9


def test_choose_job_canvas_is_that_of_one_canvas_when_all_images_are_of_a_shape(
    shared_data: Path,
) -> None:
    folder = shared_data / "bccd"
    data = {"images": str(folder / "images"), "annotations": str(folder / "train.json")}
    jobs = [
        load_from_dict(TrainJob, {"output": "m.pth", "data": {**data, "two_canvases": wanted}}, {})
        for wanted in (False, True)
    ]
    canvases = {read_inputs(job).canvas for job in jobs}
    assert canvases == {(800, 1088)}  # 480x640 at short side 800: 1066.7 columns
    assert choose_training_canvas(jobs[1], read_inputs(jobs[1])) == (800, 1088)
