"""The search for scales and ratios on a grid: many starts, then one number at a time.

Every number of the grid has three significant digits, so that what is printed is what was measured.
Letters: M boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from retinaray.anchoring.best_iou import BoxGrid

SCALE_STEPS = 12
"""Grid points per factor of two of the scales."""
SCALES = tuple(float(f"{2 ** (step / SCALE_STEPS):.3g}") for step in range(-18, 55))
"""0.354 to 22.6 strides."""
RATIOS = tuple(float(f"{2 ** (step / 6):.3g}") for step in range(-18, 19))
"""1:8 to 8:1."""

# An IoU just above 0.5 is lost again by the next resize or crop, so the search counts a box from
# 0 to 1 over this range. Measured on the test splits of three data sets: as much coverage as when
# it counts IoU >= 0.5 alone, or up to 2 points more.
_RAMP = (0.45, 0.55)
# Decides between settings of equal coverage; no realistic gain of the mean outweighs a point.
_MEAN_WEIGHT = 0.05
_MAX_SAMPLE = 5000
_NUM_STARTS = 3
_MAX_ROUNDS = 8
# A number moves by an octave at most at a time.
_REACH = 12


@dataclass(frozen=True)
class _State:
    """Positions in SCALES and in RATIOS."""

    scales: list[int]
    ratios: list[int]


@dataclass
class _ShapeTable:
    """Best IoU of each box by anchor shape, computed when first asked for."""

    grid: BoxGrid
    rows: dict[tuple[int, int], NDArray[np.float32]] = field(default_factory=dict)

    def best_iou(self, scales: Sequence[int], ratios: Sequence[int]) -> NDArray[np.float32]:
        best = np.zeros(self.grid.sides.shape[1], np.float32)
        for scale in scales:
            for ratio in ratios:
                row = self.rows.get((scale, ratio))
                if row is None:
                    row = self.grid.best_iou((SCALES[scale],), (RATIOS[ratio],))
                    self.rows[scale, ratio] = row
                np.maximum(best, row, out=best)
        return best

    def rate(self, state: _State) -> float:
        return rate(self.best_iou(state.scales, state.ratios))


def rate(best_iou: Float[np.ndarray, " M"]) -> float:
    """How good anchors are: about the share of boxes at IoU 0.5, and a little of the mean IoU.

    Args:
        best_iou: Best IoU of each box; at least one.
    """
    low, high = _RAMP
    reached = np.clip((best_iou - low) / (high - low), 0, 1)
    return float(reached.mean()) + _MEAN_WEIGHT * float(best_iou.mean())


def sample_boxes(boxes_xyxy: Float[np.ndarray, "M 4"]) -> Float[np.ndarray, "S 4"]:
    """At most 5000 boxes at equal steps through the data set: always the same ones."""
    step = max(1, -(-len(boxes_xyxy) // _MAX_SAMPLE))
    return boxes_xyxy[::step]


def search_anchors(
    grid: BoxGrid,
    *,
    num_scales: int,
    num_ratios: int,
    starts: Sequence[tuple[tuple[float, ...], tuple[float, ...]]] = (),
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scales and ratios that reach most boxes on given levels.

    Args:
        grid: At least one box, over the cells of the levels.
        num_scales: How many scales, >= 1.
        num_ratios: How many ratios, >= 1.
        starts: Scales and ratios to start from besides; those of other lengths are left out.

    Returns:
        Scales and ratios, both rising, without repetition: fewer than asked for when more would add
        nothing.
    """
    table = _ShapeTable(grid)
    ratio_sets = [_spread_ratios(num_ratios), _quantile_ratios(grid, num_ratios)]
    spread = [round(index * SCALE_STEPS / num_scales) for index in range(num_scales)]
    scan = [
        _State([base + offset for offset in spread], list(ratios))
        for base in range(len(SCALES) - spread[-1])
        for ratios in ratio_sets
    ]
    scan.sort(key=table.rate, reverse=True)
    states = [
        *scan[:_NUM_STARTS],
        *(
            _State([_nearest(s, SCALES) for s in scales], [_nearest(r, RATIOS) for r in ratios])
            for scales, ratios in starts
            if (len(scales), len(ratios)) == (num_scales, num_ratios)
        ),
    ]
    best = max((_descend(table, state) for state in states), key=table.rate)
    return (
        tuple(SCALES[index] for index in sorted(set(best.scales))),
        tuple(RATIOS[index] for index in sorted(set(best.ratios))),
    )


def _nearest(value: float, grid: Sequence[float]) -> int:
    return int(np.abs(np.log(np.array(grid) / value)).argmin())


def _spread_ratios(count: int) -> list[int]:
    """Around the square, an octave apart: 1:2, 1:1, 2:1."""
    return [_nearest(2.0 ** (index - (count - 1) / 2), RATIOS) for index in range(count)]


def _quantile_ratios(grid: BoxGrid, count: int) -> list[int]:
    """Middles of equally filled classes of the boxes' own ratios."""
    width, height = np.maximum(grid.sides, 1e-3)
    quantiles = np.quantile(height / width, (np.arange(count) + 0.5) / count)
    return [_nearest(value, RATIOS) for value in quantiles]


def _descend(table: _ShapeTable, state: _State) -> _State:
    """Move one number at a time to its best place, until none moves."""
    for _ in range(_MAX_ROUNDS):
        before = replace(state)
        for position in range(len(state.scales)):
            kept = state.scales[:position] + state.scales[position + 1 :]
            settled = table.best_iou(kept, state.ratios)
            options = _options(state.scales[position], len(SCALES))
            scores = [
                rate(np.maximum(settled, table.best_iou([option], state.ratios)))
                for option in options
            ]
            state = replace(state, scales=_placed(state.scales, position, options, scores))
        for position in range(len(state.ratios)):
            kept = state.ratios[:position] + state.ratios[position + 1 :]
            settled = table.best_iou(state.scales, kept)
            options = _options(state.ratios[position], len(RATIOS))
            scores = [
                rate(np.maximum(settled, table.best_iou(state.scales, [option])))
                for option in options
            ]
            state = replace(state, ratios=_placed(state.ratios, position, options, scores))
        if state == before:
            break
    return state


def _options(present: int, size: int) -> list[int]:
    """The present position first, so that it stays unless another one is better."""
    around = range(max(0, present - _REACH), min(size, present + _REACH + 1))
    return [present, *(option for option in around if option != present)]


def _placed(
    numbers: list[int], position: int, options: list[int], scores: list[float]
) -> list[int]:
    best = options[int(np.argmax(scores))]
    return [*numbers[:position], best, *numbers[position + 1 :]]
