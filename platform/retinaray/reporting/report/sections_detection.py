"""Sections about what a detector finds: scores, sizes, confusion, calibration, errors."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import numpy as np

from retinaray.evaluation.coco_map import CocoScores
from retinaray.evaluation.confusion import ConfusionMatrix
from retinaray.evaluation.error_taxonomy import ERROR_KINDS, SPECIAL_KINDS, ErrorReport
from retinaray.evaluation.operating_points import OperatingPoint
from retinaray.evaluation.size_bins import SizeBin
from retinaray.reporting.report.charts import Axes, Line, draw_chart
from retinaray.reporting.report.contents import (
    Analysed,
    DetectionAnalysis,
    Numbered,
    list_analysed,
)
from retinaray.reporting.report.markup import (
    Section,
    legend_of_runs,
    make_bars,
    make_details,
    make_figure,
    make_grid,
    make_legend,
    make_table,
    show_number,
    show_share,
)

_MAX_MATRIX = 25
_ERROR_NAMES: Mapping[str, str] = {
    "classification": "wrong class",
    "localisation": "poorly placed",
    "both": "wrong class and poorly placed",
    "duplicate": "second on one object",
    "background": "on background",
    "missed": "missed object",
    "false_positive": "all false detections",
    "false_negative": "all objects not found",
}


def render_classes(runs: Numbered) -> Section:
    """AP and operating point of each class."""
    body = ""
    for _, run, analysis in list_analysed(runs):
        head = ["class", "objects", "AP", "AP50", "small", "medium", "large", "recall at 100"]
        head += ["threshold", "precision", "recall", "F1"]
        points = {point.category_id: point for point in analysis.points}
        rows = [
            [
                escape(row.name),
                show_number(row.num_ground_truth),
                f"<b>{show_number(row.AP)}</b>",
                *(show_number(v) for v in (row.AP50, row.AP_small, row.AP_medium, row.AP_large)),
                show_number(row.AR_100),
                *_describe_point(points.get(row.category_id)),
            ]
            for row in analysis.scores.classes
        ]
        table = make_table(head, rows, caption=f"AP of each class: {run.name}")
        body += f"<h3>{escape(run.name)}</h3><p>{_describe_set(analysis)}</p>{table}"
    return Section("classes", "Classes: AP and operating point of each", body)


def _describe_set(analysis: DetectionAnalysis) -> str:
    scores = analysis.scores
    return (
        f"{escape(analysis.set_name)}: {scores.num_images:,} images, "
        f"{scores.num_detections:,} detections. Precision, recall and F1 at IoU 0.5 with "
        f"{escape(analysis.points_source)}."
    )


def _describe_point(point: OperatingPoint | None) -> list[str]:
    if point is None:
        return ["–"] * 4
    values = (point.precision, point.recall, point.f1)
    return [f"{point.threshold:.3g}", *map(show_number, values)]


def render_sizes(runs: Numbered) -> Section:
    """AP by COCO's sizes, and recall over finer ones."""
    analysed = list_analysed(runs)
    figures = []
    for number, run, analysis in analysed:
        bars = _list_size_bars(analysis.scores)
        figures.append(
            make_figure(
                f"AP by size: {escape(run.name)}", make_bars(bars, highest=1, series=number)
            )
        )
    if analysed:
        figures += [_draw_sizes(analysed, "recall_above"), _draw_sizes(analysed, "ap50")]
    tables = "".join(
        make_details(
            f"Numbers by size: {run.name}",
            make_table(
                ["side of the object", "objects", "found at any score", "found", "AP50"],
                [_describe_bin(row) for row in analysis.sizes.bins],
                caption=f"Objects by size: {run.name}",
            ),
        )
        for _, run, analysis in analysed
    )
    legend = legend_of_runs([(number, run) for number, run, _ in analysed])
    body = f"{legend}{make_grid(figures)}{tables}" if figures else ""
    return Section("sizes", "Size: how well small and large objects are found", body)


def _list_size_bars(scores: CocoScores) -> list[tuple[str, float, str]]:
    names = {"AP_small": "below 32 px", "AP_medium": "32 to 96 px", "AP_large": "above 96 px"}
    return [
        (name, scores.summary[key] or 0.0, show_number(scores.summary[key]))
        for key, name in {"AP": "all", **names}.items()
    ]


def _draw_sizes(analysed: Analysed, key: str) -> str:
    is_recall = key == "recall_above"
    caption = "Recall at the thresholds, by size" if is_recall else "AP50 by size"
    lines = []
    for number, _, analysis in analysed:
        bins = [row for row in analysis.sizes.bins if getattr(row, key) is not None]
        sides = [_middle_of(row) for row in bins]
        values = [getattr(row, key) for row in bins]
        lines.append(Line(sides, values, number, number, has_markers=True))
    chart = draw_chart(
        lines,
        Axes(
            "side of the object: square root of its area (px)",
            "recall at IoU 0.5" if is_recall else "AP50",
            y_range=(0, 1.02),
        ),
        label=caption,
    )
    return make_figure(caption, chart)


def _middle_of(row: SizeBin) -> float:
    return row.lowest_px * 1.25 if row.highest_px is None else (row.lowest_px + row.highest_px) / 2


def _describe_bin(row: SizeBin) -> list[str]:
    end = "and more" if row.highest_px is None else f"to {row.highest_px:g}"
    return [
        f"{row.lowest_px:g} {end} px",
        show_number(row.num_ground_truth),
        show_share(row.recall),
        show_share(row.recall_above),
        show_number(row.ap50),
    ]


def render_confusion(runs: Numbered) -> Section:
    """What was taken for what, one matrix per run."""
    figures = [
        make_figure(
            escape(run.name),
            _draw_matrix(analysis.confusion, run.name),
            "rows: what is there; columns: what was said; shade: share of the row",
        )
        for _, run, analysis in list_analysed(runs)
    ]
    body = ""
    if figures:
        body = (
            "<p>Counts at IoU 0.5 and the thresholds of the operating points; every object and "
            "every detection is counted once. The last column holds missed objects, the last row "
            f"detections on nothing.</p>{make_grid(figures, 'wide')}"
        )
    return Section("confusion", "Confusion: what was taken for what", body)


def _draw_matrix(matrix: ConfusionMatrix, name: str) -> str:
    """The whole matrix, or of many classes those with the most errors."""
    counts = np.asarray(matrix.counts)
    num_classes = len(matrix.names)
    shown = list(range(num_classes))
    if num_classes > _MAX_MATRIX:
        wrong = counts.sum(axis=0) + counts.sum(axis=1) - 2 * counts.diagonal()
        shown = sorted(np.argsort(-wrong[:num_classes], kind="stable")[:_MAX_MATRIX].tolist())
    shown.append(num_classes)
    names = [*matrix.names, "background"]
    totals = counts.sum(axis=1)
    rows = []
    for row in shown:
        cells = [escape(names[row]) if row < num_classes else "<i>background</i>"]
        for column in shown:
            count = int(counts[row, column])
            kind = ' class="right"' if row == column and row < num_classes else ""
            share = count / max(1, int(totals[row]))
            text = f"{count:,}" if count else "·"
            cells.append(f'<td{kind} style="--share:{share:.3f}">{text}</td>')
        cells[-1] = cells[-1] if row < num_classes else "<td></td>"
        rows.append(f'<tr><th scope="row">{cells[0]}</th>{"".join(cells[1:])}</tr>')
    head = "".join(
        f'<th scope="col">{escape(names[column]) if column < num_classes else "<i>missed</i>"}</th>'
        for column in shown
    )
    caption = f"Confusion matrix of {name}"
    more = num_classes + 1 - len(shown)
    note = f"<small>{more} classes with fewer errors are left out.</small>" if more else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="matrix"><caption class="unseen">{escape(caption)}</caption><thead><tr>'
        f'<th scope="col">is \\ said</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        f"</div>{note}"
    )


def render_calibration(runs: Numbered) -> Section:
    """Scores of hits and false detections, and whether a score says how likely a hit is."""
    analysed = list_analysed(runs)
    figures = []
    highest = max(
        (
            max(overall.num_hits + overall.num_false, default=1)
            for _, _, analysis in analysed
            for overall in [analysis.calibration.overall]
        ),
        default=1,
    )
    for _, run, analysis in analysed:
        figures += [
            _draw_scores(run.name, analysis, highest),
            _draw_reliability(run.name, analysis),
        ]
    body = ""
    if figures:
        body = (
            "<p>A detector whose hits and false detections lie apart can be used with one "
            "threshold; where they lie on each other no threshold helps. On the diagonal a score "
            f"of 0.7 is right 7 times of 10.</p>{make_grid(figures)}"
        )
    return Section("scores", "Scores: hits against false detections, and calibration", body)


def _draw_scores(name: str, analysis: DetectionAnalysis, highest: int) -> str:
    overall = analysis.calibration.overall
    lines = [
        Line(overall.edges, [*counts, counts[-1]], series, series, is_steps=True, is_filled=True)
        for series, counts in ((0, overall.num_hits), (1, overall.num_false))
        if counts
    ]
    low = "; ".join(
        f"{show_share(share)} of the hits score at most {score}"
        for score, share in overall.share_of_hits_below.items()
    )
    chart = draw_chart(
        lines,
        Axes("score", "detections per bin", (0, 1), (0, 1.05 * max(1, highest))),
        label=f"Scores of hits and of false detections of {name}: {low}",
    )
    legend = make_legend([(0, 0, "hits"), (1, 1, "false detections")])
    median = show_number(overall.median_hit_score, 2)
    return make_figure(
        f"Scores: {escape(name)}", legend + chart, f"median score of a hit {median}; {low}"
    )


def _draw_reliability(name: str, analysis: DetectionAnalysis) -> str:
    overall = analysis.calibration.overall
    points = [
        (score, share)
        for score, share in zip(overall.mean_scores, overall.precisions, strict=True)
        if score is not None and share is not None
    ]
    line = Line([score for score, _ in points], [share for _, share in points], has_markers=True)
    errors = (
        f"expected calibration error {show_number(overall.expected_calibration_error)}, "
        f"with place and size {show_number(analysis.calibration.detection_ece)}"
    )
    chart = draw_chart(
        [line],
        Axes("mean score of the bin", "share of hits", (0, 1), (0, 1.02), has_diagonal=True),
        label=f"Share of hits against score of {name}: {errors}",
    )
    return make_figure(f"Calibration: {escape(name)}", chart, errors)


def render_errors(runs: Numbered) -> Section:
    """TIDE's kinds of errors: what each costs, and how many there are."""
    analysed = list_analysed(runs)
    if not analysed:
        return Section("errors", "Errors: what costs AP", "")
    costs = [
        value
        for _, _, analysis in analysed
        for value in (
            *analysis.errors.delta_ap50.values(),
            *analysis.errors.special_delta_ap50.values(),
        )
    ]
    highest = max([0.05, *costs])
    figures = [
        make_figure(
            escape(run.name),
            make_bars(_list_costs(analysis.errors), highest=highest, series=number),
            f"AP50 is {show_number(analysis.errors.ap50)}; a bar is what it would gain",
        )
        for number, run, analysis in analysed
    ]
    body = (
        "<p>What AP50 would gain if one kind of error were corrected, and how many there are at "
        "any score. The gains do not add up, because one correction makes room for another "
        "(TIDE, Bolya et al. 2020).</p>"
    )
    return Section("errors", "Errors: what costs AP", body + make_grid(figures))


def _list_costs(errors: ErrorReport) -> list[tuple[str, float, str]]:
    bars = [
        (
            _ERROR_NAMES[kind],
            errors.delta_ap50[kind],
            f"+{errors.delta_ap50[kind]:.3f} ({errors.counts[kind]:,})",
        )
        for kind in ERROR_KINDS
    ]
    return bars + [
        (
            _ERROR_NAMES[kind],
            errors.special_delta_ap50[kind],
            f"+{errors.special_delta_ap50[kind]:.3f}",
        )
        for kind in SPECIAL_KINDS
    ]
