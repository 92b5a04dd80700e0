from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from retinaray.data.coco import Category, CategoryTable, CocoDataset, ImageRecord


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., CocoDataset]:
    """Data sets from box lists, one per image of 640x640 unless sizes says otherwise."""

    def make(
        boxes_of_image: Sequence[Sequence[Sequence[float]]],
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        classes: Sequence[int] | None = None,
        crowds: Sequence[bool] | None = None,
        names: Sequence[str] = ("car", "bus", "cyclist"),
    ) -> CocoDataset:
        rows = [box for boxes in boxes_of_image for box in boxes]
        corners = np.array(rows, np.float32).reshape(-1, 4)
        count = len(corners)
        image_sizes = sizes or [(640, 640)] * len(boxes_of_image)
        return CocoDataset(
            images=tuple(
                ImageRecord(index, f"{index}.jpg", *size) for index, size in enumerate(image_sizes)
            ),
            categories=CategoryTable(
                tuple(Category(index + 1, name) for index, name in enumerate(names))
            ),
            boxes_xyxy=corners,
            class_indices=np.array(classes if classes is not None else [0] * count, np.int64),
            is_crowd=np.array(crowds if crowds is not None else [False] * count, np.bool_),
            area=(corners[:, 2:] - corners[:, :2]).prod(axis=1),
            offsets=np.append(0, np.cumsum([len(boxes) for boxes in boxes_of_image])).astype("i8"),
            num_dropped_boxes={},
            source="made.json",
        )

    return make


@pytest.fixture(scope="session")
def make_random_boxes() -> Callable[..., np.ndarray]:
    """Random boxes of a seed: sides from 1 to 400 pixels, evenly in their logarithm."""

    def make(seed: int, count: int, height: int, width: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        low = rng.uniform(0, 1, (count, 2)) * [width - 2, height - 2]
        high = np.minimum(low + np.exp(rng.uniform(0, 6, (count, 2))), [width, height])
        return np.concatenate([low, high], axis=1).astype(np.float32)

    return make
