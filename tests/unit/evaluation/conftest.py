from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from retinaray.data.coco import Category, CategoryTable, load_coco
from retinaray.data.transforms import Placement, fit_size
from retinaray.detector.postprocess import Detections
from retinaray.evaluation.candidates import CandidateSet, join_detections
from retinaray.evaluation.confusion import OverlapTable, tabulate_overlaps

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


@pytest.fixture(scope="session")
def make_table() -> Callable[..., OverlapTable]:
    """A table of images 100 wide and 200 high, called 0.jpg, 1.jpg, ...

    make_table(truths, found): a truth is image, class, x, y, width, height and maybe 1 for a crowd;
    what is found is image, class, score, x, y, width, height. Class k has category id 10 + k.
    """

    def make(
        truths: Sequence[Sequence[float]],
        found: Sequence[Sequence[float]],
        *,
        num_classes: int = 2,
        num_images: int = 1,
        **settings: Any,
    ) -> OverlapTable:
        content = {
            "images": [
                {"id": number, "file_name": f"{number}.jpg", "height": 200, "width": 100}
                for number in range(num_images)
            ],
            "categories": [{"id": 10 + k, "name": f"class {k}"} for k in range(num_classes)],
            "annotations": [
                {
                    "id": number,
                    "image_id": row[0],
                    "category_id": 10 + row[1],
                    "bbox": list(row[2:6]),
                    "area": row[4] * row[5],
                    "iscrowd": int(len(row) > 6),
                }
                for number, row in enumerate(truths, start=1)
            ],
        }
        results = [
            {"image_id": row[0], "category_id": 10 + row[1], "score": row[2], "bbox": row[3:]}
            for row in found
        ]
        dataset = load_coco(json.dumps(content).encode(), source="truth.json")
        return tabulate_overlaps(results, dataset, **settings)

    return make


@pytest.fixture(scope="session")
def draw_results() -> Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Random COCO truth and results near it, shuffled: draw_results(seed, crowd_share=0.15).

    Corners lie on a grid of 4 pixels, and scores have few digits, so that both tie; unless
    `is_tied` is False.
    """

    def draw(
        seed: int, *, crowd_share: float = 0.15, is_tied: bool = True, num_images: int = 12
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        rng = np.random.default_rng(seed)
        annotations: list[dict[str, Any]] = []
        results: list[dict[str, Any]] = []
        for image in range(num_images):
            truth = draw_boxes(rng, int(rng.integers(0, 12)))
            labels = rng.integers(0, 3, len(truth))
            # Three results near each box and some anywhere; every fifth has another class.
            near = np.repeat(truth, 3, axis=0)
            moved = near + 4 * rng.integers(-1, 2, near.shape) if is_tied else near
            boxes = np.concatenate([moved, draw_boxes(rng, 12)])
            if not is_tied:
                boxes = boxes + rng.normal(0, 3, boxes.shape)
            guesses = np.append(np.repeat(labels, 3), rng.integers(0, 3, 12))
            guesses = np.where(rng.random(len(guesses)) < 0.2, (guesses + 1) % 3, guesses)
            scores = rng.uniform(0.01, 1, len(boxes)).round(2 if is_tied else 12)
            for box, label in zip(truth.tolist(), labels.tolist(), strict=True):
                x1, y1, x2, y2 = box
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": label,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": int(rng.random() < crowd_share),
                    }
                )
            for box, label, score in zip(
                boxes.tolist(), guesses.tolist(), scores.tolist(), strict=True
            ):
                x1, y1, x2, y2 = box
                if x2 > x1 and y2 > y1:
                    found = {"image_id": image, "category_id": label, "score": score}
                    results.append({**found, "bbox": [x1, y1, x2 - x1, y2 - y1]})
        rng.shuffle(results)
        content = {
            "images": [
                {"id": image, "file_name": f"{image}.jpg", "height": 200, "width": 200}
                for image in range(num_images)
            ],
            "categories": [{"id": k, "name": f"class {k}"} for k in range(3)],
            "annotations": annotations,
        }
        return content, results

    return draw
