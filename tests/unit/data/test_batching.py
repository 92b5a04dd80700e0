"""Order, augmentation and padding of training batches, for any number of workers and resumed."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from retinaray.data import input_cost
from retinaray.data.augmentation import AugmentSettings
from retinaray.data.batching import Batch, Sample, TrainingDataset, collate_samples
from retinaray.data.coco import CocoDataset, load_coco
from retinaray.data.input_cost import InputCost
from retinaray.data.stream_sampler import StreamSampler
from retinaray.data.transforms import letterbox
from retinaray.errors import DatasetError, MissingFileError, StorageError

# Class i is drawn in colour i; which channels are lit tells them apart even where they blend.
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
SIZES = [(120, 160), (150, 100), (90, 90), (200, 240)]
ROOT = "s3://bucket/train"
GEOMETRY = AugmentSettings(flip=0.5, vertical_flip=0.3, scale_range=(0.7, 1.6), crop=0.5)
EVERYTHING = replace(GEOMETRY, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02, mosaic=0.5)


def boxes_of(index: int) -> list[list[int]]:
    """xywh of the two rectangles in image `index`; the last image is a negative."""
    height, width = SIZES[index]
    if index == 3:
        return []
    return [[5, 8, width // 3, height // 3], [width // 2, height // 2, width // 3, height // 4]]


def encode(index: int, file_format: str) -> bytes:
    height, width = SIZES[index]
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    if index == 3:  # too dark for any class's colour, but not the same everywhere
        pixels[:] = np.linspace(0, 60, width).astype(np.uint8)[:, None]
    for x, y, box_width, box_height in boxes_of(index):
        pixels[y : y + box_height, x : x + box_width] = COLOURS[index]
    stream = io.BytesIO()
    options: dict[str, Any] = {"quality": 98, "subsampling": 0} if file_format == "JPEG" else {}
    Image.fromarray(pixels).save(stream, file_format, **options)
    return stream.getvalue()


FILES = {f"{ROOT}/{index}.png": encode(index, "PNG") for index in range(4)}


def read_file(uri: str) -> bytes:
    """Stands in for storage; at module level, so that worker processes find it."""
    try:
        return FILES[uri]
    except KeyError as error:
        raise MissingFileError(f"no file at {uri}") from error


def document_of(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> CocoDataset:
    """A data set of four classes."""
    categories = [{"id": i, "name": f"class {i}"} for i in range(4)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    return load_coco(json.dumps(document).encode())


@pytest.fixture
def coco() -> CocoDataset:
    """Four images with ids 100 to 103, of which the last has no boxes."""
    return document_of(
        [
            {"id": 100 + i, "file_name": f"{i}.png", "height": height, "width": width}
            for i, (height, width) in enumerate(SIZES)
        ],
        [
            {"id": 1 + 2 * i + j, "image_id": 100 + i, "category_id": i, "bbox": box, "iscrowd": 0}
            for i in range(4)
            for j, box in enumerate(boxes_of(i))
        ],
    )


def dataset_of(
    coco: CocoDataset,
    *,
    canvas: tuple[int, int] = (96, 128),
    augment: AugmentSettings | None = None,
    read: Callable[[str], bytes] = read_file,
    seed: int = 0,
    max_pixels: int = 10**6,
) -> TrainingDataset:
    return TrainingDataset(
        dataset=coco,
        images_root=ROOT,
        read=read,
        canvas=canvas,
        augment=augment or AugmentSettings(),
        seed=seed,
        max_pixels=max_pixels,
        allow_truncated=False,
    )


def steps_of(**changes: int) -> list[list[tuple[int, int]]]:
    settings = {"num_images": 10, "batch": 4, "last_step": 10}
    return list(StreamSampler(**{**settings, **changes}))  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_images", "batch"), [(10, 4), (10, 5), (7, 1), (3, 8), (1, 2)])
def test_stream_sampler_gives_every_image_once_per_epoch(num_images: int, batch: int) -> None:
    num_epochs = 2 * batch  # ends with a whole batch
    steps = steps_of(
        num_images=num_images, batch=batch, last_step=num_epochs * num_images // batch, seed=3
    )
    assert all(len(step) == batch for step in steps)
    stream = list(itertools.chain.from_iterable(steps))
    assert len(stream) == num_epochs * num_images
    for epoch in range(num_epochs):
        places = stream[epoch * num_images : (epoch + 1) * num_images]
        assert {own for own, _ in places} == {epoch}
        assert sorted(position for _, position in places) == list(range(num_images))


def test_stream_sampler_shuffles_anew_by_epoch_and_seed() -> None:
    def order(epoch: int, seed: int) -> list[int]:
        stream = itertools.chain.from_iterable(steps_of(num_images=40, last_step=30, seed=seed))
        return [position for own, position in stream if own == epoch]

    orders = [order(epoch, seed) for epoch in range(3) for seed in range(2)]
    assert all(len(own) == 40 for own in orders)
    for one, other in itertools.combinations([*orders, list(range(40))], 2):
        assert one != other
    assert order(1, 1) == order(1, 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_stream_sampler_ranks_partition_the_same_global_batches(world_size: int) -> None:
    whole = steps_of(batch=12, last_step=7)
    ranks = [
        steps_of(batch=12, last_step=7, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert all(len(share) == 12 // world_size for rank in ranks for share in rank)
    joined = [list(itertools.chain(*shares)) for shares in zip(*ranks, strict=True)]
    assert joined == whole


@pytest.mark.parametrize("first_step", [0, 1, 4, 9, 10])
def test_stream_sampler_resumes_with_the_tail(first_step: int) -> None:
    sampler = StreamSampler(
        num_images=10, batch=4, rank=1, world_size=2, first_step=first_step, last_step=10
    )
    assert list(sampler) == steps_of(rank=1, world_size=2)[first_step:]
    assert len(sampler) == 10 - first_step
    assert list(sampler) == list(sampler), "a second pass begins anew"


def test_stream_sampler_is_the_same_when_several_are_read_in_turn() -> None:
    alone = [steps_of(seed=seed) for seed in range(3)]
    samplers = [StreamSampler(num_images=10, batch=4, seed=s, last_step=10) for s in range(3)]
    in_turn = list(zip(*samplers, strict=True))
    assert [list(steps) for steps in zip(*in_turn, strict=True)] == alone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 0}, "num_images=0: a training needs at least one image"),
        ({"world_size": 3}, "batch=4 does not divide among world_size=3 workers"),
    ],
)
def test_stream_sampler_refuses_bad_numbers(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steps_of(**changes)


def test_dataset_gives_the_plain_letterbox_by_default(coco: CocoDataset) -> None:
    dataset = dataset_of(coco)
    assert len(dataset) == 4
    for position, (height, width) in enumerate(SIZES):
        sample = dataset[7, position]
        pixels = np.asarray(Image.open(io.BytesIO(FILES[f"{ROOT}/{position}.png"])))
        expected, placement = letterbox(
            pixels, height=height, width=width, canvas_height=96, canvas_width=128
        )
        np.testing.assert_array_equal(sample.image, expected)
        truth = coco.targets(position)
        np.testing.assert_array_equal(sample.boxes_xyxy, placement.to_network(truth.boxes_xyxy))
        np.testing.assert_array_equal(sample.class_indices, truth.class_indices)
        assert not sample.is_crowd.any()
        assert sample.image_id == 100 + position


def assert_same_sample(one: Sample, other: Sample) -> None:
    for field in fields(Sample):
        if field.name != "cost":
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_dataset_depends_on_seed_epoch_and_position_alone(coco: CocoDataset) -> None:
    places = [(epoch, position) for epoch in range(3) for position in range(4)]
    first, again = (dataset_of(coco, augment=EVERYTHING, seed=4) for _ in range(2))
    samples = {place: first[place] for place in places}
    for place in reversed(places):
        assert_same_sample(again[place], samples[place])
    images = {sample.image.tobytes() for sample in samples.values()}
    assert len(images) == len(places), "every epoch must change every image anew"
    other_seed = dataset_of(coco, augment=EVERYTHING, seed=5)
    assert {other_seed[place].image.tobytes() for place in places}.isdisjoint(images)


def test_dataset_changes_equal_images_in_different_ways() -> None:
    images = [{"id": i, "file_name": f"{i}.png", "height": 120, "width": 160} for i in range(9)]
    same = document_of(images, [])
    dataset = dataset_of(
        same, augment=AugmentSettings(crop=1.0), read=lambda _: FILES[f"{ROOT}/0.png"]
    )
    assert len({dataset[0, position].image.tobytes() for position in range(9)}) == 9


def test_loader_gives_the_same_bytes_whatever_the_number_of_workers(coco: CocoDataset) -> None:
    def batches(num_workers: int) -> list[Batch]:
        loader = DataLoader(
            dataset_of(coco, augment=EVERYTHING),
            batch_sampler=StreamSampler(num_images=4, batch=2, last_step=6),
            collate_fn=collate_samples,
            num_workers=num_workers,
        )
        return list(loader)

    for alone, shared in zip(batches(0), batches(2), strict=True):
        assert alone.image_ids == shared.image_ids
        for name in ("images", "boxes_xyxy", "class_indices", "is_valid", "is_crowd"):
            assert getattr(alone, name).equal(getattr(shared, name)), name


def assert_boxes_follow(sample: Sample, message: str) -> int:
    """Every box is filled with its class's colour, and no such colour lies outside; counts boxes.

    Tolerance: 1.5 px at each edge.
    """
    rows, columns = np.mgrid[: sample.image.shape[0], : sample.image.shape[1]] + 0.5
    for class_index, colour in enumerate(np.array(COLOURS)):
        lit, dark = sample.image[..., colour > 0], sample.image[..., colour == 0]
        is_own = (lit.min(axis=2) >= 128) & (dark.max(axis=2) < 64)
        is_allowed = np.zeros_like(is_own)
        for x1, y1, x2, y2 in sample.boxes_xyxy[sample.class_indices == class_index]:
            near = np.minimum.reduce([columns - x1, x2 - columns, rows - y1, y2 - rows])
            assert is_own[near > 1.5].all(), f"{message}: a box of class {class_index} is not full"
            is_allowed |= near > -1.5
        assert not (is_own & ~is_allowed).any(), f"{message}: class {class_index} without a box"
    return len(sample.boxes_xyxy)


@pytest.mark.parametrize("mosaic", [0.0, 1.0], ids=["single", "mosaic"])
def test_dataset_boxes_follow_the_pixels(coco: CocoDataset, mosaic: float) -> None:
    settings = replace(GEOMETRY, mosaic=mosaic)
    dataset = dataset_of(coco, canvas=(160, 192), augment=settings)
    num_boxes = sum(
        assert_boxes_follow(dataset[epoch, position], f"epoch {epoch}, image {position}")
        for epoch in range(15)
        for position in range(4)
    )
    # Two boxes in three of four images, four times as many in a mosaic; crops remove some.
    assert num_boxes > (250 if mosaic else 60)


def test_dataset_boxes_follow_the_pixels_when_jpegs_are_decoded_at_reduced_size() -> None:
    pixels = np.zeros((1201, 1607, 3), dtype=np.uint8)
    pixels[200:800, 300:1100] = COLOURS[0]
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=98, subsampling=0)
    coco = document_of(
        [{"id": 1, "file_name": "a.jpg", "height": 1201, "width": 1607}],
        [{"id": 1, "image_id": 1, "category_id": 0, "bbox": [300, 200, 800, 600]}],
    )
    settings = {"augment": GEOMETRY, "read": lambda _: stream.getvalue()}
    # 1201 x 1607 are 1.93 million pixels.
    with pytest.raises(DatasetError, match=r"image 1 \(s3://bucket/train/a.jpg\): .*max_pixels"):
        _ = dataset_of(coco, **settings, max_pixels=1_900_000)[0, 0]
    dataset = dataset_of(coco, **settings, max_pixels=2_000_000)
    num_boxes = sum(assert_boxes_follow(dataset[epoch, 0], f"epoch {epoch}") for epoch in range(12))
    assert num_boxes == 12


def test_mosaic_takes_three_other_images_and_the_id_of_the_first(coco: CocoDataset) -> None:
    dataset = dataset_of(coco, canvas=(128, 128), augment=AugmentSettings(mosaic=1.0))
    seen = set()
    for epoch in range(10):
        sample = dataset[epoch, 1]
        assert sample.image_id == 101
        assert sample.image.shape == (128, 128, 3)
        assert sample.boxes_xyxy.dtype == np.float32
        assert sample.class_indices.dtype == np.int64
        assert sample.is_crowd.dtype == np.bool_
        assert 1 in sample.class_indices
        seen |= set(sample.class_indices.tolist())
    assert seen == {0, 1, 2}


def test_dataset_marks_stumps_and_crowds_as_ignored() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (100, 100), (255, 0, 0)).save(stream, "PNG")
    coco = document_of(
        [{"id": "a", "file_name": "a.png", "height": 100, "width": 100}],
        [
            {"id": 1, "image_id": "a", "category_id": 0, "bbox": [0, 0, 100, 100], "iscrowd": 1},
            {"id": 2, "image_id": "a", "category_id": 0, "bbox": [0, 0, 100, 100]},
            {"id": 3, "image_id": "a", "category_id": 0, "bbox": [45, 45, 10, 10]},
        ],
    )
    dataset = dataset_of(
        coco,
        canvas=(50, 50),
        augment=AugmentSettings(scale_range=(3.0, 3.0)),
        read=lambda _: stream.getvalue(),
    )
    # Three times 50 px on a canvas of 50: a ninth of the large boxes is left. The small one is kept
    # whole, cut, or gone.
    for epoch in range(10):
        sample = dataset[epoch, 0]
        assert sample.is_crowd[:2].tolist() == [True, True]
        assert sample.boxes_xyxy[:2].tolist() == [[0, 0, 50, 50]] * 2


def test_collate_samples_pads_ground_truth(coco: CocoDataset) -> None:
    dataset = dataset_of(coco)
    batch = collate_samples([dataset[0, 3], dataset[0, 1]])
    assert batch.images.shape == (2, 3, 96, 128)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.images[1].permute(1, 2, 0).equal(torch.from_numpy(dataset[0, 1].image))
    assert batch.is_valid.tolist() == [[False] * 8, [True] * 2 + [False] * 6]
    assert batch.boxes_xyxy[1, :2].equal(torch.from_numpy(dataset[0, 1].boxes_xyxy))
    assert batch.class_indices.tolist() == [[0] * 8, [1, 1] + [0] * 6]
    assert not batch.boxes_xyxy[0].any()
    assert not batch.is_crowd.any()
    assert batch.image_ids == (103, 101)


@pytest.mark.parametrize(("most", "rows"), [(1, 8), (8, 8), (9, 16), (16, 16), (700, 1024)])
def test_collate_samples_makes_few_shapes(coco: CocoDataset, most: int, rows: int) -> None:
    sample = dataset_of(coco)[0, 3]
    crowded = replace(
        sample,
        boxes_xyxy=np.ones((most, 4), dtype=np.float32),
        class_indices=np.ones(most, dtype=np.int64),
        is_crowd=np.zeros(most, dtype=np.bool_),
    )
    batch = collate_samples([sample, crowded])
    assert batch.boxes_xyxy.shape == (2, rows, 4)
    assert batch.is_valid.sum(dim=1).tolist() == [0, most]


def test_collate_samples_keeps_empty_rows_when_there_are_no_boxes(coco: CocoDataset) -> None:
    batch = collate_samples([dataset_of(coco)[0, 3]] * 3)
    assert batch.boxes_xyxy.shape == (3, 8, 4)
    assert batch.class_indices.dtype == torch.int64
    assert not batch.is_valid.any()


def test_batch_to_moves_every_tensor(coco: CocoDataset) -> None:
    batch = collate_samples([dataset_of(coco)[0, 0]]).to(torch.device("meta"))
    plain = ("image_ids", "cost")
    tensors = [getattr(batch, field.name) for field in fields(Batch) if field.name not in plain]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert batch.image_ids == (100,)
    assert batch.cost.num_images == 1


def test_dataset_measures_what_a_sample_costs(
    coco: CocoDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    walls, processors = iter([10.0, 10.5, 20.0, 20.25]), iter([1.0, 1.125, 2.0, 2.0625])
    monkeypatch.setattr(input_cost.time, "perf_counter", lambda: next(walls))
    monkeypatch.setattr(input_cost.time, "thread_time", lambda: next(processors))
    dataset = dataset_of(coco, augment=AugmentSettings(mosaic=1.0))
    batch = collate_samples([dataset[0, 0], dataset[0, 1]])
    # 0.5 + 0.25 s by the clock, 0.125 + 0.0625 s of the processor; four files each are one image.
    assert batch.cost == InputCost(num_images=2, wall_s=0.75, cpu_s=0.1875, num_processes=0)
    assert batch.split(2)[0].cost == InputCost()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"image 102 \(s3://bucket/train/2\.png\): .*0 bytes"),
        (b"<html>404</html>", r"image 102 \(s3://bucket/train/2\.png\): .*b'<html>404"),
        (encode(2, "PNG")[:120], r"image 102 \(s3://bucket/train/2\.png\)"),
        (
            encode(1, "PNG"),
            r"image 102 \(s3://bucket/train/2\.png\): the file is 150x100 \(height x width, "
            r"upright\), the annotations say 90x90; run `retinaray doctor --fix`",
        ),
    ],
    ids=["empty", "no image", "cut short", "another size"],
)
def test_dataset_refuses_an_image_by_file_and_id(
    coco: CocoDataset, content: bytes, message: str
) -> None:
    dataset = dataset_of(coco, read=lambda _: content)
    with pytest.raises(DatasetError, match=message):
        dataset[0, 2]


def test_dataset_refuses_by_file_and_id_when_a_file_is_missing(
    coco: CocoDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(FILES, f"{ROOT}/0.png")
    with pytest.raises(
        DatasetError,
        match=r"image 100 \(s3://bucket/train/0\.png\): no file at s3://bucket/train/0",
    ):
        dataset_of(coco)[0, 0]


def test_dataset_refuses_by_file_and_id_when_its_storage_does_not_answer(
    coco: CocoDataset,
) -> None:
    def read(uri: str) -> bytes:
        raise StorageError(f"{uri}: 503 Slow Down")

    # Not a fault of the set: a run may try again.
    with pytest.raises(StorageError, match=r"image 100 \(s3://bucket/train/0\.png\): .*503"):
        dataset_of(coco, read=read)[0, 0]
