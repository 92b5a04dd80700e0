"""A sweep of thresholds and the chosen operating points as pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from retinaray.evaluation.operating_points import OperatingPoint
from retinaray.evaluation.pr_curves import PrecisionRecallCurve
from retinaray.evaluation.threshold_sweep import SweepTable

_DPI = 110
_MAX_COLUMNS = 3
_MAX_PANELS = 12
_F1_LEVELS = (0.2, 0.4, 0.6, 0.8, 0.9)
# Kinds often agree: the later lines are thinner, so that those below show.
_KIND_STYLES: dict[str, dict[str, Any]] = {
    "class": {"color": "tab:blue", "linewidth": 4, "marker": "o", "markersize": 9},
    "agnostic": {"color": "tab:orange", "linewidth": 1.5, "marker": "o", "markersize": 4},
    "none": {"color": "tab:grey", "linewidth": 1.5, "marker": "s", "markersize": 4},
}
_STAR: dict[str, Any] = {
    "marker": "*",
    "markersize": 15,
    "linestyle": "none",
    "color": "tab:red",
    "markeredgecolor": "black",
    "zorder": 4,
}


def draw_threshold_sweep(table: SweepTable) -> bytes:
    """Two panels as a PNG: AP against the score threshold, and against the NMS IoU.

    Left one line per NMS IoU, of the best NMS kind and cap; right one line per kind, each at the
    best threshold and cap, on an axis that shows small differences.

    Args:
        table: The sweep.
    """
    best = table.best_row
    figure = _make_figure(11.5, 4.6)
    by_threshold, by_iou = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_threshold_lines(by_threshold, table)
    for kind, style in _KIND_STYLES.items():
        line = sorted(
            (row.nms_iou, row.AP or 0.0)
            for row in table.rows
            if (row.nms_kind, row.max_detections) == (kind, best.max_detections)
            and row.score_threshold == best.score_threshold
        )
        if line:
            by_iou.plot(*zip(*line, strict=True), label=f"{kind} NMS", **style)
    by_iou.plot([best.nms_iou], [best.AP or 0.0], label="best", **_STAR)
    by_iou.margins(y=0.25)
    by_iou.set_xlabel("NMS IoU")
    by_iou.set_title(f"score threshold {best.score_threshold:g}", fontsize=11)
    by_iou.grid(alpha=0.3)
    by_iou.legend(loc="best", fontsize=9)
    return _to_png(figure)


def _draw_threshold_lines(axes: Any, table: SweepTable) -> None:
    from matplotlib import colormaps

    best = table.best_row
    rows = [
        row
        for row in table.rows
        if (row.nms_kind, row.max_detections) == (best.nms_kind, best.max_detections)
    ]
    ious = sorted({row.nms_iou for row in rows})
    for iou, colour in zip(
        ious, colormaps["viridis"](np.linspace(0, 0.85, len(ious))), strict=True
    ):
        line = sorted((row.score_threshold, row.AP or 0.0) for row in rows if row.nms_iou == iou)
        is_best = iou == best.nms_iou
        axes.plot(
            *zip(*line, strict=True),
            color="tab:red" if is_best else colour,
            linewidth=2.2 if is_best else 1.1,
            marker=".",
            zorder=3 if is_best else 2,
            label=f"NMS IoU {iou:g}",
        )
    label = f"best: AP {best.AP or 0.0:.3f}"
    axes.plot([best.score_threshold], [best.AP or 0.0], label=label, **_STAR)
    axes.set_xlabel("score threshold, the same for all classes")
    axes.set_ylabel("AP (IoU 0.50:0.95)")
    axes.set_ylim(0, max(0.05, 1.08 * (best.AP or 0.0)))
    axes.set_xlim(left=0)
    axes.set_title(
        f"{best.nms_kind} NMS, at most {best.max_detections} detections per image", fontsize=11
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=9)


def draw_operating_points(
    curves: Sequence[PrecisionRecallCurve],
    points: Sequence[OperatingPoint],
    *,
    title: str = "",
) -> bytes:
    """Precision against recall as a PNG: one panel per class, with the chosen point.

    Args:
        curves: One per class, at IoU 0.5; classes without ground truth get no panel, and of the
            others the first 12 do.
        points: The points on them, in the same order.
        title: Over all panels.
    """
    shown = [
        (curve, point)
        for curve, point in zip(curves, points, strict=True)
        if curve.num_ground_truth
    ][:_MAX_PANELS]
    num_columns = min(_MAX_COLUMNS, max(1, len(shown)))
    num_rows = max(1, -(-len(shown) // num_columns))
    figure = _make_figure(3.9 * num_columns + 0.3, 3.7 * num_rows + 0.4)
    panels = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True)
    for axes, (curve, point) in zip(panels.flat, shown, strict=False):
        _draw_panel(axes, curve, point)
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("recall at IoU 0.5", fontsize=11)
    figure.supylabel("precision at IoU 0.5", fontsize=11)
    if title:
        figure.suptitle(title, fontsize=11)
    return _to_png(figure)


def _draw_panel(axes: Any, curve: PrecisionRecallCurve, point: OperatingPoint) -> None:
    recalls = np.linspace(0.01, 1, 200)
    for level in _F1_LEVELS:
        # The precision that makes this F1 with a recall.
        is_possible = recalls > level / 2
        precision = level * recalls[is_possible] / (2 * recalls[is_possible] - level)
        inside = precision <= 1
        xs, ys = recalls[is_possible][inside], precision[inside]
        axes.plot(xs, ys, color="0.85", linewidth=0.8, zorder=1)
        axes.annotate(
            f"F1 {level:g}", (0.995, ys[-1]), fontsize=7, color="0.55", ha="right", va="bottom"
        )
    axes.plot(curve.recall, curve.precision, color="tab:blue", linewidth=1.6, zorder=2)
    if point.recall is not None and point.precision is not None:
        axes.plot(
            [point.recall],
            [point.precision],
            marker="o",
            markersize=8,
            color="tab:green" if point.is_met else "tab:orange",
            markeredgecolor="black",
            zorder=3,
        )
        axes.text(
            0.04,
            0.05,
            f"score > {point.threshold:.4g}\nprecision {point.precision:.3f}\n"
            f"recall {point.recall:.3f}\nF1 {point.f1:.3f}\n"
            f"{point.false_positives_per_image:.2f} false positives per image",
            transform=axes.transAxes,
            fontsize=8.5,
            va="bottom",
            bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": "0.8"},
        )
    axes.set_title(f"{curve.name} ({curve.num_ground_truth} boxes)", fontsize=10)
    axes.set_xlim(0, 1.01)
    axes.set_ylim(0, 1.01)
    axes.grid(alpha=0.25)


def _make_figure(width_in: float, height_in: float) -> Any:
    # The object interface leaves pyplot's global state and its display back end alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _to_png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI)
    return stream.getvalue()
