"""Training batches: images read, augmented and padded to fixed shapes.

How an image is augmented depends on the seed and its place in the stream alone: not on the number
of workers, and not on where a training was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from retinaray.data.augmentation import (
    AugmentSettings,
    Surroundings,
    apply_plan,
    draw_plan,
    move_boxes,
    needed_size,
)
from retinaray.data.coco import CocoDataset, ImageRecord, resolve_image_uri
from retinaray.data.decoded_cache import DecodedCache
from retinaray.data.image_decoding import DecodedImage, decode_image
from retinaray.data.input_cost import CostWatch, InputCost
from retinaray.data.stream_sampler import StreamIndex
from retinaray.errors import DatasetError, ImageError, StorageError, UnreadableFileError

_LEAST_BOXES = 8


@dataclass(frozen=True)
class Sample:
    """One training image on its canvas.

    Attributes:
        image: RGB 0..255.
        boxes_xyxy: In canvas pixels.
        class_indices: Class of each box.
        is_crowd: Which boxes are ignored regions.
        image_id: The image's id in the data set.
        cost: What it took to make the sample.
    """

    image: UInt8[np.ndarray, "H W 3"]
    boxes_xyxy: Float[np.ndarray, "M 4"]
    class_indices: Int[np.ndarray, " M"]
    is_crowd: Bool[np.ndarray, " M"]
    image_id: int | str
    cost: InputCost = field(default_factory=InputCost)


@dataclass(frozen=True)
class Batch:
    """Samples as tensors; ground truth is padded to the next power of two from 8 on.

    Attributes:
        images: RGB 0..255, uint8.
        boxes_xyxy: In canvas pixels; zeros where padded.
        class_indices: int64; zeros where padded.
        is_valid: False where padded.
        is_crowd: True for ignored regions.
        image_ids: For messages.
        cost: What it took to make the samples; nothing in a part of a batch.
    """

    images: UInt8[Tensor, "N 3 H W"]
    boxes_xyxy: Float[Tensor, "N M 4"]
    class_indices: Int[Tensor, "N M"]
    is_valid: Bool[Tensor, "N M"]
    is_crowd: Bool[Tensor, "N M"]
    image_ids: tuple[int | str, ...]
    cost: InputCost = field(default_factory=InputCost)

    def split(self, count: int) -> list[Batch]:
        """Parts of equal size, in order.

        Raises:
            ValueError: If the images do not divide.
        """
        if count == 1:
            return [self]
        size, rest = divmod(len(self.images), count)
        if rest or not size:
            raise ValueError(f"{len(self.images)} images do not divide into {count} equal parts")
        return [self._slice(slice(first, first + size)) for first in range(0, count * size, size)]

    def _slice(self, rows: slice) -> Batch:
        return Batch(
            images=self.images[rows],
            boxes_xyxy=self.boxes_xyxy[rows],
            class_indices=self.class_indices[rows],
            is_valid=self.is_valid[rows],
            is_crowd=self.is_crowd[rows],
            image_ids=self.image_ids[rows],
        )

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; copies from pinned memory do not block."""
        return Batch(
            images=self.images.to(device, non_blocking=True),
            boxes_xyxy=self.boxes_xyxy.to(device, non_blocking=True),
            class_indices=self.class_indices.to(device, non_blocking=True),
            is_valid=self.is_valid.to(device, non_blocking=True),
            is_crowd=self.is_crowd.to(device, non_blocking=True),
            image_ids=self.image_ids,
            cost=self.cost,
        )

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; called by the data loader."""
        return Batch(
            images=self.images.pin_memory(),
            boxes_xyxy=self.boxes_xyxy.pin_memory(),
            class_indices=self.class_indices.pin_memory(),
            is_valid=self.is_valid.pin_memory(),
            is_crowd=self.is_crowd.pin_memory(),
            image_ids=self.image_ids,
            cost=self.cost,
        )


class TrainingDataset(Dataset[Sample]):
    """Reads, augments and places training images.

    Args:
        dataset: Images and ground truth.
        images_root: Folder or S3 prefix of the files.
        read: Gives the bytes at a URI; raises StorageError.
        canvas: Network height and width.
        augment: Strengths of the random changes.
        seed: Seed of the random changes.
        max_pixels: Larger files are refused before they are decoded.
        allow_truncated: Accept files that end early.
        turns_for_portraits: Images that are higher than wide have the canvas turned by 90 degrees:
            its width as their height.
        fit: Height and width that images are fitted to where the canvas is a window onto them; none
            = the canvas.
        decoded: Decodes in the place of `read`, by the same `max_pixels` and `allow_truncated`;
            none = without a cache of pixels.
    """

    def __init__(  # noqa: PLR0913
        self,
        *,
        dataset: CocoDataset,
        images_root: str,
        read: Callable[[str], bytes],
        canvas: tuple[int, int],
        augment: AugmentSettings,
        seed: int,
        max_pixels: int,
        allow_truncated: bool,
        turns_for_portraits: bool = False,
        fit: tuple[int, int] | None = None,
        decoded: DecodedCache | None = None,
    ) -> None:
        self._dataset = dataset
        self._images_root = images_root
        self._read = read
        self._canvas = canvas
        self._augment = augment
        self._seed = seed
        self._max_pixels = max_pixels
        self._allow_truncated = allow_truncated
        self._turns_for_portraits = turns_for_portraits
        self._fit = fit
        self._decoded = decoded

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: StreamIndex) -> Sample:
        """One sample.

        Raises:
            DatasetError: If the image is absent, unreadable or cannot be decoded; the text names
                file and id.
            StorageError: If its storage does not answer; the text names both, too.
        """
        worker = get_worker_info()
        watch = CostWatch(0 if worker is None else worker.num_workers)
        sample = self._make_sample(*index)
        return replace(sample, cost=watch.stop())

    def _make_sample(self, epoch: int, position: int) -> Sample:
        rng = np.random.default_rng([self._seed, epoch, position])
        if rng.random() >= self._augment.mosaic:
            return self._load(position, rng, *self._choose_canvas(position))
        others = rng.integers(0, len(self._dataset), 3)
        return self._tile([position, *map(int, others)], rng)

    def _choose_canvas(self, position: int) -> tuple[int, int]:
        height, width = self._canvas
        record = self._dataset.images[position]
        is_turned = self._turns_for_portraits and record.height > record.width
        return (width, height) if is_turned else (height, width)

    def _load(self, position: int, rng: np.random.Generator, height: int, width: int) -> Sample:
        record = self._dataset.images[position]
        targets = self._dataset.targets(position)
        plan = draw_plan(
            rng,
            self._augment,
            height=record.height,
            width=record.width,
            boxes_xyxy=targets.boxes_xyxy,
            canvas_height=height,
            canvas_width=width,
            around=Surroundings(self._fit, targets.class_indices) if self._fit else None,
        )
        pixels = self._read_pixels(position, needed_size(plan, record.height, record.width))
        canvas = apply_plan(
            plan,
            pixels,
            height=record.height,
            width=record.width,
            canvas_height=height,
            canvas_width=width,
        )
        boxes, kept, is_stump = move_boxes(
            plan, targets.boxes_xyxy, canvas_height=height, canvas_width=width
        )
        return Sample(
            image=canvas,
            boxes_xyxy=boxes[kept],
            class_indices=targets.class_indices[kept],
            is_crowd=(targets.is_crowd | is_stump)[kept],
            image_id=record.image_id,
        )

    def _read_pixels(self, position: int, fit: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
        record = self._dataset.images[position]
        uri = resolve_image_uri(self._images_root, record.file_name)
        try:
            decoded = self._decode(uri, record, fit)
        except (ImageError, UnreadableFileError) as error:
            raise DatasetError(f"image {record.image_id!r} ({uri}): {error}") from error
        except StorageError as error:
            # It may be there again at the next try.
            raise StorageError(f"image {record.image_id!r} ({uri}): {error}") from error
        if (decoded.full_height, decoded.full_width) != (record.height, record.width):
            raise DatasetError(
                f"image {record.image_id!r} ({uri}): the file is "
                f"{decoded.full_height}x{decoded.full_width} (height x width, upright), "
                f"the annotations say {record.height}x{record.width}; "
                "run `retinaray doctor --fix` on the annotations"
            )
        return decoded.pixels

    def _decode(self, uri: str, record: ImageRecord, fit: tuple[int, int]) -> DecodedImage:
        fit_height, fit_width = fit
        if self._decoded is not None:
            return self._decoded.decode(
                uri,
                height=record.height,
                width=record.width,
                fit_height=fit_height,
                fit_width=fit_width,
            )
        return decode_image(
            self._read(uri),
            fit_height=fit_height,
            fit_width=fit_width,
            max_pixels=self._max_pixels,
            allow_truncated=self._allow_truncated,
        )

    def _tile(self, positions: Sequence[int], rng: np.random.Generator) -> Sample:
        """Four images around a random centre, on the canvas of the first."""
        height, width = self._choose_canvas(positions[0])
        centre_y = int(height * rng.uniform(0.35, 0.65))
        centre_x = int(width * rng.uniform(0.35, 0.65))
        canvas = np.zeros((height, width, 3), dtype=np.uint8)
        corners = [(0, 0), (0, centre_x), (centre_y, 0), (centre_y, centre_x)]
        samples = []
        for (top, left), position in zip(corners, positions, strict=True):
            part_height = height - top if top else centre_y
            part_width = width - left if left else centre_x
            sample = self._load(position, rng, part_height, part_width)
            canvas[top : top + part_height, left : left + part_width] = sample.image
            samples.append((sample, np.array([left, top, left, top], dtype=np.float32)))
        return Sample(
            image=canvas,
            boxes_xyxy=np.concatenate([s.boxes_xyxy + shift for s, shift in samples]),
            class_indices=np.concatenate([s.class_indices for s, _ in samples]),
            is_crowd=np.concatenate([s.is_crowd for s, _ in samples]),
            image_id=samples[0][0].image_id,
        )


def collate_samples(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one canvas size into a batch; at least one sample.

    A training meets a handful of shapes, whatever its images hold: what was chosen, compiled or
    captured for a shape of the step is used again.
    """
    most_boxes = max(len(sample.boxes_xyxy) for sample in samples)
    num_boxes = _LEAST_BOXES
    while num_boxes < most_boxes:
        num_boxes *= 2
    boxes = torch.zeros(len(samples), num_boxes, 4)
    class_indices = torch.zeros(len(samples), num_boxes, dtype=torch.int64)
    is_valid = torch.zeros(len(samples), num_boxes, dtype=torch.bool)
    is_crowd = torch.zeros(len(samples), num_boxes, dtype=torch.bool)
    for row, sample in enumerate(samples):
        count = len(sample.boxes_xyxy)
        boxes[row, :count] = torch.from_numpy(sample.boxes_xyxy)
        class_indices[row, :count] = torch.from_numpy(sample.class_indices)
        is_valid[row, :count] = True
        is_crowd[row, :count] = torch.from_numpy(sample.is_crowd)
    images = torch.from_numpy(np.stack([sample.image for sample in samples]))
    return Batch(
        # NHWC memory seen as NCHW is channels-last already: no copy.
        images=images.permute(0, 3, 1, 2),
        boxes_xyxy=boxes,
        class_indices=class_indices,
        is_valid=is_valid,
        is_crowd=is_crowd,
        image_ids=tuple(sample.image_id for sample in samples),
        cost=sum((sample.cost for sample in samples), InputCost()),
    )
