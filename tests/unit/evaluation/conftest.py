from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from retinaray.data.coco import Category, CategoryTable
from retinaray.data.transforms import Placement, fit_size
from retinaray.detector.postprocess import Detections
from retinaray.evaluation.candidates import CandidateSet, join_detections

CANVAS = (96, 128)
SIZES = ((192, 256), (100, 300), (300, 90), (96, 128))


def draw_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Boxes xyxy on the canvas; with corners on a grid of 4 pixels, so that overlaps tie."""
    corner = rng.integers(0, 20, (count, 2)) * 4.0
    return np.concatenate([corner, corner + rng.integers(2, 12, (count, 2)) * 4.0], axis=1)


@pytest.fixture(scope="session")
def three_classes() -> CategoryTable:
    return CategoryTable((Category(7, "cell"), Category("b", "nut"), Category(3, "bolt")))


@pytest.fixture(scope="session")
def draw_scene(three_classes: CategoryTable) -> Callable[..., tuple[dict[str, Any], CandidateSet]]:
    """Random COCO truth and candidates near it: draw_scene(seed, num_images=6, per_image=40)."""

    def draw(
        seed: int, *, num_images: int = 6, per_image: int = 40, score_digits: int = 2
    ) -> tuple[dict[str, Any], CandidateSet]:
        rng = np.random.default_rng(seed)
        annotations: list[dict[str, Any]] = []
        items = []
        ids: list[int | str] = [f"img {i}" if i % 2 else 1000 - i for i in range(num_images)]
        for number, identity in enumerate(ids):
            height, width = SIZES[number % len(SIZES)]
            placement = Placement(height, width, *fit_size(height, width, *CANVAS))
            # The last image is empty; the third class is not in the ground truth.
            truth = draw_boxes(rng, 0 if number == num_images - 1 else 7)
            truth_labels = rng.integers(0, 2, len(truth))
            for box, label in zip(placement.to_original(truth).tolist(), truth_labels, strict=True):
                x1, y1, x2, y2 = box
                if x2 <= x1 or y2 <= y1:
                    continue  # in the padding
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": identity,
                        "category_id": three_classes.ids[label],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "iscrowd": int(rng.random() < 0.15),
                    }
                )
            # Three candidates near each box, mostly good ones.
            near = np.repeat(truth, 3, axis=0) + rng.normal(0, 1.5, (3 * len(truth), 4))
            boxes = np.concatenate([near, draw_boxes(rng, per_image)]).clip(0, 128)
            labels = rng.integers(0, 3, len(boxes))
            labels[: len(near)] = np.repeat(truth_labels, 3)
            # Few digits make many equal scores.
            lowest = np.where(np.arange(len(boxes)) < len(near), 0.4, 0.011)
            scores = rng.uniform(lowest, 1).round(score_digits).clip(0.02, 0.999)
            has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
            boxes, labels, scores = boxes[has_area], labels[has_area], scores[has_area]
            order = np.argsort(-scores, kind="stable")
            found = Detections(
                torch.tensor(boxes[order], dtype=torch.float32),
                torch.tensor(scores[order], dtype=torch.float32),
                torch.tensor(labels[order]),
            )
            items.append((identity, placement, found))
        content = {
            "images": [{"id": identity} for identity in ids],
            "annotations": annotations,
            # Not in the order of the table.
            "categories": [
                {"id": entry.id, "name": entry.name} for entry in reversed(three_classes.categories)
            ],
        }
        return content, join_detections(items, floor=0.01)

    return draw
