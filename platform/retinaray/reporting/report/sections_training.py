"""Sections about how a model came to be: losses, validation, speed, the trials of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from retinaray.reporting.curves import smooth
from retinaray.reporting.report.charts import Axes, Line, draw_chart
from retinaray.reporting.report.contents import Numbered, ReportedRun
from retinaray.reporting.report.markup import (
    Section,
    legend_of_runs,
    make_bars,
    make_details,
    make_facts,
    make_figure,
    make_grid,
    make_legend,
    make_picture,
    make_table,
    show_number,
    show_share,
)

_LOSSES = (("class_loss", "Class loss"), ("box_loss", "Box loss"))
_SCORES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
_STAGES = {
    "fetch": "reading files",
    "decode": "decoding",
    "engine": "the network",
    "starved": "waiting for images",
    "commit": "writing results",
}
_MAX_TRIALS = 40


def render_training(runs: Numbered) -> Section:
    """Losses, learning rate and validation AP over epochs; all runs share the axes."""
    trained = [(number, run) for number, run in runs if _pick(run, "progress")]
    figures = [_draw_loss(trained, key, name) for key, name in _LOSSES] if trained else []
    if trained:
        figures.append(
            _draw_progress(trained, "learning_rate", "Learning rate", "learning rate of the step")
        )
    scored = [(number, run) for number, run in runs if _scored_validations(run)]
    figures += _draw_validations(scored)
    body = legend_of_runs(trained or scored) + make_grid(figures) if figures else ""
    tables = "".join(
        make_details(f"Numbers of the validations: {run.name}", _tabulate_validations(run))
        for _, run in scored
    )
    return Section("training", "Training: losses, learning rate and validation AP", body + tables)


def _draw_loss(runs: Numbered, key: str, name: str) -> str:
    return _draw_progress(
        runs, key, f"{name}, smoothed", "loss per foreground anchor", is_smooth=True
    )


def _draw_progress(
    runs: Numbered, key: str, caption: str, y_label: str, *, is_smooth: bool = False
) -> str:
    lines, ends = [], []
    for number, run in runs:
        events = _pick(run, "progress")
        values = [float(event[key]) for event in events]
        shown = smooth(values) if is_smooth else values
        lines.append(Line([event["epoch"] for event in events], shown, number, number))
        ends.append(f"{run.name} ends at {shown[-1]:.4g}")
    chart = draw_chart(
        lines,
        Axes("epoch", y_label, y_range=(0, None)),
        label=f"{caption} over epochs: {', '.join(ends)}",
    )
    note = escape(ends[0].removeprefix(f"{runs[0][1].name} ")) if len(runs) == 1 else ""
    return make_figure(caption, chart, note)


def _draw_validations(runs: Numbered) -> list[str]:
    if not runs:
        return []
    if len(runs) > 1:
        return [_draw_scores(runs, (name,), f"Validation {name}") for name in ("AP", "AP50")]
    return [
        _draw_scores(runs, ("AP", "AP50"), "Validation AP"),
        _draw_scores(runs, ("AP_small", "AP_medium", "AP_large"), "Validation AP by size"),
    ]


def _draw_scores(runs: Numbered, names: Sequence[str], caption: str) -> str:
    lines, ends, legend = [], [], []
    for number, run in runs:
        for place, name in enumerate(names):
            points = [
                (float(event["epoch"]), float(event[name]))
                for event in _scored_validations(run)
                if event.get(name) is not None
            ]
            if not points:
                continue
            series = number if len(names) == 1 else place
            x, y = zip(*points, strict=True)
            lines.append(Line(x, y, series, series, has_markers=True))
            label = run.name if len(names) == 1 else name
            ends.append(f"{label} {max(y):.3f} at best")
            legend.append((series, series, label))
    chart = draw_chart(
        lines,
        Axes("epoch", "AP on the validation images", y_range=(0, 1)),
        label=f"{caption} over epochs: {', '.join(ends)}",
    )
    keys = make_legend(legend) if len(names) > 1 else ""
    return make_figure(caption, keys + chart, escape(", ".join(ends)))


def _tabulate_validations(run: ReportedRun) -> str:
    rows = [
        [f"{event['epoch']:.3g}", *(show_number(event.get(name)) for name in _SCORES)]
        for event in _scored_validations(run)
    ]
    return make_table(["epoch", *_SCORES], rows, caption=f"Validations of {run.name}")


def render_speed(runs: Numbered) -> Section:
    """How fast training and inference went, and what held them up."""
    figures = []
    trained = [(number, run) for number, run in runs if _pick(run, "progress")]
    if trained:
        figures = [
            _draw_progress(trained, "images_per_s", "Training speed", "images per second"),
            _draw_progress(
                trained, "wait_share", "Waiting for images while training", "share of the time"
            ),
        ]
    body = legend_of_runs(trained) + make_grid(figures) if figures else ""
    inferred = [run for _, run in runs if run.speed]
    body += make_grid([_describe_inference(run) for run in inferred]) if inferred else ""
    latencies = _list_latencies(run for _, run in runs)
    if latencies:
        highest = max(length for _, length, _ in latencies)
        body += make_figure("Time per image of the network", make_bars(latencies, highest=highest))
    return Section("speed", "Speed: images per second and where the time goes", body)


def _describe_inference(run: ReportedRun) -> str:
    speed = run.speed
    facts = {
        "images per second": show_number(speed.get("images_per_s"), 2),
        "with all workers at work": show_number(speed.get("steady_images_per_s"), 2),
        "workers": show_number(speed.get("num_workers")),
        "held up by": str((speed.get("bottleneck") or {}).get("text", "–")),
    }
    stages = {name: float(value) for name, value in (speed.get("stage_s") or {}).items()}
    total = sum(stages.values())
    bars = [
        (_STAGES.get(name, name), seconds, f"{seconds:.1f} s, {show_share(seconds / total)}")
        for name, seconds in stages.items()
        if total > 0
    ]
    content = make_facts(facts)
    if bars:
        content += make_bars(bars, highest=max(seconds for _, seconds, _ in bars))
    return make_figure(f"Batch inference: {escape(run.name)}", content)


def _list_latencies(runs: Any) -> list[tuple[str, float, str]]:
    found = []
    for run in runs:
        timed = [event["latency_ms"] for event in _scored_validations(run) if "latency_ms" in event]
        if timed:
            found.append((f"{run.name}, validation", timed[-1], f"{timed[-1]:.1f} ms"))
        if run.scores.get("images_per_s"):
            milliseconds = 1000 / float(run.scores["images_per_s"])
            text = f"{milliseconds:.1f} ms with reading"
            found.append((f"{run.name}, evaluation", milliseconds, text))
    return found


def render_sweep(runs: Numbered) -> Section:
    """The leaderboard of each sweep, and the pictures that it drew."""
    body = ""
    for _, run in runs:
        if run.sweep is None:
            continue
        body += f"<h3>{escape(run.name)}</h3>{_tabulate_trials(run.sweep.rows)}"
        body += make_grid([make_picture(picture) for picture in run.sweep.pictures], "pictures")
    return Section("trials", "Trials: what was tried and what it scored", body)


def _tabulate_trials(rows: Sequence[Mapping[str, Any]]) -> str:
    ranked = sorted(rows, key=lambda row: -_or_lowest(row.get("score")))
    points = sorted({key for row in rows for key in row if key.startswith("point.")})
    head = ["trial", "status", "epoch", "score", "AP", "AP50", "ms per image", "coverage"]
    cells = [
        [
            escape(str(row.get("trial", ""))),
            escape(str(row.get("status", ""))),
            show_number(row.get("epoch"), 1),
            f"<b>{show_number(row.get('score'))}</b>",
            show_number(row.get("AP")),
            show_number(row.get("AP50")),
            show_number(row.get("latency_ms"), 1),
            show_share(row.get("coverage")),
            *(escape(_shorten(row.get(key))) for key in points),
        ]
        for row in ranked[:_MAX_TRIALS]
    ]
    names = [key.removeprefix("point.") for key in points]
    more = len(ranked) - len(cells)
    note = f"<p>{more} more in trials.csv.</p>" if more > 0 else ""
    return make_table([*head, *names], cells, caption="Trials, best first") + note


def _or_lowest(score: Any) -> float:
    return -math.inf if score is None else float(score)


def _shorten(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _pick(run: ReportedRun, kind: str) -> list[Mapping[str, Any]]:
    return [event for event in run.events if event["kind"] == kind]


def _scored_validations(run: ReportedRun) -> list[Mapping[str, Any]]:
    return [event for event in _pick(run, "validation") if event.get("AP") is not None]
