"""Coverage by class, size and aspect, and boxes that lose their anchors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from retinaray.anchoring.best_iou import place_boxes
from retinaray.anchoring.coverage import (
    CoverageReport,
    count_unmatched,
    describe_coverage,
    measure_coverage,
    poorly_covered,
    select_boxes,
)
from retinaray.data.coco import CocoDataset, load_coco
from retinaray.detector.anchors import AnchorSpec, make_anchors
from retinaray.detector.matching import match_anchors

MakeDataset = Callable[..., CocoDataset]
CANVAS = (640, 640)
# Squares of 32 px with their centres at 4, 12, 20, ... in x and y.
SQUARES = AnchorSpec(scales=(4.0,), ratios=(1.0,), strides=(8,))
SAME = (84, 84, 116, 116)  # centre 100 = 12 * 8 + 4: an anchor
HALF = (84, 84, 116, 100)  # its upper half: 32 x 16
FAR_BELOW = (96, 96, 104, 104)  # 8 x 8 inside a 32 x 32: 64 / 1024


def measure(dataset: CocoDataset, spec: AnchorSpec = SQUARES) -> CoverageReport:
    return measure_coverage(select_boxes(dataset, CANVAS), spec)


def test_measure_coverage_counts_by_group(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(
        [[SAME, HALF], [FAR_BELOW, SAME]], classes=[0, 1, 1, 0], crowds=[False] * 3 + [True]
    )
    report = measure(dataset)
    assert report.all.count == 3
    assert (report.all.num_iou_50, report.all.num_iou_40) == (2, 2)
    assert report.all.share_iou_50 == pytest.approx(2 / 3)
    assert report.all.mean_best_iou == pytest.approx((1 + 0.5 + 64 / 1024) / 3)
    assert (report.all.num_only_by_best_anchor, report.all.num_out_of_reach) == (1, 0)
    assert {name: row.count for name, row in report.by_class.items()} == {
        "car": 1,
        "bus": 2,
        "cyclist": 0,
    }
    assert list(report.by_class) == ["car", "bus", "cyclist"]
    assert report.by_class["bus"].share_iou_50 == 0.5
    # 32 * 32 is COCO's first medium area; 32 x 16 and 8 x 8 are small.
    assert {name: row.count for name, row in report.by_size.items()} == {
        "small": 2,
        "medium": 1,
        "large": 0,
    }
    # 32 x 16 has the aspect 1:2, the lower end of its bin.
    assert {name: row.count for name, row in report.by_ratio.items() if row.count} == {
        "1:2-1:1": 1,
        "1:1-2:1": 2,
    }
    assert report.anchors_per_image == 80 * 80


def test_measure_coverage_has_no_shares_when_a_class_has_no_boxes(
    make_dataset: MakeDataset,
) -> None:
    row = measure(make_dataset([[SAME]])).by_class["cyclist"]
    assert row.to_dict() == {
        "count": 0,
        "share_iou_0.5": None,
        "share_iou_0.4": None,
        "mean_best_iou": None,
        "only_by_best_anchor": 0,
        "out_of_reach": 0,
    }


def test_measure_coverage_uses_the_annotated_area_for_the_size(make_dataset: MakeDataset) -> None:
    # The image is halved by the canvas: 64 px become 32, but COCO's area stays 4096.
    dataset = make_dataset([[(168, 168, 232, 232)]], sizes=[(1280, 1280)])
    report = measure(dataset)
    assert report.all.mean_best_iou == pytest.approx(1)
    assert report.by_size["medium"].count == 1


def test_measure_coverage_counts_boxes_that_no_anchor_touches(make_dataset: MakeDataset) -> None:
    # Anchors of 2 px with centres 8 px apart leave gaps; this box lies in one.
    tiny = AnchorSpec(scales=(0.25,), ratios=(1.0,), strides=(8,))
    report = measure(make_dataset([[(7, 7, 9, 9), (3, 3, 5, 5)]]), tiny)
    assert (report.all.num_out_of_reach, report.all.num_iou_50) == (1, 1)
    assert report.all.num_only_by_best_anchor == 0
    assert "1 not at all" in describe_coverage(report)


def test_measure_coverage_keeps_classes_apart_when_names_repeat(make_dataset: MakeDataset) -> None:
    report = measure(make_dataset([[SAME]], names=("car", "bus", "car")))
    assert list(report.by_class) == ["car (1)", "bus", "car (3)"]


def test_describe_coverage_says_everything_in_one_line(make_dataset: MakeDataset) -> None:
    assert describe_coverage(measure(make_dataset([[SAME, HALF, FAR_BELOW]]))) == (
        "anchors reach 66.7 % of 3 boxes at IoU 0.5 (66.7 % at 0.4), 1 only through the "
        "best-anchor rule; 6,400 anchors per image"
    )
    assert describe_coverage(measure(make_dataset([[]]))) == (
        "no boxes to reach; 6,400 anchors per image"
    )


def test_poorly_covered_names_classes_only_when_too_many_boxes_are_missed(
    make_dataset: MakeDataset,
) -> None:
    report = measure(make_dataset([[SAME, FAR_BELOW, FAR_BELOW, HALF]], classes=[0, 1, 1, 1]))
    assert poorly_covered(report) == (("bus", 3, 2),)
    assert poorly_covered(report, max_share=0.49) == (("bus", 3, 2),)
    assert poorly_covered(report, max_share=0.5) == ()
    assert poorly_covered(measure(make_dataset([[]]))) == ()


def count_by_full_matching(dataset: CocoDataset, spec: AnchorSpec, canvas: tuple[int, int]) -> int:
    boxes_xyxy = torch.from_numpy(place_boxes(dataset, canvas))
    is_crowd = torch.from_numpy(dataset.is_crowd)
    num_unmatched = 0
    for start, end in zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True):
        matched = match_anchors(
            make_anchors(spec, *canvas),
            boxes_xyxy[start:end][None],
            is_valid=torch.ones(1, int(end - start), dtype=torch.bool),
            is_crowd=is_crowd[start:end][None],
        )
        owners = set(matched[matched >= 0].tolist())
        num_unmatched += int((~is_crowd[start:end]).sum()) - len(owners)
    return num_unmatched


@pytest.mark.parametrize("strides", [(8, 16, 32, 64, 128), (4, 8, 16, 32, 64, 128)])
@pytest.mark.parametrize("factor", [0.2, 1.0])
def test_count_unmatched_equals_matching_with_all_anchors(
    make_dataset: MakeDataset,
    make_random_boxes: Callable[..., np.ndarray],
    one_thread: None,
    strides: tuple[int, ...],
    factor: float,
) -> None:
    outer = [make_random_boxes(seed, 8, 200, 260).round() for seed in range(4)]
    # A part of each box at its middle: the two compete for the same anchors.
    middles = [(boxes[:, :2] + boxes[:, 2:]).repeat(2, 1)[:, [0, 2, 1, 3]] / 2 for boxes in outer]
    inner = [middle + (boxes - middle) * 0.6 for boxes, middle in zip(outer, middles, strict=True)]
    images = [np.concatenate(pair) for pair in zip(outer, inner, strict=True)]
    dataset = make_dataset(
        [*images, [], images[0][:1]],
        sizes=[(200, 260)] * 6,
        crowds=[index % 9 == 4 for index in range(65)],
    )
    spec = AnchorSpec((4 * factor, 6 * factor), (1.0, 2.0, 0.5), strides)
    expected = count_by_full_matching(dataset, spec, (200, 260))
    assert count_unmatched(dataset, spec, (200, 260)) == expected
    # Else this test would be blind.
    assert expected > 0


def test_count_unmatched_sees_a_small_box_lose_its_anchor_to_a_bigger_one(
    make_dataset: MakeDataset,
) -> None:
    # Whichever anchor overlaps the 8-px box most contains it, and overlaps the 32-px box more.
    dataset = make_dataset([[SAME, FAR_BELOW], [FAR_BELOW]])
    assert count_unmatched(dataset, SQUARES, CANVAS) == 1
    assert (
        count_unmatched(make_dataset([[SAME, FAR_BELOW]], crowds=[True, False]), SQUARES, CANVAS)
        == 0
    )
    assert count_unmatched(make_dataset([]), SQUARES, CANVAS) == 0


def test_measure_coverage_finds_the_small_cars_of_aerial_photographs(shared_data: Path) -> None:
    dataset = load_coco(shared_data / "aerial_cars" / "train.json")
    boxes = select_boxes(dataset, (800, 1344))
    default = measure_coverage(boxes, AnchorSpec())
    halved = measure_coverage(boxes, AnchorSpec(scales=(2.0, 2.52, 3.17)))
    assert default.all.count == 2619
    assert default.all.share_iou_50 == pytest.approx(0.613, abs=0.001)
    assert halved.all.share_iou_50 == pytest.approx(0.960, abs=0.001)
    assert poorly_covered(default)[0] == ("car", 2471, 994)
    assert default.by_class["cyclist"].count == 0
