"""Boxes made by hand: overlaps follow from heights, 10 x 8 on 10 x 10 is 0.8."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from retinaray.data.coco import CocoDataset, load_coco
from retinaray.evaluation import confusion
from retinaray.evaluation.confusion import (
    OverlapTable,
    count_confusions,
    match_classes,
    tabulate_overlaps,
)
from retinaray.evaluation.detection_matches import index_ground_truth, match_results

MakeTable = Callable[..., OverlapTable]
DrawResults = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]

A = (0, 0, 0, 0, 10, 10)  # image 0, class 0
B = (0, 1, 50, 50, 10, 10)  # image 0, class 1


def load(content: dict[str, Any]) -> CocoDataset:
    return load_coco(json.dumps(content).encode(), source="truth.json")


def test_tabulate_overlaps_orders_by_image_and_score_and_keeps_near_pairs(
    make_table: MakeTable,
) -> None:
    table = make_table(
        [A, (0, 1, 0, 5, 10, 10), (1, 0, 0, 0, 10, 10)],
        [
            (1, 0, 0.5, 0, 0, 10, 8),  # image 1: 80 / 100
            (0, 0, 0.2, 0, 0, 10, 1),  # on A 10 / 100, on the next 0
            (0, 1, 0.9, 0, 0, 10, 10),  # on A 1, on the next 50 / 150
            (0, 1, 0.2, 0, 0, 10, 0.9),  # on A 0.09: below the lowest
        ],
        num_images=2,
    )
    assert table.positions.tolist() == [0, 0, 0, 1]
    assert table.scores.tolist() == [0.9, 0.2, 0.2, 0.5]
    assert table.class_indices.tolist() == [1, 0, 1, 0]
    pairs = zip(table.pair_detections.tolist(), table.pair_truths.tolist(), strict=True)
    assert list(pairs) == [(0, 0), (0, 1), (1, 0), (3, 2)]
    assert table.pair_ious == pytest.approx([1, 1 / 3, 0.1, 0.8])
    assert table.is_same_class.tolist() == [False, True, True, True]


def test_tabulate_overlaps_keeps_the_best_of_each_image_when_there_are_too_many(
    make_table: MakeTable,
) -> None:
    found = [(i, 0, score, 0, 0, 5, 5) for i in (1, 0) for score in (0.1, 0.3, 0.2)]
    table = make_table([], found, num_images=2, max_detections=2)
    assert table.positions.tolist() == [0, 0, 1, 1]
    assert table.scores.tolist() == [0.3, 0.2, 0.3, 0.2]
    assert len(make_table([], found, num_images=2, max_detections=None)) == 6


def test_tabulate_overlaps_gives_the_same_when_the_chunks_are_small(
    draw_results: DrawResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, results = draw_results(3)
    whole = tabulate_overlaps(results, load(content))
    monkeypatch.setattr(confusion, "_CHUNK_PAIRS", 7)
    parts = tabulate_overlaps(results, load(content))
    assert len(whole.pair_ious) > 100
    for name in ("pair_detections", "pair_truths", "pair_ious"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 99}, r"detection 2 has image_id=99, which truth\.json does not have"),
        ({"category_id": "x"}, r"detection 2 has category_id='x', which truth\.json"),
        ({"score": float("nan")}, r"detection 2: expected a finite score and box, got .*nan"),
        ({"bbox": [0, 0, float("inf"), 1]}, r"detection 2: expected a finite .*inf"),
    ],
    ids=["image", "category", "score", "box"],
)
def test_tabulate_overlaps_refuses_what_does_not_belong(
    draw_results: DrawResults, change: dict[str, Any], message: str
) -> None:
    content, results = draw_results(0)
    with pytest.raises(ValueError, match=message):
        tabulate_overlaps([results[0], {**results[1], **change}], load(content))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("iou", [0.5, 0.75])
def test_match_classes_agrees_with_the_matching_of_the_evaluation(
    draw_results: DrawResults, seed: int, iou: float
) -> None:
    content, results = draw_results(seed)
    table = tabulate_overlaps(results, load(content), max_detections=None)
    matches = match_classes(table, iou=iou)
    expected = match_results(results, index_ground_truth(content), ious=np.array([iou]))
    # The evaluation orders by class, score and image.
    order = np.lexsort((-table.scores, table.class_indices))
    assert np.array_equal(table.scores[order], expected.scores)
    assert np.array_equal((matches.truth_rows >= 0)[order], expected.is_hit[0])
    assert np.array_equal(matches.is_ignored[order], expected.is_ignored[0])
    assert np.count_nonzero(matches.is_found) == np.count_nonzero(matches.is_hit) > 10


def test_match_classes_takes_the_last_when_overlaps_are_equal(make_table: MakeTable) -> None:
    matches = match_classes(make_table([A, A], [(0, 0, 0.9, 0, 0, 10, 10)]))
    assert matches.truth_rows.tolist() == [1]
    assert matches.is_found.tolist() == [False, True]


def test_match_classes_ignores_areas_beyond_the_largest_of_coco(make_table: MakeTable) -> None:
    huge = (0, 0, 0, 0, 2e5, 1e5)
    table = make_table([huge], [(0, 0, 0.9, 0, 0, 100, 200), (0, 0, 0.8, *huge[2:])])
    matches = match_classes(table)
    # The truth is cut to its image, but its area is what the annotation says.
    assert matches.truth_rows.tolist() == [0, -1]
    assert matches.is_ignored.tolist() == [True, True]
    assert matches.is_found.tolist() == [False]


def test_match_classes_refuses_an_overlap_that_was_not_kept(make_table: MakeTable) -> None:
    with pytest.raises(ValueError, match=r"at least 0\.1, got 0\.05"):
        match_classes(make_table([A], []), iou=0.05)


def test_count_confusions_fills_every_kind_of_cell(make_table: MakeTable) -> None:
    found = [
        (0, 0, 0.9, 0, 0, 10, 8),  # A as it is: [0, 0]
        (0, 0, 0.8, 0, 0, 10, 9),  # A again: taken, so background as class 0: [2, 0]
        (0, 0, 0.7, 50, 50, 10, 8),  # B as class 0: [1, 0]
        (0, 1, 0.6, 50, 50, 10, 9),  # B is taken: [2, 1]
        (0, 1, 0.5, 80, 0, 10, 10),  # nothing there: [2, 1]
        (0, 1, 0.3, 0, 100, 10, 10),  # not above the threshold
    ]
    lost = (0, 1, 0, 100, 10, 10)  # [1, 2]
    matrix = count_confusions(make_table([A, B, lost], found), score_thresholds=0.3)
    assert matrix.counts.tolist() == [[1, 0, 0], [1, 0, 1], [1, 2, 0]]
    assert matrix.num_ignored == 0
    assert matrix.to_dict() == {
        "counts": [[1, 0, 0], [1, 0, 1], [1, 2, 0]],
        "category_ids": [10, 11],
        "names": ["class 0", "class 1"],
        "score_thresholds": [0.3, 0.3],
        "iou": 0.5,
        "num_ignored": 0,
    }


def test_count_confusions_uses_the_threshold_of_each_class(make_table: MakeTable) -> None:
    table = make_table([A, B], [(0, 0, 0.4, 0, 0, 10, 10), (0, 1, 0.4, 50, 50, 10, 10)])
    matrix = count_confusions(table, score_thresholds=[0.3, 0.4])
    assert matrix.counts.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    with pytest.raises(ValueError, match="3 score thresholds for 2 classes"):
        count_confusions(table, score_thresholds=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"at least 0\.1, got 0\.01"):
        count_confusions(table, iou=0.01)


def test_count_confusions_prefers_the_own_class_when_another_overlaps_more(
    make_table: MakeTable,
) -> None:
    # 10 x 9: 0.9 on A, 90 / 150 on the same place of class 1.
    table = make_table([A, (0, 1, 0, 0, 10, 15)], [(0, 1, 0.9, 0, 0, 10, 9)])
    assert count_confusions(table).counts.tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 0]]


def test_count_confusions_leaves_out_crowds_and_what_lies_in_them(make_table: MakeTable) -> None:
    crowd = (0, 0, 0, 0, 90, 90, 1)
    found = [
        (0, 0, 0.9, 60, 60, 10, 10),  # in the crowd of its class: not counted
        (0, 0, 0.8, 65, 60, 10, 10),  # and as often as you like
        (0, 1, 0.7, 20, 20, 10, 10),  # in a crowd of another class: background
        (0, 1, 0.6, 50, 50, 10, 10),  # a hit of B, though in the crowd
        (0, 0, 0.5, 50, 50, 10, 8),  # would be B, which is taken, and lies in the crowd
    ]
    matrix = count_confusions(make_table([crowd, B], found))
    assert matrix.counts.tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 0]]
    assert matrix.num_ignored == 3


def count_slowly(table: OverlapTable, threshold: float) -> np.ndarray:
    """The definition, box by box, with overlaps of its own."""
    data, counts = table.dataset, np.zeros((4, 4), dtype=int)
    free = {row for row in range(len(data.area)) if not data.is_crowd[row]}
    image_of = np.repeat(np.arange(len(data)), np.diff(data.offsets))

    def overlap(row: int, truth: int) -> float:
        x, y, w, h = table.boxes_xywh[row]
        x1, y1, x2, y2 = data.boxes_xyxy[truth].astype(float)
        shared = max(min(x + w, x2) - max(x, x1), 0) * max(min(y + h, y2) - max(y, y1), 0)
        union = w * h if data.is_crowd[truth] else w * h + (x2 - x1) * (y2 - y1) - shared
        return shared / union if image_of[truth] == table.positions[row] else 0.0

    for row in range(len(table)):
        label = table.class_indices[row]
        if table.scores[row] <= threshold:
            continue
        near = [truth for truth in sorted(free) if overlap(row, truth) >= 0.5]
        if near:
            same = [truth for truth in near if data.class_indices[truth] == label]
            taken = max(same or near, key=lambda truth: overlap(row, truth))
            free.remove(taken)
            counts[data.class_indices[taken], label] += 1
        elif not any(
            data.is_crowd[truth]
            and data.class_indices[truth] == label
            and overlap(row, truth) >= 0.5
            for truth in range(len(data.area))
        ):
            counts[3, label] += 1
    for truth in free:
        counts[data.class_indices[truth], 3] += 1
    return counts


@pytest.mark.parametrize("seed", range(3))
def test_count_confusions_agrees_with_a_slow_count(draw_results: DrawResults, seed: int) -> None:
    content, results = draw_results(seed, num_images=5)
    table = tabulate_overlaps(results, load(content))
    matrix = count_confusions(table, score_thresholds=0.2)
    assert matrix.counts.tolist() == count_slowly(table, 0.2).tolist()
    present = table.dataset.class_indices[~table.dataset.is_crowd]
    assert matrix.counts[:3].sum(axis=1).tolist() == np.bincount(present).tolist()
    assert matrix.counts.sum() - matrix.counts[:, 3].sum() + matrix.num_ignored == (
        np.count_nonzero(table.scores > 0.2)
    )


def test_count_confusions_gives_zeros_when_there_is_nothing(make_table: MakeTable) -> None:
    assert count_confusions(make_table([], [])).counts.tolist() == [[0] * 3] * 3
    assert count_confusions(make_table([A], [])).counts.tolist() == [[0, 0, 1], [0] * 3, [0] * 3]
