"""The search for anchors: never worse than the defaults, exact, deterministic, and thrifty."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from retinaray.anchoring.anchor_search import RATIOS, SCALES, rate, sample_boxes, search_anchors
from retinaray.anchoring.best_iou import BoxGrid, best_iou_of
from retinaray.anchoring.coverage import measure_coverage, select_boxes
from retinaray.anchoring.fitting import (
    COVERAGE_PER_DOUBLING,
    AnchorFit,
    InputSize,
    fit_anchors,
    fit_in_space,
    plan_sizes,
)
from retinaray.data.coco import CocoDataset, load_coco
from retinaray.detector.anchors import AnchorSpec
from retinaray.errors import DatasetError

MakeDataset = Callable[..., CocoDataset]
P3, P2 = (8, 16, 32, 64, 128), (4, 8, 16, 32, 64, 128)


@pytest.fixture(scope="module")
def aerial_cars(shared_data: Path) -> CocoDataset:
    return load_coco(shared_data / "aerial_cars" / "train.json")


@pytest.fixture(scope="module")
def aerial_fit(aerial_cars: CocoDataset) -> AnchorFit:
    sizes = plan_sizes(aerial_cars, resize=800, max_size=1333, factors=(1.0, 1.25))
    return fit_anchors(aerial_cars, sizes)


def make_grid(boxes_xyxy: np.ndarray, strides: tuple[int, ...] = P3) -> BoxGrid:
    return BoxGrid.of(boxes_xyxy, strides=strides, convention="centered", canvas=(640, 640))


def place_squares(side: float, count: int = 400, ratio: float = 1.0) -> np.ndarray:
    low = np.random.default_rng(2).uniform(100, 400, (count, 2))
    sides = np.array([side / ratio**0.5, side * ratio**0.5])
    return np.concatenate([low, low + sides], axis=1).astype(np.float32)


def test_grid_numbers_are_what_the_command_line_prints() -> None:
    for value in (*SCALES, *RATIOS):
        assert float(f"{value:.3g}") == value
    assert list(SCALES) == sorted(set(SCALES))
    assert list(RATIOS) == sorted(set(RATIOS))


def test_rate_counts_a_box_gradually_round_the_threshold() -> None:
    # 0.45 counts 0, 0.5 half, 0.55 whole; besides 0.05 of the mean.
    assert rate(np.array([0.45, 0.5, 0.55, 0.9])) == pytest.approx(2.5 / 4 + 0.05 * 2.4 / 4)


def test_sample_boxes_takes_equal_steps_when_there_are_many() -> None:
    boxes_xyxy = np.arange(4 * 12_001).reshape(-1, 4)
    sample = sample_boxes(boxes_xyxy)
    assert sample[:, 0].tolist() == boxes_xyxy[::3, 0].tolist()
    assert len(sample) == 4001
    assert sample_boxes(boxes_xyxy[:5000]).shape == (5000, 4)


@pytest.mark.parametrize(
    ("side", "ratio"), [(12.0, 1.0), (40.0, 0.5), (40.0, 4.0)], ids=["small", "wide", "tall"]
)
def test_search_anchors_finds_the_shape_of_uniform_boxes(side: float, ratio: float) -> None:
    grid = make_grid(place_squares(side, ratio=ratio))
    scales, ratios = search_anchors(grid, num_scales=1, num_ratios=1)
    (found_scale,), (found_ratio,) = scales, ratios
    # One of the levels has anchors of about that side.
    assert min(abs(np.log2(side / (found_scale * stride))) for stride in P3) < 0.35
    assert found_ratio == pytest.approx(ratio, rel=0.3)
    # No other pair of the grid is better.
    best = max(
        rate(grid.best_iou((scale,), (other,)))
        for scale, other in itertools.product(SCALES[::3], RATIOS[::2])
    )
    assert rate(grid.best_iou(scales, ratios)) >= best


def test_search_anchors_does_not_end_below_its_start() -> None:
    rng = np.random.default_rng(4)
    low = rng.uniform(0, 300, (500, 2))
    boxes_xyxy = np.concatenate([low, low + np.exp(rng.uniform(2, 5.5, (500, 2)))], axis=1)
    grid = make_grid(boxes_xyxy.astype("f4"))
    start = ((2.0, 2.52, 3.17), (0.5, 1.0, 2.0))
    found = search_anchors(grid, num_scales=3, num_ratios=3, starts=[start])
    assert rate(grid.best_iou(*found)) >= rate(grid.best_iou(*start))


def test_fit_anchors_reports_exact_coverage_of_what_it_prints(
    aerial_cars: CocoDataset, aerial_fit: AnchorFit
) -> None:
    for candidate in aerial_fit.candidates:
        boxes = select_boxes(aerial_cars, candidate.size.canvas)
        printed = AnchorSpec(
            tuple(float(f"{scale:.6g}") for scale in candidate.scales),
            tuple(float(f"{ratio:.6g}") for ratio in candidate.ratios),
            candidate.strides,
        )
        report = measure_coverage(boxes, printed)
        assert report.all.num_iou_50 == candidate.report.all.num_iou_50
        assert report.anchors_per_image == candidate.report.anchors_per_image


def test_fit_anchors_reaches_far_more_small_cars_than_the_default(aerial_fit: AnchorFit) -> None:
    chosen = aerial_fit.chosen_at_size
    assert aerial_fit.default.share_iou_50 == pytest.approx(0.613, abs=0.001)
    assert chosen.share_iou_50 > 0.965 > aerial_fit.halved.share_iou_50
    assert chosen.size == aerial_fit.default.size
    assert chosen.report.anchors_per_image == aerial_fit.default.report.anchors_per_image
    assert chosen.levels == "3-7"
    # The larger input was taken because it is worth its anchors, P2 was not.
    assert aerial_fit.chosen.size.canvas == (1024, 1696)
    assert [candidate.levels for candidate in aerial_fit.candidates] == [
        *("3-7", "3-7"),
        *("3-7", "2-7") * 2,
    ]


def test_fit_anchors_keeps_its_rule(aerial_fit: AnchorFit) -> None:
    chosen = aerial_fit.chosen
    for candidate in aerial_fit.candidates:
        doublings = np.log2(candidate.report.anchors_per_image / chosen.report.anchors_per_image)
        gain = candidate.share_iou_50 - chosen.share_iou_50
        assert gain <= COVERAGE_PER_DOUBLING * doublings + 1e-6


def test_fit_anchors_finds_the_same_twice(aerial_cars: CocoDataset, aerial_fit: AnchorFit) -> None:
    sizes = plan_sizes(aerial_cars, resize=800, max_size=1333, factors=())
    again = fit_anchors(aerial_cars, sizes, level_choices=[P3])
    assert again.candidates == aerial_fit.candidates[:3]


def test_fit_anchors_chooses_nothing_below_the_default(make_dataset: MakeDataset) -> None:
    # One anchor per cell at a ninth of the price cannot reach both the tall and the wide boxes.
    odd = [place_squares(40, 6, ratio) for ratio in (3.0, 1 / 3)]
    boxes = np.concatenate([place_squares(40, 188), *odd])
    fit = fit_anchors(
        make_dataset([boxes]),
        [InputSize((640, 640))],
        num_scales=1,
        num_ratios=1,
        level_choices=[P3],
    )
    single = fit.candidates[2]
    assert fit.default.share_iou_50 == 1
    assert 0.94 <= single.share_iou_50 < 1
    assert single.worth > fit.default.worth
    assert fit.chosen is fit.default


def test_fit_anchors_tries_the_given_anchors_and_their_convention(
    make_dataset: MakeDataset,
) -> None:
    given = AnchorSpec((1.5, 3.0), (1.0,), P2, "odtk")
    dataset = make_dataset([place_squares(15.0)])
    fit = fit_anchors(dataset, [InputSize((640, 640))], given=given, level_choices=[P3])
    tried = fit.candidates[2]
    assert (tried.name, tried.scales, tried.strides) == ("given", (1.5, 3.0), P2)
    expected = best_iou_of(select_boxes(dataset, (640, 640)).boxes_xyxy, given, (640, 640)).mean()
    assert tried.report.all.mean_best_iou == pytest.approx(float(expected), abs=1e-5)


def test_fit_anchors_refuses_a_set_without_boxes(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([[(1, 1, 9, 9)]], crowds=[True])
    with pytest.raises(DatasetError, match=r"made\.json: expected at least one box.*found none"):
        fit_anchors(dataset, [InputSize((640, 640))])


def test_plan_sizes_stops_at_the_size_of_the_images(make_dataset: MakeDataset) -> None:
    # 1000 x 1500 at 800/1333 is scaled by 0.8: 1.25 times that is the image itself.
    dataset = make_dataset([[]] * 3, sizes=[(1000, 1500)] * 3)
    sizes = plan_sizes(dataset, resize=800, max_size=1333)
    assert sizes == (
        InputSize((800, 1216), 800, 1333),
        InputSize((1024, 1504), 1000, 1666),
    )
    assert plan_sizes(dataset, resize=1200, max_size=2000) == (InputSize((1216, 1824), 1200, 2000),)
    assert plan_sizes(dataset, resize=1, max_size=1, canvas=(400, 608)) == (
        InputSize((400, 608)),
        InputSize((512, 768)),
        InputSize((608, 928)),
        InputSize((800, 1216)),
    )


def test_plan_sizes_stays_below_the_largest_side_of_a_job(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([[]], sizes=[(20_000, 20_000)])
    sizes = plan_sizes(dataset, resize=6000, max_size=6000)
    assert [size.max_size for size in sizes] == [6000, 7500]


def test_fit_in_space_finds_the_best_combination(make_dataset: MakeDataset) -> None:
    boxes = select_boxes(make_dataset([place_squares(16.0, ratio=2.0)]), (640, 640))
    scales_choices = [(4.0, 5.0), (2.0, 2.5), (1.0, 1.25)]
    ratios_choices = [(1.0,), (0.5,), (2.0,)]
    spec = fit_in_space(
        boxes,
        scales_choices=scales_choices,
        ratios_choices=ratios_choices,
        strides_choices=[P3],
        convention="odtk",
    )
    assert spec == AnchorSpec((2.0, 2.5), (2.0,), P3, "odtk")


@pytest.mark.parametrize(("side", "strides"), [(40.0, P3), (9.0, P2)], ids=["large", "small"])
def test_fit_in_space_takes_the_fine_level_only_when_it_is_worth_it(
    make_dataset: MakeDataset, side: float, strides: tuple[int, ...]
) -> None:
    spec = fit_in_space(
        select_boxes(make_dataset([place_squares(side)]), (640, 640)),
        scales_choices=[(2.0, 2.83), (4.0, 5.66)],
        ratios_choices=[(1.0,)],
        strides_choices=[P2, P3],
    )
    assert spec.strides == strides


def test_fit_in_space_refuses_what_is_empty(make_dataset: MakeDataset) -> None:
    choices = {"scales_choices": [(4.0,)], "ratios_choices": [(1.0,)], "strides_choices": [P3]}
    boxes = select_boxes(make_dataset([place_squares(30.0)]), (640, 640))
    with pytest.raises(ValueError, match=r"ratios_choices=\[\].*at least one of each"):
        fit_in_space(boxes, **{**choices, "ratios_choices": []})
    with pytest.raises(DatasetError, match="at least one box"):
        fit_in_space(select_boxes(make_dataset([[]]), (640, 640)), **choices)
