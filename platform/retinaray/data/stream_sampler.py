"""Which images a training step takes, in which order, on which worker.

The order is one endless stream of images, a fresh permutation after another, cut into global
batches and those into equal slices for the workers. Which image stands where depends on the seed
and the place in the stream alone: not on the number of workers, and not on where a training was
resumed. Where landscape and portrait images have a canvas each, each has a stream of its own, and a
step takes its batch from one of the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Int
from torch.utils.data import Sampler

from retinaray.data.coco import CocoDataset

StreamIndex = tuple[int, int]
"""Epoch, and position of the image in the data set."""


class StreamSampler(Sampler[list[StreamIndex]]):
    """The slice of each global batch that belongs to one worker.

    Args:
        num_images: Images in the data set, >= 1.
        batch: Global batch, a multiple of `world_size`.
        rank: This worker, in [0, world_size).
        world_size: Number of workers.
        seed: Seed of the order.
        first_step: Step to begin with, for a resumed training.
        last_step: Step to end before.
        portraits: Positions of the images that must not share a batch with the others; none or
            all = one stream.

    Raises:
        ValueError: If there are no images, or the batch does not divide.
    """

    def __init__(
        self,
        *,
        num_images: int,
        batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        first_step: int = 0,
        last_step: int,
        portraits: Sequence[int] = (),
    ) -> None:
        if num_images < 1:
            raise ValueError("num_images=0: a training needs at least one image")
        if batch % world_size:
            raise ValueError(f"batch={batch} does not divide among world_size={world_size} workers")
        self._num_images = num_images
        self._batch = batch
        self._share = batch // world_size
        self._rank = rank
        self._seed = seed
        self._steps = range(first_step, last_step)
        has_both = 0 < len(portraits) < num_images
        self._portraits = np.array(portraits if has_both else (), dtype=np.int64)
        self._others = np.setdiff1d(np.arange(num_images), self._portraits)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[StreamIndex]]:
        for step in self._steps:
            before = self._count_portrait_steps(step)
            is_portrait = self._count_portrait_steps(step + 1) > before
            turn = before if is_portrait else step - before
            first = turn * self._batch + self._rank * self._share
            yield [self._locate(place, is_portrait) for place in range(first, first + self._share)]

    def _count_portrait_steps(self, step: int) -> int:
        """Steps with portrait images among the first ones: their share of the images, rounded.

        So both streams are in the same epoch, but for half a batch, and a resumed training needs no
        more than its step.
        """
        return (2 * step * len(self._portraits) + self._num_images) // (2 * self._num_images)

    def _locate(self, place: int, is_portrait: bool) -> StreamIndex:
        images = self._portraits if is_portrait else self._others
        epoch, index = divmod(place, len(images))
        # Portraits have seeds of their own; without them the order is that of a single stream.
        seeds = (self._seed, epoch, 1) if is_portrait else (self._seed, epoch)
        return epoch, int(images[_permute(len(images), seeds)[index]])


def find_portraits(dataset: CocoDataset) -> list[int]:
    """Positions of the images that are higher than wide."""
    return [i for i, record in enumerate(dataset.images) if record.height > record.width]


# A batch touches two epochs at most, unless it is larger than the data set, of either stream.
@lru_cache(maxsize=4)
def _permute(num_images: int, seeds: tuple[int, ...]) -> Int[np.ndarray, " images"]:
    return np.random.default_rng(seeds).permutation(num_images)
