"""The sweep against settings applied and scored one by one, and which row is best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from retinaray.data.coco import CategoryTable
from retinaray.evaluation.candidates import CandidateSet, DetectionSetting, apply_setting
from retinaray.evaluation.coco_map import evaluate_detections
from retinaray.evaluation.threshold_sweep import (
    SweepGrid,
    SweepRow,
    SweepTable,
    default_grid,
    sweep_thresholds,
)

Scene = tuple[dict[str, Any], CandidateSet]
ROW = SweepRow("class", 0.5, 100, 0.05, 0.4, 0.6, 0.5, 10)


def test_sweep_thresholds_equals_settings_scored_one_by_one(
    draw_scene: Callable[..., Scene], three_classes: CategoryTable
) -> None:
    truth, candidates = draw_scene(0, num_images=4)
    grid = SweepGrid(
        nms=(("class", 0.3), ("agnostic", 0.6), ("none", 0.5)),
        max_detections=(4, 100),
        score_thresholds=(0.01, 0.3, 0.8),
    )
    table = sweep_thresholds(candidates, truth, three_classes, grid)
    assert len(table.rows) == len(grid) == 18
    for row in table.rows:
        setting = DetectionSetting(
            (row.score_threshold,) * 3, row.nms_iou, row.nms_kind, row.max_detections
        )
        results = apply_setting(candidates, setting, three_classes)
        scores = evaluate_detections(truth, results).summary
        expected = [scores[name] for name in ("AP", "AP50", "AP75")]
        found = [row.AP, row.AP50, row.AP75]
        assert found == pytest.approx(expected, abs=1e-12)
        assert row.num_detections == len(results)
    assert len({row.AP for row in table.rows}) > 5
    best = table.best_row.AP
    assert best == max(row.AP for row in table.rows if row.AP is not None)


def test_sweep_thresholds_tries_hundreds_of_settings_by_default(
    draw_scene: Callable[..., Scene], three_classes: CategoryTable
) -> None:
    truth, candidates = draw_scene(1, num_images=2)
    table = sweep_thresholds(candidates, truth, three_classes)
    assert len(table.rows) == len(default_grid(3)) > 300
    assert len(set(table.rows)) == len(table.rows)
    columns = {tuple(row) for row in table.to_dicts()}
    assert columns == {tuple(SweepRow.__dataclass_fields__)}


def test_default_grid_starts_at_the_floor_and_leaves_agnostic_out_for_one_class() -> None:
    grid = default_grid(1, floor=0.03)
    assert grid.score_thresholds[:2] == (0.03, 0.05)
    assert {kind for kind, _ in grid.nms} == {"class"}
    assert {kind for kind, _ in default_grid(2).nms} == {"class", "agnostic"}
    assert {kind for kind, _ in default_grid(2, nms_kind="class").nms} == {"class"}
    assert default_grid(2, nms_kind="none").nms == (("none", 0.5),)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"AP": 0.41, "score_threshold": 0.01}, {}),
        ({"score_threshold": 0.1}, {"num_detections": 1}),
        ({"num_detections": 9}, {"nms_iou": 0.45}),
        ({"nms_kind": "class", "nms_iou": 0.3}, {"nms_kind": "agnostic"}),
        ({"nms_kind": "agnostic", "nms_iou": 0.3}, {"nms_kind": "none"}),
        ({"nms_iou": 0.45}, {"nms_iou": 0.6}),
        ({"max_detections": 30}, {}),
        # What only the order of a sum makes different is equal.
        ({"score_threshold": 0.1}, {"AP": 0.4 + 1e-13}),
        ({"AP": 0.0}, {"AP": None, "score_threshold": 0.01}),
    ],
)
def test_best_row_breaks_ties_in_the_order_that_its_text_says(
    better: dict[str, Any], worse: dict[str, Any]
) -> None:
    rows = replace(ROW, **worse), replace(ROW, **better)
    assert SweepTable(rows).best_row == SweepTable(rows[::-1]).best_row == rows[1]


def test_sweep_thresholds_refuses_what_cannot_be_swept(
    draw_scene: Callable[..., Scene], three_classes: CategoryTable
) -> None:
    truth, candidates = draw_scene(0)
    with pytest.raises(ValueError, match="at least one setting"):
        sweep_thresholds(candidates, truth, three_classes, SweepGrid((("class", 0.5),), (9,), ()))
    with pytest.raises(ValueError, match=r"below .*, the floor"):
        sweep_thresholds(
            candidates, truth, three_classes, SweepGrid((("class", 0.5),), (9,), (0.001,))
        )
