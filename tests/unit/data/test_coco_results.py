"""COCO results from detections: the rounding, against Python's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retinaray.data.coco import Category, CategoryTable
from retinaray.data.coco_results import coco_results, round_boxes, round_scores
from retinaray.data.transforms import Placement
from retinaray.detector.postprocess import Detections

TABLE = CategoryTable((Category(7, "a"), Category("x", "b")))


def test_coco_results_gives_ids_original_pixels_and_rounded_scores() -> None:
    # 200x100 (height x width) fills 64 rows and 32 columns: factor 3.125 both ways.
    placement = Placement(200, 100, 64, 32)
    found = Detections(
        boxes_xyxy=torch.tensor([[1.0, 2.0, 11.0, 22.0], [33.0, 0.0, 60.0, 20.0], [8, 8, 16, 64]]),
        scores=torch.tensor([0.87654321, 0.7, 0.5]),
        labels=torch.tensor([1, 0, 0]),
    )
    # The second box lies in the padding.
    assert list(coco_results(found, placement, TABLE)) == [
        {"category_id": "x", "bbox": [3.12, 6.25, 31.26, 62.5], "score": 0.876543},
        {"category_id": 7, "bbox": [25.0, 25.0, 25.0, 175.0], "score": 0.5},
    ]


def test_coco_results_is_empty_when_nothing_was_found() -> None:
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert list(coco_results(nothing, Placement(9, 9, 9, 9), TABLE)) == []


def test_coco_results_refuses_columns_of_different_lengths() -> None:
    uneven = Detections(torch.ones(2, 4), torch.zeros(1), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="zip"):
        list(coco_results(uneven, Placement(9, 9, 9, 9), TABLE))


def test_round_boxes_equals_pythons_rounding() -> None:
    rng = np.random.default_rng(0)
    boxes = np.sort(rng.uniform(0, 512, (20_000, 2, 2)), axis=1).reshape(-1, 4).astype(np.float32)
    placement = Placement(1234, 987, 512, 409)
    bbox_xywh, is_inside = round_boxes(boxes, placement)
    corners = placement.to_original(boxes).astype(np.float64).round(2).tolist()
    expected = [[x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)] for x1, y1, x2, y2 in corners]
    assert bbox_xywh.tolist() == expected
    assert is_inside.tolist() == [x2 > x1 and y2 > y1 for x1, y1, x2, y2 in corners]
    assert 0 < is_inside.sum() < len(boxes)


def test_round_scores_equals_pythons_rounding() -> None:
    rng = np.random.default_rng(0)
    halves = (np.arange(1, 1_000_000, 7) + 0.5) / 1e6
    scores = np.concatenate([rng.random(50_000), halves]).astype(np.float32)
    assert round_scores(scores).tolist() == [round(score, 6) for score in scores.tolist()]
