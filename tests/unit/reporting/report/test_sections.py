"""Sections of the page: the numbers that they show, checked by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from retinaray.anchoring.coverage import measure_coverage, select_boxes
from retinaray.data.coco import load_coco
from retinaray.detector.anchors import AnchorSpec
from retinaray.reporting.report.contents import (
    AnchorCoverage,
    Picture,
    ReportedRun,
    SweepContent,
)
from retinaray.reporting.report.markup import make_bars, show_number, show_share
from retinaray.reporting.report.sections_curves import render_curves
from retinaray.reporting.report.sections_detection import (
    render_calibration,
    render_classes,
    render_confusion,
    render_errors,
    render_sizes,
)
from retinaray.reporting.report.sections_setup import (
    render_anchors,
    render_parity,
    render_setup,
    show_plain,
)
from retinaray.reporting.report.sections_training import (
    render_speed,
    render_sweep,
    render_training,
)

MakeRun = Callable[..., ReportedRun]
ReadPage = Callable[[str], Any]


def list_rows(body: str) -> list[list[str]]:
    """Texts of the cells of all rows with a name."""
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', body, re.DOTALL)
    strip = re.compile(r"<[^>]+>")
    return [
        [strip.sub("", head), *(strip.sub("", c) for c in re.findall(r"<td[^>]*>(.*?)</td>", rest))]
        for head, rest in rows
    ]


def test_render_classes_gives_ap_and_operating_point(make_run: MakeRun) -> None:
    rows = list_rows(render_classes([(0, make_run("first"))]).body)
    # Of two cats the larger one is hit first: AP50 is 51 of 101 recalls. No dog is hit.
    assert rows[0][:4] == ["cat", "2", "0.505", "0.505"]
    assert rows[1][:4] == ["dog", "1", "0.000", "0.000"]
    # Best F1 of cats: one detection, right, of two objects: 2 * 1 * 0.5 / 1.5.
    assert rows[0][-3:] == ["1.000", "0.500", "0.667"]


def test_render_curves_draws_a_panel_per_class_with_its_point(
    make_run: MakeRun, read_page: ReadPage
) -> None:
    body = render_curves([(0, make_run("first")), (1, make_run("second"))]).body
    found = read_page(body)
    assert found.names.count("figure") == 2
    assert "first: score > 0.75: precision 1.000, recall 0.500" in found.text
    assert "second: score > 0.75" in found.text


def test_render_curves_draws_the_worst_classes_at_large_and_folds_the_others(
    make_run: MakeRun, read_page: ReadPage
) -> None:
    def make(name: str, scores: list[float | None]) -> ReportedRun:
        analysis = make_run(name).analysis
        assert analysis is not None
        row, curve, point = analysis.scores.classes[0], analysis.curves[0], analysis.points[0]
        names = [f"class {place:02d}" for place in range(len(scores))]
        classes = [
            replace(row, name=title, AP=score) for title, score in zip(names, scores, strict=True)
        ]
        changed = replace(
            analysis,
            scores=replace(analysis.scores, classes=tuple(classes)),
            curves=tuple(replace(curve, name=title) for title in names),
            points=tuple(replace(point, name=title) for title in names),
        )
        return make_run(name, analysis=changed)

    # Class 00 is the best of the first run, 14 that of the second; class 07 lacks an AP.
    rising = [0.9 - 0.05 * place for place in range(15)]
    first = make("first", [None if place == 7 else score for place, score in enumerate(rising)])
    body = render_curves([(0, first)]).body
    shown, _, folded = body.partition("<details>")
    captions = re.compile(r"<figcaption>(class \d\d)")
    order = ["14", "13", "12", "11", "10", "09", "08", "06", "05", "04", "03", "02"]
    assert captions.findall(shown) == [f"class {number}" for number in order]
    assert captions.findall(folded) == ["class 01", "class 00", "class 07"]
    assert "3 more classes" in folded
    assert folded.count("score &gt; 0.75: precision 1.000, recall 0.500") == 3
    assert read_page(body).names.count("figure") == 15
    # There may be hundreds.
    assert len(folded) / 3 < 0.2 * len(shown) / 12
    # The lowest AP of any run counts.
    second = make("second", [0.0, *[0.95] * 14])
    assert captions.findall(render_curves([(0, first), (1, second)]).body)[0] == "class 00"


def test_render_confusion_counts_every_object_once(make_run: MakeRun) -> None:
    section = render_confusion([(0, make_run("first"))])
    rows = {row[0]: row[1:] for row in list_rows(section.body)}
    # What is there: a cat is said to be a cat, one is missed; the dog is said to be a cat.
    assert rows == {"cat": ["1", "·", "1"], "dog": ["1", "·", "·"], "background": ["·", "1", ""]}
    assert '<td class="right" style="--share:0.500">1</td>' in section.body


def test_render_errors_shows_what_each_kind_costs(make_run: MakeRun, read_page: ReadPage) -> None:
    run = make_run("first")
    assert run.analysis is not None
    errors = run.analysis.errors
    text = read_page(render_errors([(0, run)]).body).text
    assert f"wrong class+{errors.delta_ap50['classification']:.3f} (1)" in text
    assert f"on background+{errors.delta_ap50['background']:.3f} (1)" in text
    assert f"missed object+{errors.delta_ap50['missed']:.3f} (1)" in text


def test_render_calibration_says_where_the_hits_score(
    make_run: MakeRun, read_page: ReadPage
) -> None:
    text = read_page(render_calibration([(0, make_run("first"))]).body).text
    assert "median score of a hit 0.90; 0.0 % of the hits score at most 0.3" in text


def test_render_sizes_gives_recall_of_each_size(make_run: MakeRun) -> None:
    rows = list_rows(render_sizes([(0, make_run("first"))]).body)
    by_size = {row[0]: row[1:4] for row in rows}
    assert by_size["32 to 64 px"] == ["1", "100.0 %", "100.0 %"]
    assert by_size["16 to 32 px"] == ["1", "0.0 %", "0.0 %"]
    assert by_size["8 to 16 px"] == ["1", "0.0 %", "0.0 %"]
    assert by_size["0 to 8 px"][0] == "0"


@pytest.mark.parametrize(
    "render",
    [
        render_classes,
        render_curves,
        render_confusion,
        render_errors,
        render_calibration,
        render_sizes,
        render_training,
        render_speed,
        render_sweep,
        render_parity,
        render_anchors,
    ],
)
def test_sections_are_empty_when_no_run_has_anything(
    make_run: MakeRun, render: Callable[..., Any]
) -> None:
    assert render([(0, make_run("first", analysis=None))]).body == ""


def test_render_training_draws_losses_rate_and_scores(
    make_run: MakeRun,
    make_progress: Callable[..., dict[str, Any]],
    make_validation: Callable[..., dict[str, Any]],
    read_page: ReadPage,
) -> None:
    events = [make_progress(step) for step in (1, 2, 10)]
    events += [make_validation(5, 0.25), make_validation(10, 0.5)]
    run = make_run("first", kind="train", analysis=None, events=events)
    section = render_training([(0, run)])
    found = read_page(section.body)
    assert found.names.count("figure") == 5
    assert "AP 0.500 at best, AP50 0.500 at best" in found.text
    rows = [row[:3] for row in list_rows(section.body)]
    assert rows == [["0.5", "0.250", "0.250"], ["1", "0.500", "0.500"]]


def test_render_training_puts_all_runs_on_the_same_axes(
    make_run: MakeRun, make_progress: Callable[..., dict[str, Any]]
) -> None:
    runs = [
        (number, make_run(f"run {number}", events=[make_progress(1), make_progress(2)]))
        for number in range(3)
    ]
    body = render_training(runs).body
    charts = re.findall(r"<svg class=\"chart\".*?</svg>", body, re.DOTALL)
    assert len(charts) == 3
    for chart in charts:
        assert {"var(--series-0)", "var(--series-1)", "var(--series-2)"} <= set(
            re.findall(r"var\(--series-\d\)", chart)
        )


def test_render_training_shows_a_loss_that_is_not_finite_as_a_gap(
    make_run: MakeRun, make_progress: Callable[..., dict[str, Any]]
) -> None:
    events = [make_progress(step, class_loss=float("nan")) for step in (1, 2)]
    body = render_training([(0, make_run("first", events=events))]).body
    assert "ends at nan" in body
    assert "NaN" not in re.sub(r"<small>.*?</small>", "", body)


def test_render_speed_says_where_the_time_of_an_inference_goes(
    make_run: MakeRun, read_page: ReadPage
) -> None:
    speed = {
        "images_per_s": 12.5,
        "steady_images_per_s": 20.0,
        "num_workers": 2,
        "stage_s": {"decode": 1.0, "engine": 3.0},
        "bottleneck": {"text": "engine-bound: add workers"},
    }
    text = read_page(render_speed([(0, make_run("first", kind="infer", speed=speed))]).body).text
    assert "images per second12.50" in text
    assert "decoding1.0 s, 25.0 %" in text
    assert "the network3.0 s, 75.0 %" in text
    assert "engine-bound: add workers" in text


def test_render_sweep_lists_trials_best_first(make_run: MakeRun) -> None:
    rows = (
        {"trial": "a", "status": "failed", "score": None, "error": "no memory"},
        {"trial": "b", "status": "stopped", "score": 0.2, "point.optim.peak_lr": 0.01},
        {"trial": "c", "status": "done", "score": 0.3, "point.optim.peak_lr": 0.001},
    )
    picture = Picture("trials", b"webp", "image/webp")
    run = make_run("sweep", kind="tune", sweep=SweepContent(rows, (picture,)))
    body = render_sweep([(0, run)]).body
    assert [row[0] for row in list_rows(body)] == ["c", "b", "a"]
    assert list_rows(body)[0][-1] == "0.001"
    assert 'src="data:image/webp;base64,d2VicA=="' in body


def test_render_parity_gives_verdicts_and_reasons(make_run: MakeRun, read_page: ReadPage) -> None:
    row = {
        "name": "m.onnx int8",
        "passed": False,
        "reasons": ["AP differs by 0.02"],
        "ap": 0.48,
        "ap_reference": 0.5,
        "latency_ms": 12.34,
        "detections": {"changed_share": 0.25},
        "candidates": {"box_px": {"p99": 1.5}},
    }
    parity = {"rows": [row], "not_run": [{"name": "m.plan", "reason": "no GPU"}]}
    run = make_run("p.json", kind="parity", analysis=None, parity=parity)
    body = render_parity([(0, run)]).body
    assert list_rows(body) == [
        ["m.onnx int8", "fail", "0.4800", "-0.0200", "25.0 %", "1.5", "12.3"]
    ]
    text = read_page(body).text
    assert "m.onnx int8: AP differs by 0.02" in text
    assert "m.plan was not run: no GPU" in text


def test_render_setup_lists_only_settings_that_differ(make_run: MakeRun) -> None:
    first = make_run("first")
    second = make_run(
        "second", settings={"optim.peak_lr": 0.002, "run.batch": 8, "loss.gamma": None}
    )
    body = render_setup([(0, first), (1, second)]).body
    table = body[: body.index("<h3>Each run</h3>")]
    assert list_rows(table) == [
        ["anchors.scales", "4 5", "not a setting of it"],
        ["loss.gamma", "not a setting of it", "none"],
        ["optim.peak_lr", "0.001", "0.002"],
    ]
    assert "<b>run.batch</b> <small>set</small>" in body
    assert '<pre tabindex="0">retinaray evaluate model.pth</pre>' in body


def test_render_anchors_gives_the_coverage_of_each_class(
    make_run: MakeRun, small_truth: dict[str, Any]
) -> None:
    import json

    dataset = load_coco(json.dumps(small_truth).encode(), source="a.json")
    boxes = select_boxes(dataset, (200, 100))
    # Anchors of 32 px and more: the cat of 40 px is reached, the dog of 20 px and the cat of 10 px
    # are not: 20 * 20 / (32 * 32) is 0.39.
    report = measure_coverage(boxes, AnchorSpec(scales=(4.0,), ratios=(1.0,)))
    coverage = AnchorCoverage(report, Picture("map", b"webp", "image/webp"))
    rows = list_rows(render_anchors([(0, make_run("first", coverage=coverage))]).body)
    shares = {row[0].split(" ")[0]: row[1:3] for row in rows[1:3]}
    assert rows[0][1] == "3"
    assert shares == {"cat": ["2", "50.0 %"], "dog": ["1", "0.0 %"]}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (True, "true"),
        (0.1234567, "0.123457"),
        ([1, None], "1 none"),
        ([], "(none)"),
        ({"a": 1}, '{"a": 1}'),
        ("text", "text"),
    ],
)
def test_show_plain_writes_settings_as_people_do(value: object, text: str) -> None:
    assert show_plain(value) == text


def test_show_number_and_share_write_a_dash_when_there_is_nothing() -> None:
    assert (show_number(None), show_number(float("nan")), show_share(None)) == ("–", "–", "–")
    assert (show_number(1234567), show_number(np.float64(0.5))) == ("1,234,567", "0.500")
    assert (show_number("<x>"), show_share(0.0512)) == ("&lt;x&gt;", "5.1 %")


def test_make_bars_are_as_long_as_their_share_of_the_highest() -> None:
    bars = make_bars([("a", 1.0, "1"), ("b", -1.0, "-1"), ("c", 9.0, "9")], highest=4)
    assert re.findall(r"width:([\d.]+)%", bars) == ["25.0", "0.0", "100.0"]
