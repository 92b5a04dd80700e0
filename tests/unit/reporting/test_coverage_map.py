"""The picture and the tables of anchor coverage."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from retinaray.anchoring.coverage import (
    CoverageReport,
    CoverageRow,
    LearnableBoxes,
    measure_coverage,
)
from retinaray.anchoring.fitting import AnchorFit, Candidate, InputSize
from retinaray.data.coco import Category, CategoryTable
from retinaray.detector.anchors import AnchorSpec, make_anchors
from retinaray.reporting.coverage_map import CoveragePanel, draw_coverage_map, map_best_iou
from retinaray.reporting.coverage_table import render_coverage, render_fit, render_warnings

VERMILION = (213, 94, 0)
CANVAS = (256, 320)
MakeBoxes = Callable[..., LearnableBoxes]


@pytest.fixture(scope="session")
def make_boxes() -> MakeBoxes:
    """Squares of one side, at places that repeat from call to call."""

    def make(side: float, count: int = 300, num_classes: int = 2) -> LearnableBoxes:
        low = np.random.default_rng(1).uniform(20, 150, (count, 2))
        corners = np.concatenate([low, low + side], axis=1).astype(np.float32)
        names = [f"class {index}" for index in range(num_classes)]
        return LearnableBoxes(
            boxes_xyxy=corners,
            class_indices=np.arange(count) % max(1, num_classes - 1),
            area=np.full(count, side * side, np.float32),
            categories=CategoryTable(tuple(Category(i + 1, n) for i, n in enumerate(names))),
            canvas=CANVAS,
        )

    return make


def draw(panels: list[CoveragePanel]) -> np.ndarray:
    stream = io.BytesIO()
    draw_coverage_map(panels, stream)
    with Image.open(stream) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def count_colour(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(pixels - colour).max(axis=-1) < 30).sum())


def test_draw_coverage_map_colours_the_boxes_that_are_missed(make_boxes: MakeBoxes) -> None:
    missed = draw([CoveragePanel("small", AnchorSpec(), make_boxes(12))])
    reached = draw([CoveragePanel("large", AnchorSpec(), make_boxes(40))])
    # The legend has a dot of its own.
    assert count_colour(missed, VERMILION) > count_colour(reached, VERMILION) + 30


def test_draw_coverage_map_draws_a_panel_per_setting(make_boxes: MakeBoxes, tmp_path: Path) -> None:
    panel = CoveragePanel("given", AnchorSpec(), make_boxes(40))
    height, width = draw([panel]).shape[:2]
    path = tmp_path / "two.png"
    draw_coverage_map([panel, panel], path)
    with Image.open(path) as image:
        assert image.size[1] == height
        assert image.size[0] > 1.6 * width


def test_draw_coverage_map_draws_boxes_without_width(make_boxes: MakeBoxes) -> None:
    boxes = make_boxes(0, count=3)
    assert not np.isfinite(boxes.ratios).any()
    assert count_colour(draw([CoveragePanel("flat", AnchorSpec(), boxes)]), (255, 255, 255)) > 1000


def test_map_best_iou_equals_the_mean_over_random_positions(
    one_thread: None,
) -> None:
    sides_px, ratios = np.array([20.0, 45.0]), np.array([0.5, 1.0, 3.0])
    spec = AnchorSpec(scales=(3.0, 4.5))
    mean_iou = map_best_iou(spec, (256, 256), sides_px, ratios)
    assert mean_iou.shape == (3, 2)
    anchors = make_anchors(spec, 256, 256)
    centre = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) * 128 + 64
    for row, ratio in enumerate(ratios):
        for column, side in enumerate(sides_px):
            half = torch.tensor([side / ratio**0.5, side * ratio**0.5]) / 2
            boxes_xyxy = torch.cat([centre - half, centre + half], dim=1).float()
            expected = float(box_iou(boxes_xyxy, anchors).amax(dim=1).mean())
            assert mean_iou[row, column] == pytest.approx(expected, abs=0.015)


def test_render_coverage_has_a_row_for_every_group(make_boxes: MakeBoxes) -> None:
    report = measure_coverage(make_boxes(40), AnchorSpec())
    lines = render_coverage(report).splitlines()
    cells = {line.split("  ")[0] or line.strip().split("  ")[0]: line.split() for line in lines}
    assert cells["all"][1:] == ["300", "100.0", "100.0", f"{report.all.mean_best_iou:.3f}", "0"]
    assert cells["class 1"] == ["class", "1", "0", "-", "-", "-", "-"]
    assert [name for name in ("small", "medium", "large", ">=4:1") if name in cells] == [
        "small",
        "medium",
        "large",
        ">=4:1",
    ]
    # Numbers stand below each other.
    assert len({len(line) for line in lines if line.endswith(("0", "-"))}) == 1


def test_render_coverage_lists_the_worst_when_there_are_many_classes() -> None:
    good, bad = CoverageRow(9, 9, 9, 0.8, 0, 0), CoverageRow(9, 2, 5, 0.4, 7, 0)
    rows = {f"good {index}": good for index in range(40)} | {"bad": bad}
    text = render_coverage(CoverageReport(bad, rows, {}, {}, 100, 0.5))
    assert text.index("  bad") < text.index("  good 0")
    assert "11 more" in text
    assert "good 29" not in text


def test_render_warnings_names_classes_and_lost_boxes(make_boxes: MakeBoxes) -> None:
    bad = measure_coverage(make_boxes(10), AnchorSpec())
    (line,) = render_warnings(bad, num_unmatched=0)
    assert line.startswith("warning: no anchor reaches IoU 0.5 with 300 of 300 class 0:")
    assert "--fit" in line
    good = measure_coverage(make_boxes(40), AnchorSpec())
    assert render_warnings(good, num_unmatched=None) == []
    (line,) = render_warnings(good, num_unmatched=1234)
    assert line.startswith("warning: 1,234 boxes have no anchor of their own")


def test_render_fit_marks_the_choice_and_its_gain() -> None:
    def candidate(name: str, reached: int, strides: tuple[int, ...]) -> Candidate:
        report = CoverageReport(CoverageRow(200, reached, 200, 0.6, 0, 0), {}, {}, {}, 9000, 0.5)
        return Candidate(name, (2.0, 2.52), (0.5, 1.0), strides, InputSize((640, 960)), report)

    tried = (
        candidate("default", 100, (8, 16, 32, 64, 128)),
        candidate("halved", 150, (8, 16, 32, 64, 128)),
        candidate("fitted", 199, (4, 8, 16, 32, 64, 128)),
    )
    lines = render_fit(AnchorFit(tried, tried[2], tried[1]), [1.0, 2.0, 3.25]).splitlines()
    assert lines[1].endswith("50.0   +0.0")
    assert lines[2].endswith("75.0  +25.0  <- chosen at this size")
    assert lines[3].split() == [
        *("fitted", "2", "2.52", "0.5", "1", "2-7", "640x960", "9,000", "3.2", "99.5", "+49.5"),
        *("<-", "chosen"),
    ]
