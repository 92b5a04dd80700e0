"""Sections about what a run was: anchors, parity, settings, and how to make it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from retinaray.anchoring.coverage import CoverageReport, describe_coverage
from retinaray.reporting.report.contents import KIND_NAMES, Numbered, Picture, ReportedRun
from retinaray.reporting.report.markup import (
    Section,
    make_details,
    make_facts,
    make_figure,
    make_grid,
    make_picture,
    make_table,
    show_number,
    show_share,
)


def render_anchors(runs: Numbered) -> Section:
    """Which training boxes the anchors reach: a map and a table per run."""
    figures = [
        make_figure(
            escape(run.name),
            _render_coverage(run.coverage.report, run.coverage.picture, run.name),
            escape(describe_coverage(run.coverage.report)),
        )
        for _, run in runs
        if run.coverage is not None
    ]
    body = make_grid(figures, "wide") if figures else ""
    return Section("anchors", "Anchors: which training boxes they reach", body)


def _render_coverage(report: CoverageReport, picture: Picture, name: str) -> str:
    groups = {"all": {"all boxes": report.all}, "class": report.by_class}
    groups |= {"size in the image": report.by_size, "height : width": report.by_ratio}
    rows = [
        [
            f"{escape(label)} <small>{escape(kind)}</small>",
            show_number(row.count),
            show_share(row.share_iou_50),
            show_share(row.share_iou_40),
            show_number(row.mean_best_iou),
            show_number(row.num_only_by_best_anchor),
        ]
        for kind, group in groups.items()
        for label, row in group.items()
    ]
    head = ["boxes of", "number", "reach IoU 0.5", "reach 0.4", "mean best IoU", "by rule only"]
    table = make_table(head, rows, caption=f"Anchor coverage of {name}")
    return make_picture(picture) + make_details("Numbers by class, size and aspect", table)


def render_parity(runs: Numbered) -> Section:
    """Verdicts of parity checks, a row per runtime and precision."""
    body = ""
    for _, run in runs:
        if run.parity is None:
            continue
        rows = [_describe_case(row) for row in run.parity["rows"]]
        head = ["case", "verdict", "AP", "AP difference", "changed", "box p99 (px)", "ms per image"]
        body += f"<h3>{escape(run.name)}</h3>"
        body += make_table(head, rows, caption=f"Runtimes against torch: {run.name}")
        lines = [
            f"<li><b>{escape(row['name'])}</b>: {escape(reason)}</li>"
            for row in run.parity["rows"]
            for reason in row["reasons"]
        ]
        lines += [
            f"<li><b>{escape(case['name'])}</b> was not run: {escape(case['reason'])}</li>"
            for case in run.parity.get("not_run", ())
        ]
        body += f"<ul>{''.join(lines)}</ul>" if lines else ""
    return Section("parity", "Parity: exported files against torch", body)


def _describe_case(row: Mapping[str, Any]) -> list[str]:
    verdict = "pass" if row["passed"] else "fail"
    ap, reference = row.get("ap"), row.get("ap_reference")
    difference = None if ap is None or reference is None else ap - reference
    return [
        escape(row["name"]),
        f'<span class="verdict {verdict}">{verdict}</span>',
        show_number(ap, 4),
        "–" if difference is None else f"{difference:+.4f}",
        show_share(row["detections"]["changed_share"]),
        f"{row['candidates']['box_px']['p99']:.2g}",
        show_number(row.get("latency_ms"), 1),
    ]


def render_setup(runs: Numbered) -> Section:
    """Differences of settings, then each run's command line, versions and settings."""
    body = _compare_settings([run for _, run in runs if run.settings])
    figures = []
    for _, run in runs:
        content = make_facts({"kind": KIND_NAMES[run.kind], "place": run.source, **run.versions})
        if run.command:
            content = (
                f'<div class="command"><pre tabindex="0">{escape(run.command)}</pre>'
                '<button type="button" class="copy">Copy</button></div>' + content
            )
        if run.settings:
            content += make_details(
                f"All {len(run.settings)} settings, marked where they are not the default",
                _tabulate_settings(run),
            )
        elif run.kind == "evaluate":
            content += (
                "<p>Detections do not hold how they were made; what "
                "<code>retinaray evaluate</code> prints does.</p>"
            )
        figures.append(make_figure(escape(run.name), content))
    return Section("setup", "Settings, and how to make it again", body + make_grid(figures, "wide"))


def _compare_settings(runs: Sequence[ReportedRun]) -> str:
    if len(runs) < 2:
        return ""
    keys = sorted({key for run in runs for key in run.settings})
    rows = []
    for key in keys:
        values = [_show_setting(run.settings, key) for run in runs]
        if len(set(values)) > 1:
            rows.append([escape(key), *map(escape, values)])
    if not rows:
        return "<p>All settings are the same.</p>"
    head = ["setting", *(run.name for run in runs)]
    table = make_table(head, rows, caption="Settings that differ", kind="texts")
    return f"<h3>Settings that differ</h3>{table}<h3>Each run</h3>"


def _show_setting(settings: Mapping[str, object], key: str) -> str:
    return show_plain(settings[key]) if key in settings else "not a setting of it"


def _tabulate_settings(run: ReportedRun) -> str:
    rows = [
        [
            f"<b>{escape(key)}</b> <small>set</small>" if key in run.unusual else escape(key),
            escape(show_plain(value)),
        ]
        for key, value in run.settings.items()
    ]
    return make_table(["setting", "value"], rows, caption=f"Settings of {run.name}", kind="texts")


def show_plain(value: object) -> str:
    """A setting as a person would write it: none, true, numbers to six digits, lists by spaces."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return " ".join(show_plain(entry) for entry in value) or "(none)"
    return json.dumps(value) if isinstance(value, Mapping) else str(value)
