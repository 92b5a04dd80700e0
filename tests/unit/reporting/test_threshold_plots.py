"""Pictures of a sweep and of operating points, and the table of points."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from retinaray.evaluation.operating_points import OperatingPoint, Rule, choose_operating_points
from retinaray.evaluation.pr_curves import PrecisionRecallCurve
from retinaray.evaluation.threshold_sweep import SweepRow, SweepTable
from retinaray.reporting import threshold_plots
from retinaray.reporting.point_table import render_points
from retinaray.reporting.threshold_plots import draw_operating_points, draw_threshold_sweep


def make_curve(name: str, num_points: int = 40) -> PrecisionRecallCurve:
    hits = np.arange(1, num_points + 1)
    return PrecisionRecallCurve(
        category_id=name,
        name=name,
        thresholds=np.linspace(0.9, 0.1, num_points),
        num_hits=hits,
        num_false=hits // 3,
        num_ground_truth=num_points + 5 if num_points else 0,
        num_images=9,
    )


def make_table(ious: tuple[float, ...]) -> SweepTable:
    return SweepTable(
        tuple(
            SweepRow("class", iou, 100, threshold, 0.5 - threshold / 3 - iou / 50, 0.6, 0.4, 9)
            for iou in ious
            for threshold in (0.01, 0.2, 0.5)
        )
    )


def open_picture(content: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(content))
    assert picture.format == "PNG"
    return np.asarray(picture.convert("RGB"))


def count_pixels(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(pixels.astype(int) - colour).max(axis=-1) < 12).sum())


def test_draw_threshold_sweep_shows_the_best_in_red() -> None:
    pixels = open_picture(draw_threshold_sweep(make_table((0.3, 0.5, 0.7))))
    assert pixels.shape[1] > pixels.shape[0] > 300
    assert count_pixels(pixels, (214, 39, 40)) > 300


def test_draw_threshold_sweep_draws_one_setting_and_none_of_ap() -> None:
    single = SweepTable((replace(make_table((0.5,)).rows[0], AP=None),))
    assert open_picture(draw_threshold_sweep(single)).std() > 0


@pytest.mark.parametrize(("num_classes", "rows"), [(1, 1), (3, 1), (4, 2)])
def test_draw_operating_points_has_a_panel_per_class(num_classes: int, rows: int) -> None:
    curves = [make_curve(f"class {k}") for k in range(num_classes)]
    points = choose_operating_points(curves, Rule())
    pixels = open_picture(draw_operating_points(curves, points, title="a title"))
    assert pixels.shape[0] == pytest.approx(110 * (3.7 * rows + 0.4), abs=2)
    # The green point of each panel.
    assert count_pixels(pixels, (44, 160, 44)) > 30 * num_classes


def test_draw_operating_points_stops_at_a_number_of_panels_that_can_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threshold_plots, "_MAX_PANELS", 2)
    curves = [make_curve(f"class {k}") for k in range(5)]
    points = choose_operating_points(curves, Rule())
    few = open_picture(draw_operating_points(curves, points))
    assert few.shape == open_picture(draw_operating_points(curves[:2], points[:2])).shape


def test_draw_operating_points_marks_a_rule_that_is_not_met_in_orange() -> None:
    curves = [make_curve("a")]
    points = choose_operating_points(curves, Rule("recall", 1.0))
    pixels = open_picture(draw_operating_points(curves, points))
    assert count_pixels(pixels, (255, 127, 14)) > 30
    assert count_pixels(pixels, (44, 160, 44)) == 0


def test_draw_operating_points_leaves_out_classes_without_ground_truth() -> None:
    curves = [make_curve("a"), make_curve("b", 0)]
    points = choose_operating_points(curves, Rule())
    width = open_picture(draw_operating_points(curves, points)).shape[1]
    assert width == open_picture(draw_operating_points(curves[:1], points[:1])).shape[1]
    assert open_picture(draw_operating_points(curves[1:], points[1:])).size > 0


def test_render_points_aligns_classes_and_says_why_a_rule_is_not_met() -> None:
    points = [
        OperatingPoint(1, "a", 0.25, 0.5, 0.75, 0.6, 1.5, 12, True),
        OperatingPoint(2, "long name", 0.05, None, None, None, None, 0, False, "no ground truth"),
    ]
    head, first, second = render_points(points).splitlines()
    assert head.split() == ["class", "boxes", "threshold", "precision", "recall", "F1", "FP/image"]
    assert first == "a               12     0.2500      0.500      0.750      0.600      1.500"
    assert second.endswith(
        "     0.0500          -          -          -          -  no ground truth"
    )
    assert len(head) == len(first)
