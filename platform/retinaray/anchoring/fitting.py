"""Anchors, pyramid levels and input size that reach most of a data set for what they cost.

The rule of choice: each doubling of the number of anchors per image must buy at least two points
(0.02) of coverage at IoU 0.5, or the cheaper setting wins; a setting that reaches less than ODTK's
defaults at the asked size is never chosen. Nothing is drawn at random: the same boxes give the
same anchors. Letters: M boxes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from retinaray.anchoring.anchor_search import rate, sample_boxes, search_anchors
from retinaray.anchoring.best_iou import BoxGrid
from retinaray.anchoring.coverage import (
    CoverageReport,
    LearnableBoxes,
    measure_coverage,
    select_boxes,
)
from retinaray.data.coco import CocoDataset
from retinaray.data.transforms import choose_canvas
from retinaray.detector.anchors import (
    DEFAULT_SCALES,
    DEFAULT_STRIDES,
    AnchorSpec,
    Convention,
    count_level_anchors,
)
from retinaray.errors import DatasetError

COVERAGE_PER_DOUBLING = 0.02
"""Share of the boxes that twice the anchors per image must add."""
LEVEL_CHOICES = (DEFAULT_STRIDES, (4, *DEFAULT_STRIDES))
"""P3 to P7, and P2 to P7."""
MAX_SIDE_PX = 8192
"""No larger input size is proposed: the longest side that a job accepts."""
SIZE_FACTORS = (1.0, 1.25, 1.5, 2.0)
"""Input sizes that are tried, relative to the asked one."""


@dataclass(frozen=True)
class InputSize:
    """How large images enter the network.

    Attributes:
        canvas: Height and width.
        resize: Short side that leads to this canvas; None when the canvas itself was asked for.
        max_size: Long side at most, likewise.
    """

    canvas: tuple[int, int]
    resize: int | None = None
    max_size: int | None = None


@dataclass(frozen=True)
class Candidate:
    """One setting and what it reaches.

    Attributes:
        name: `default`, `halved`, `given` or `fitted`.
        scales: Anchor side over stride, rising where fitted.
        ratios: Height over width, rising where fitted.
        strides: Pixels per cell of each level.
        size: Input size.
        report: Coverage of all boxes, exact.
    """

    name: str
    scales: tuple[float, ...]
    ratios: tuple[float, ...]
    strides: tuple[int, ...]
    size: InputSize
    report: CoverageReport

    @property
    def levels(self) -> str:
        """Pyramid levels as the command line names them: `3-7`."""
        first, last = (stride.bit_length() - 1 for stride in (self.strides[0], self.strides[-1]))
        return f"{first}-{last}"

    @property
    def share_iou_50(self) -> float:
        """Share of the boxes in [0, 1] that reach IoU 0.5; there is at least one box."""
        return self.report.all.num_iou_50 / self.report.all.count

    @property
    def worth(self) -> float:
        """Share of the boxes that reach IoU 0.5, less what its anchors should have bought."""
        return self.share_iou_50 - _price(self.report.anchors_per_image)

    def to_spec(self, convention: Convention) -> AnchorSpec:
        """The anchors of this setting."""
        return AnchorSpec(self.scales, self.ratios, self.strides, convention)


@dataclass(frozen=True)
class AnchorFit:
    """All settings that were tried.

    Attributes:
        candidates: In the order of trial; the first is `default`, the second `halved`.
        chosen: The best by the rule of choice.
        chosen_at_size: The best of those at the asked input size.
    """

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    chosen_at_size: Candidate

    @property
    def default(self) -> Candidate:
        """ODTK's anchors at the asked size."""
        return self.candidates[0]

    @property
    def halved(self) -> Candidate:
        """ODTK's anchors at half their scales, at the asked size."""
        return self.candidates[1]


def plan_sizes(
    dataset: CocoDataset,
    *,
    resize: int,
    max_size: int,
    canvas: tuple[int, int] | None = None,
    factors: Sequence[float] = SIZE_FACTORS,
) -> tuple[InputSize, ...]:
    """The asked input size, then larger ones up to the size of the images themselves.

    Args:
        dataset: At least one image.
        resize: Asked short side in pixels.
        max_size: Asked long side at most.
        canvas: Asked height and width; then `resize` and `max_size` have no say.
        factors: Relative sizes; those that would enlarge the median image are cut to the one that
            leaves it as it is.
    """
    heights = np.array([record.height for record in dataset.images])
    widths = np.array([record.width for record in dataset.images])
    if canvas is not None:
        scales = np.minimum(canvas[0] / heights, canvas[1] / widths)
    else:
        short, long = np.minimum(heights, widths), np.maximum(heights, widths)
        scales = np.minimum(resize / short, max_size / long)
    longest_px = max(canvas) if canvas is not None else max_size
    limit = max(1.0, min(1 / float(np.median(scales)), MAX_SIDE_PX / longest_px))

    def enlarge(factor: float) -> InputSize:
        if canvas is not None:
            if factor == 1:
                return InputSize(canvas)
            return InputSize((_next_32(canvas[0] * factor), _next_32(canvas[1] * factor)))
        sides = {"resize": round(resize * factor), "max_size": round(max_size * factor)}
        return InputSize(choose_canvas(heights, widths, **sides), **sides)

    # A step of less than a tenth is not worth a row.
    wanted = [min(factor, limit) for factor in factors if factor > 1]
    kept = [1.0]
    for factor in wanted:
        if factor > 1.1 * kept[-1]:
            kept.append(factor)
    return tuple(enlarge(factor) for factor in kept)


def _next_32(side_px: float) -> int:
    return math.ceil((side_px - 1e-6) / 32) * 32


def fit_anchors(
    dataset: CocoDataset,
    sizes: Sequence[InputSize],
    *,
    given: AnchorSpec | None = None,
    num_scales: int = 3,
    num_ratios: int = 3,
    level_choices: Sequence[tuple[int, ...]] = LEVEL_CHOICES,
) -> AnchorFit:
    """Search scales and ratios for each choice of levels and input size, and choose.

    Args:
        dataset: What is to be learnt; at least one box that is no crowd region.
        sizes: Input sizes; the first is the asked one (`plan_sizes`).
        given: The present anchors: one more setting and start, and the convention of all.
        num_scales: Scales of the fitted settings, >= 1.
        num_ratios: Ratios of the fitted settings, >= 1.
        level_choices: Strides of the levels to try.

    Returns:
        Every setting with its exact coverage. Fitted scales and ratios have three significant
        digits, and the coverage is that of the rounded numbers.

    Raises:
        DatasetError: If there is nothing to fit to.
    """
    present = given or AnchorSpec()
    default = AnchorSpec(convention=present.convention)
    halved = replace(default, scales=tuple(float(f"{s / 2:.3g}") for s in DEFAULT_SCALES))
    boxes_of_size = [select_boxes(dataset, size.canvas) for size in sizes]
    if not len(boxes_of_size[0]):
        raise DatasetError(
            f"{dataset.source}: expected at least one box that is no crowd region, found none; "
            "anchors are fitted to the boxes of the training set"
        )
    known = [("default", default), ("halved", halved)]
    if present != default:
        known.append(("given", present))
    candidates = [_measure(name, spec, sizes[0], boxes_of_size[0]) for name, spec in known]
    for size, boxes in zip(sizes, boxes_of_size, strict=True):
        sample = sample_boxes(boxes.boxes_xyxy)
        for strides in level_choices:
            grid = BoxGrid.of(
                sample, strides=strides, convention=present.convention, canvas=size.canvas
            )
            scales, ratios = search_anchors(
                grid,
                num_scales=num_scales,
                num_ratios=num_ratios,
                starts=[(spec.scales, spec.ratios) for _, spec in known],
            )
            spec = AnchorSpec(scales, ratios, strides, present.convention)
            candidates.append(_measure("fitted", spec, size, boxes))
    at_size = [candidate for candidate in candidates if candidate.size == sizes[0]]
    return AnchorFit(
        candidates=tuple(candidates),
        chosen=_choose(candidates, floor=candidates[0].share_iou_50),
        chosen_at_size=_choose(at_size, floor=candidates[0].share_iou_50),
    )


def _measure(name: str, spec: AnchorSpec, size: InputSize, boxes: LearnableBoxes) -> Candidate:
    report = measure_coverage(boxes, spec)
    return Candidate(name, spec.scales, spec.ratios, spec.strides, size, report)


def _choose(candidates: Sequence[Candidate], *, floor: float) -> Candidate:
    """The first of the worthiest; equal worth is decided by the mean of the best IoU."""
    eligible = [candidate for candidate in candidates if candidate.share_iou_50 >= floor]
    return max(eligible, key=lambda c: (round(c.worth, 6), c.report.all.mean_best_iou or 0.0))


def _price(num_anchors: int) -> float:
    return COVERAGE_PER_DOUBLING * math.log2(num_anchors)


def fit_in_space(
    boxes: LearnableBoxes,
    *,
    scales_choices: Sequence[tuple[float, ...]],
    ratios_choices: Sequence[tuple[float, ...]],
    strides_choices: Sequence[tuple[int, ...]],
    convention: Convention = "centered",
) -> AnchorSpec:
    """The best of finite choices by the rule of choice: where a search in this space may start.

    Args:
        boxes: What is to be learnt, on the canvas of the search; at least one.
        scales_choices: At least one tuple of scales.
        ratios_choices: At least one tuple of ratios.
        strides_choices: At least one tuple of strides.
        convention: Where an anchor lies in its cell.

    Returns:
        The first of the best combinations.

    Raises:
        DatasetError: If there is no box.
        ValueError: If a list of choices is empty.
    """
    if not len(boxes):
        raise DatasetError(
            "expected at least one box that is no crowd region, found none; anchors are chosen by "
            "the boxes of the training set"
        )
    sample = sample_boxes(boxes.boxes_xyxy)
    grids: dict[tuple[int, ...], BoxGrid] = {
        strides: BoxGrid.of(sample, strides=strides, convention=convention, canvas=boxes.canvas)
        for strides in strides_choices
    }

    def worth(spec: AnchorSpec) -> float:
        best_iou = grids[spec.strides].best_iou(spec.scales, spec.ratios)
        return rate(best_iou) - _price(sum(count_level_anchors(spec, *boxes.canvas)))

    specs = [
        AnchorSpec(scales, ratios, strides, convention)
        for strides, scales, ratios in itertools.product(
            strides_choices, scales_choices, ratios_choices
        )
    ]
    if not specs:
        raise ValueError(
            f"scales_choices={scales_choices}, ratios_choices={ratios_choices}, "
            f"strides_choices={strides_choices}: expected at least one of each"
        )
    return max(specs, key=worth)
