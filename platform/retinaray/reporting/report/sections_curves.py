"""The section on precision against recall of each class: the worst at large, the others folded."""

from __future__ import annotations

import math
from html import escape

from retinaray.reporting.report.charts import Axes, Line, Mark, draw_chart, draw_small_chart
from retinaray.reporting.report.contents import Analysed, Numbered, list_analysed
from retinaray.reporting.report.markup import (
    Section,
    legend_of_runs,
    make_details,
    make_figure,
    make_grid,
)

_MAX_PANELS = 12


def render_curves(runs: Numbered) -> Section:
    """Precision against recall of each class, with the operating points of all runs."""
    analysed = list_analysed(runs)
    names = _sort_classes(analysed)
    body = ""
    if names:
        first, others = names[:_MAX_PANELS], names[_MAX_PANELS:]
        sources = " ".join(
            f"{escape(run.name)}: {escape(analysis.points_source)}."
            for _, run, analysis in analysed
        )
        order = " The classes with the lowest AP come first." if len(names) > 1 else ""
        panels = make_grid([_draw_class(analysed, name) for name in first])
        body = (
            f"<p>At IoU 0.5. The dot is the operating point. {sources}{order}</p>"
            f"{legend_of_runs([(number, run) for number, run, _ in analysed])}{panels}"
        )
        if others:
            small = [_draw_class(analysed, name, is_small=True) for name in others]
            body += make_details(
                f"{len(others)} more classes: recall to the right, precision upwards, 0 to 1; "
                "numbers in the table of classes",
                make_grid(small, "charts small"),
            )
    return Section("curves", "Precision against recall, and the chosen thresholds", body)


def _sort_classes(analysed: Analysed) -> list[str]:
    """Names of the classes that have objects, by the lowest AP that a run has; equal ones stay."""
    lowest: dict[str, float] = {}
    for _, _, analysis in analysed:
        scores = {row.name: row.AP for row in analysis.scores.classes}
        for curve in analysis.curves:
            if curve.num_ground_truth:
                score = scores.get(curve.name)
                score = math.inf if score is None else score
                lowest[curve.name] = min(score, lowest.get(curve.name, math.inf))
    return sorted(lowest, key=lowest.__getitem__)


def _draw_class(analysed: Analysed, name: str, *, is_small: bool = False) -> str:
    lines, marks, notes = [], [], []
    for number, run, analysis in analysed:
        for curve, point in zip(analysis.curves, analysis.points, strict=True):
            if curve.name != name or not curve.num_ground_truth:
                continue
            lines.append(Line(curve.recall, curve.precision, number, number))
            if point.recall is None or point.precision is None:
                continue
            marks.append(Mark(point.recall, point.precision, number))
            prefix = f"{run.name}: " if len(analysed) > 1 else ""
            notes.append(
                f"{prefix}score > {point.threshold:.3g}: precision {point.precision:.3f}, recall "
                f"{point.recall:.3f}"
            )
    note = "; ".join(notes)
    label = f"Precision against recall of {name}. {note}"
    if is_small:
        return make_figure(escape(name), draw_small_chart(lines, label=label, marks=marks))
    axes = Axes("recall", "precision", (0, 1.01), (0, 1.02))
    chart = draw_chart(lines, axes, label=label, marks=marks)
    return make_figure(escape(name), chart, escape(note))
