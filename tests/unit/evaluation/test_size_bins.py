from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from retinaray.data.coco import load_coco
from retinaray.evaluation.confusion import OverlapTable, tabulate_overlaps
from retinaray.evaluation.size_bins import SizeBin, measure_by_size

MakeTable = Callable[..., OverlapTable]
DrawResults = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]

SMALL = (0, 0, 0, 0, 4, 4)
SMALL_MISSED = (0, 0, 50, 0, 4, 4)
LARGE = (0, 1, 0, 100, 50, 50)
CROWD = (0, 0, 60, 60, 20, 20, 1)


def test_measure_by_size_scores_each_size_for_itself(make_table: MakeTable) -> None:
    found = [
        (0, 0, 0.9, 70, 0, 10, 10),  # false, but of another size than the small ones
        (0, 0, 0.25, 0, 0, 4, 4),  # SMALL, below the threshold
        (0, 1, 0.8, 0, 100, 50, 50),  # LARGE
        (0, 1, 0.7, 0, 20, 40, 40),  # false
    ]
    table = make_table([SMALL, SMALL_MISSED, LARGE, CROWD], found)
    report = measure_by_size(table, edges_px=(0, 8, 32), score_thresholds=[0.3, 0.4])
    assert report.score_thresholds == (0.3, 0.4)
    assert report.bins == (
        # Precision 1 up to recall 0.5.
        SizeBin(0, 8, 2, 1, 0, 0.5, 0, pytest.approx(51 / 101)),
        SizeBin(8, 32, 0, 0, 0, None, None, None),
        SizeBin(32, None, 1, 1, 1, 1, 1, 1),
    )


def test_measure_by_size_puts_edges_into_the_upper_bin(make_table: MakeTable) -> None:
    table = make_table([(0, 0, 0, 0, 8, 8), (0, 0, 50, 0, 7.9, 8)], [])
    report = measure_by_size(table, edges_px=(2, 8))
    assert [entry.num_ground_truth for entry in report.bins] == [1, 1]
    # Below the first edge is no bin.
    assert measure_by_size(table, edges_px=(8,)).bins[0].num_ground_truth == 1


@pytest.mark.parametrize("edges", [(), (-1, 8), (0, 8, 8), (8, 0)])
def test_measure_by_size_refuses_edges_that_do_not_rise(
    make_table: MakeTable, edges: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match="expected rising sizes from 0 px, got"):
        measure_by_size(make_table([SMALL], []), edges_px=edges)


def evaluate_ranges(
    content: dict[str, Any], results: list[dict[str, Any]], ranges: list[list[float]]
) -> tuple[np.ndarray, np.ndarray]:
    """Precision [R, K, A] and recall [K, A] at overlap 0.5 by pycocotools, -1 without truth."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = COCO(), COCO()
    truth.dataset = content
    rows = [
        {**row, "id": number, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
        for number, row in enumerate(results, start=1)
    ]
    found.dataset = {**content, "annotations": rows}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.createIndex()
        evaluator = COCOeval(truth, found, "bbox")
        evaluator.params.iouThrs = np.array([0.5])
        evaluator.params.areaRng = ranges
        evaluator.params.areaRngLbl = [str(row) for row in ranges]
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator.eval["precision"][0, ..., -1], evaluator.eval["recall"][0, ..., -1]


@pytest.mark.parametrize("seed", range(3))
def test_measure_by_size_agrees_with_pycocotools(draw_results: DrawResults, seed: int) -> None:
    content, results = draw_results(seed)
    table = tabulate_overlaps(results, load_coco(json.dumps(content).encode()))
    # No area is on an edge: pycocotools includes both ends.
    edges = (0, 17.3, 25.1)
    report = measure_by_size(table, edges_px=edges)
    ranges = [[0, 17.3**2], [17.3**2, 25.1**2], [25.1**2, 1e10]]
    precision, recall = evaluate_ranges(content, results, ranges)
    for number, entry in enumerate(report.bins):
        known = precision[:, :, number]
        assert entry.ap50 == pytest.approx(known[known > -1].mean(), abs=1e-12)
    for label in range(3):
        only = [row for row in content["annotations"] if row["category_id"] == label]
        table = tabulate_overlaps(
            results, load_coco(json.dumps({**content, "annotations": only}).encode())
        )
        shares = [entry.recall for entry in measure_by_size(table, edges_px=edges).bins]
        assert shares == pytest.approx(recall[label].tolist(), abs=1e-12)


def test_to_dict_is_plain_json(make_table: MakeTable) -> None:
    plain = json.loads(json.dumps(measure_by_size(make_table([SMALL], [])).to_dict()))
    assert plain["bins"][0]["num_ground_truth"] == 1
    assert plain["bins"][-1]["highest_px"] is None
    assert plain["iou"] == 0.5
