"""One box per object: overlaps by hand, who competes, ties, and a slow oracle."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from retinaray.detector.postprocess import Detections
from retinaray.inference.tile_merging import MergeKind, TileDetections, merge_tiles

# x1, y1, x2, y2, score, label.
Row = Sequence[float]


def part_of(*rows: Row, is_cut: Sequence[bool] | None = None) -> TileDetections:
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    found = Detections(table[:, :4], table[:, 4], table[:, 5].long())
    return TileDetections(found, np.array(is_cut or [False] * len(rows), dtype=np.bool_))


def rows_of(found: Detections) -> list[list[float]]:
    table = torch.cat(
        [found.boxes_xyxy, found.scores[:, None], found.labels[:, None].float()], dim=1
    )
    return [[round(value, 4) for value in row] for row in table.tolist()]


def merge(
    *parts: TileDetections, kind: MergeKind = "ios", threshold: float = 0.5, **options: int
) -> list[list[float]]:
    options = {"max_detections": 1000, **options}
    return rows_of(merge_tiles(parts, kind=kind, threshold=threshold, **options))


@pytest.mark.parametrize(
    ("kind", "threshold", "is_merged"),
    [
        # Intersection 5x10 = 50, union 150, smaller 100.
        ("nms", 0.33, True),
        ("nms", 0.34, False),
        ("ios", 0.49, True),
        ("ios", 0.5, False),
    ],
)
def test_merge_tiles_compares_the_overlap_with_the_threshold(
    kind: MergeKind, threshold: float, is_merged: bool
) -> None:
    left, right = [0, 0, 10, 10, 0.9, 0], [5, 0, 15, 10, 0.8, 0]
    merged = merge(part_of(left), part_of(right), kind=kind, threshold=threshold)
    assert merged == ([left] if is_merged else [left, right])


@pytest.mark.parametrize(("kind", "num_left"), [("ios", 1), ("nms", 2)])
def test_merge_tiles_drops_small_cut_off_parts_by_ios_only(kind: MergeKind, num_left: int) -> None:
    # A fifth of the object was seen by the second tile: intersection over union 0.2.
    whole, cut = [0, 0, 100, 20, 0.8, 0], [80, 0, 100, 20, 0.7, 0]
    merged = merge(part_of(whole), part_of(cut), kind=kind)
    assert merged == [whole, cut][:num_left]


def test_merge_tiles_reports_an_object_once_when_four_tiles_saw_it() -> None:
    parts = [part_of([50 + i, 50, 70 + i, 70, 0.5 + i / 10, 1]) for i in range(4)]
    assert merge(*parts) == [[53, 50, 73, 70, 0.8, 1]]


def test_merge_tiles_lets_boxes_of_one_tile_stand() -> None:
    nested = [[0, 0, 50, 50, 0.9, 0], [10, 10, 30, 30, 0.8, 0], [1, 1, 51, 51, 0.7, 0]]
    assert merge(part_of(*nested)) == nested
    # Beside another tile's box too, and the nested ones are both removed by a better one there.
    far = [900, 900, 950, 950, 0.95, 0]
    assert merge(part_of(*nested), part_of(far)) == [far, *nested]
    best = [0, 0, 50, 50, 0.99, 0]
    assert merge(part_of(*nested), part_of(best)) == [best]


def test_merge_tiles_keeps_classes_apart_unless_told_otherwise() -> None:
    first, second = [0, 0, 10, 10, 0.8, 0], [0, 0, 10, 10, 0.9, 1]
    assert merge(part_of(first), part_of(second)) == [second, first]
    assert merge(part_of(first), part_of(second), is_class_agnostic=True) == [second]


def test_merge_tiles_prefers_the_larger_box_when_scores_are_equal() -> None:
    cut, whole = [0, 0, 6, 10, 0.9, 0], [0, 0, 10, 10, 0.9, 0]
    assert merge(part_of(cut), part_of(whole)) == [whole]
    assert merge(part_of(whole), part_of(cut)) == [whole]


def test_merge_tiles_prefers_the_earlier_tile_when_scores_and_sizes_are_equal() -> None:
    first, second = [0, 0, 10, 10, 0.9, 0], [1, 0, 11, 10, 0.9, 0]
    assert merge(part_of(first), part_of(second)) == [first]
    assert merge(part_of(second), part_of(first)) == [second]


@pytest.mark.parametrize(
    ("whole_score", "cut_score", "is_whole_kept"),
    [(0.5, 0.9, True), (0.46, 0.9, True), (0.44, 0.9, False), (0.9, 0.5, True)],
)
def test_merge_tiles_counts_half_the_score_of_what_is_cut(
    whole_score: float, cut_score: float, is_whole_kept: bool
) -> None:
    whole, cut = [0, 0, 20, 10, whole_score, 0], [10, 0, 20, 10, cut_score, 0]
    parts = part_of(cut, is_cut=[True]), part_of(whole)
    # Scores come back as they were.
    assert merge(*parts) == [whole if is_whole_kept else cut]


def test_merge_tiles_keeps_the_better_part_of_what_no_tile_saw_whole() -> None:
    left, right = [0, 0, 30, 10, 0.6, 0], [10, 0, 40, 10, 0.7, 0]
    both_cut = part_of(left, is_cut=[True]), part_of(right, is_cut=[True])
    assert merge(*both_cut) == [right]


def test_merge_tiles_sorts_by_the_scores_as_they_were() -> None:
    cut, whole = [0, 0, 10, 10, 0.9, 0], [50, 0, 60, 10, 0.8, 0]
    assert merge(part_of(whole), part_of(cut, is_cut=[True])) == [cut, whole]
    assert merge(part_of(whole), part_of(cut, is_cut=[True]), max_detections=1) == [cut]


def test_merge_tiles_keeps_what_only_a_removed_box_overlaps() -> None:
    # The second goes by the first; the third overlaps only the second, by 0.6.
    first, second, third = (
        [0, 0, 10, 10, 0.9, 0],
        [4, 0, 14, 10, 0.8, 0],
        [8, 0, 18, 10, 0.7, 0],
    )
    assert merge(part_of(first), part_of(second), part_of(third)) == [first, third]


def test_merge_tiles_counts_detections_after_merging() -> None:
    objects = [[20 * i, 0, 20 * i + 10, 10, 0.9 - i / 1000, 0] for i in range(400)]
    shifted = [[x1 + 1, 0, x2 + 1, 10, score - 0.0001, 0] for x1, _, x2, _, score, _ in objects]
    merged = merge(part_of(*objects), part_of(*shifted), max_detections=350)
    assert merged == [pytest.approx(row, abs=1e-4) for row in objects[:350]]
    assert len(merge(part_of(*objects), part_of(*shifted))) == 400


@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_merge_tiles_gives_nothing_when_nothing_was_found(num_parts: int) -> None:
    merged = merge_tiles([part_of()] * num_parts, kind="ios", threshold=0.5, max_detections=10)
    assert len(merged) == 0
    assert merged.boxes_xyxy.shape == (0, 4)


def test_merge_tiles_gives_a_single_tile_back_as_it_is_when_others_are_empty() -> None:
    # Equal scores with the smaller box first would be swapped by the tie rule.
    rows = [[0, 0, 5, 5, 0.9, 0], [0, 0, 10, 10, 0.9, 0]]
    assert merge(part_of(), part_of(*rows), part_of()) == rows


def draw_parts(seed: int) -> list[list[Row]]:
    """Rows with a seventh value: whether the box is cut."""
    rng = random.Random(seed)
    parts: list[list[Row]] = []
    for _ in range(rng.randint(2, 7)):
        left, top = rng.randint(0, 60), rng.randint(0, 60)
        rows = []
        for _ in range(rng.randint(1, 30)):
            x1, y1 = left + rng.randint(0, 30), top + rng.randint(0, 30)
            # Coarse scores, so that there are ties.
            score = rng.randint(1, 20) / 20
            size = (x1 + rng.randint(1, 25), y1 + rng.randint(1, 25))
            rows.append([x1, y1, *size, score, rng.randint(0, 2), rng.random() < 0.3])
        parts.append(sorted(rows, key=lambda row: -row[4]))
    return parts


def merge_slowly(
    parts: list[list[Row]], kind: MergeKind, threshold: float, is_class_agnostic: bool
) -> list[Row]:
    """All boxes with all others, one pair at a time."""
    entries = [(row, number) for number, rows in enumerate(parts) for row in rows]

    def area(row: Row) -> float:
        return (row[2] - row[0]) * (row[3] - row[1])

    def overlap(a: Row, b: Row) -> float:
        width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
        shared = width * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        whole = min(area(a), area(b)) if kind == "ios" else area(a) + area(b) - shared
        return shared / whole

    def rank(entry: tuple[Row, int]) -> tuple[float, float]:
        row, _ = entry
        return -np.float32(row[4]) * (0.5 if row[6] else 1), -area(row)

    kept: list[tuple[Row, int]] = []
    for row, number in sorted(entries, key=rank):
        is_rival = (
            number != other_number
            and (is_class_agnostic or row[5] == other[5])
            and overlap(row, other) > threshold
            for other, other_number in kept
        )
        if not any(is_rival):
            kept.append((row, number))
    # Stable, so that what is equal in both stays in the order of the tiles.
    kept.sort(key=entries.index)
    return [row[:6] for row, _ in sorted(kept, key=lambda entry: (-entry[0][4], -area(entry[0])))]


@pytest.mark.parametrize("is_class_agnostic", [False, True])
@pytest.mark.parametrize(
    ("kind", "threshold"), [("ios", 0.5), ("ios", 0.9), ("nms", 0.5), ("nms", 0.1), ("nms", 1.0)]
)
def test_merge_tiles_agrees_with_a_slow_oracle(
    kind: MergeKind, threshold: float, is_class_agnostic: bool
) -> None:
    num_removed = 0
    for seed in range(12):
        parts = draw_parts(seed)
        merged = merge(
            *(part_of(*(r[:6] for r in rows), is_cut=[bool(r[6]) for r in rows]) for rows in parts),
            kind=kind,
            threshold=threshold,
            is_class_agnostic=is_class_agnostic,
        )
        expected = merge_slowly(parts, kind, threshold, is_class_agnostic)
        assert merged == [pytest.approx(row, abs=1e-4) for row in expected]
        num_removed += sum(map(len, parts)) - len(merged)
    assert (num_removed > 0) == (threshold < 1)
