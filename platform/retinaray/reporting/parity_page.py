"""The parity report as one HTML file that needs nothing beside it: table, charts, worst images."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from retinaray.evaluation.difference_histogram import DifferenceHistogram
from retinaray.evaluation.parity_rows import (
    DifferenceTally,
    ParityGroup,
    ParityResult,
    ParityRow,
    ParityTolerance,
)
from retinaray.reporting.parity_charts import common_decades, draw_bars, draw_histogram
from retinaray.reporting.parity_style import STYLE
from retinaray.reporting.parity_table import (
    format_ap_difference,
    format_difference,
    speed_up,
)

_COLUMNS = (
    "Case",
    "Verdict",
    "Box difference (px)",
    "Score difference",
    "Detections changed",
    "AP",
    "Time per image",
)


@dataclass(frozen=True)
class ParityPicture:
    """An image in which a case differs much.

    Attributes:
        case: Name of the case.
        image: Name of the image.
        summary: What differs, in words.
        jpeg: The picture, as `draw_differences` makes it.
    """

    case: str
    image: str
    summary: str
    jpeg: bytes


def render_page(result: ParityResult, pictures: Sequence[ParityPicture]) -> str:
    """Write the page.

    Args:
        result: What the gate found.
        pictures: In the order in which they are shown; may be none. Cases without one are said to
            show no difference.

    Returns:
        HTML with style, charts and pictures inside; it follows the reader's light or dark setting.
    """
    name = escape(result.model.rsplit("/", 1)[-1])
    body = "\n".join(
        [
            _render_head(result),
            *(_render_table(group, result.tolerance) for group in result.groups),
            _render_lists(result),
            _render_histograms(result),
            _render_latencies(result),
            _render_pictures(result, pictures),
            _render_explanation(result.tolerance),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>Parity of {name}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _render_head(result: ParityResult) -> str:
    num_failed = sum(not row.has_passed for row in result.rows)
    num_failed += sum(case.is_fault for case in result.unrun)
    num_cases = len(result.rows) + sum(case.is_fault for case in result.unrun)
    verdict = "pass" if result.has_passed else "fail"
    text = (
        f"All {num_cases} cases pass"
        if result.has_passed
        else f"{num_failed} of {num_cases} cases fail"
    )
    facts = [
        f"{result.num_images} images",
        f"batch {result.batch}",
        f"{result.threads} thread{'s' if result.threads > 1 else ''}",
        result.machine,
    ]
    if result.num_errors:
        facts.insert(1, f"{result.num_errors} unreadable")
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        f'<header><h1>Parity of <span class="file">{escape(result.model)}</span></h1>'
        f'<p class="verdict {verdict}">{text}</p><ul class="facts">{items}</ul></header>'
    )


def _render_table(group: ParityGroup, tolerance: ParityTolerance) -> str:
    height, width = group.canvas
    head = "".join(f'<th scope="col">{column}</th>' for column in _COLUMNS)
    values = [
        "",
        "",
        "",
        "",
        "-" if group.ap is None else f"<b>{group.ap:.4f}</b>",
        "-" if group.latency_ms is None else f"<b>{group.latency_ms:.1f} ms</b>",
    ]
    cells = [
        f'<td data-label="{column}">{value}</td>' if value else '<td class="empty"></td>'
        for column, value in zip(_COLUMNS[1:], values, strict=True)
    ]
    reference = (
        '<tr class="reference"><th scope="row">torch fp32 <small>the reference</small></th>'
        f"{''.join(cells)}</tr>"
    )
    rows = "".join(_render_row(row, group, tolerance) for row in group.rows)
    return (
        f"<section><h2>Canvas {height} × {width}</h2>"
        f'<table class="cases"><thead><tr>{head}</tr></thead>'
        f"<tbody>{reference}{rows}</tbody></table></section>"
    )


def _render_row(row: ParityRow, group: ParityGroup, tolerance: ParityTolerance) -> str:
    case, found = row.case, row.candidates
    is_strict = case.precision == "fp32"
    verdict = "pass" if row.has_passed else "fail"
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in row.reasons)
    box_limit = f"{tolerance.box_px:g}" if is_strict else ""
    score_limit = f"{tolerance.score:g}" if is_strict else ""
    changed_limit = "" if is_strict else f"{tolerance.changed[case.precision]:.1%}"
    cells = [
        f'<span class="verdict {verdict}">{verdict}</span>',
        _show_quantiles(found.box_px, box_limit),
        _show_quantiles(found.scores, score_limit),
        _show_changes(row.detections, changed_limit),
        _show_ap(row, f"{tolerance.ap[case.precision]:g}"),
        _show_latency(row, group),
    ]
    columns = "".join(
        f'<td data-label="{column}">{cell}</td>'
        for column, cell in zip(_COLUMNS[1:], cells, strict=True)
    )
    line = (
        f'<tr><th scope="row">{escape(case.name)} <small>judged as {case.precision}</small></th>'
        f"{columns}</tr>"
    )
    if reasons:
        line += f'<tr class="reasons"><td colspan="{len(_COLUMNS)}"><ul>{reasons}</ul></td></tr>'
    return line


def _show_quantiles(histogram: DifferenceHistogram, limit: str) -> str:
    values = (histogram.quantile(0.5), histogram.quantile(0.99), histogram.max)
    p50, p99, largest = map(format_difference, values)
    return f"<b>{largest}</b>{_at_most(limit)}<small>median {p50}, p99 {p99}</small>"


def _show_changes(tally: DifferenceTally, limit: str) -> str:
    parts = {
        "missing": tally.num_missing,
        "extra": tally.num_extra,
        "other class": tally.num_flips,
    }
    shown = ", ".join(f"{count} {name}" for name, count in parts.items() if count) or "none"
    return (
        f"<b>{tally.changed_share:.2%}</b>{_at_most(limit)}"
        f"<small>{shown} of {tally.num_reference:,}</small>"
    )


def _show_ap(row: ParityRow, limit: str) -> str:
    if row.ap is None or row.ap_difference is None:
        return "-"
    difference = f"{format_ap_difference(row.ap_difference)}{_at_most('±' + limit)}"
    return f"<b>{row.ap:.4f}</b><small>{difference}</small>"


def _show_latency(row: ParityRow, group: ParityGroup) -> str:
    if row.latency_ms is None:
        return "-"
    times = speed_up(row, group)
    more = "" if times is None else f"<small>{times:.2f} × torch</small>"
    return f"<b>{row.latency_ms:.1f} ms</b>{more}"


def _at_most(limit: str) -> str:
    return f' <span class="limit">limit {limit}</span>' if limit else ""


def _render_lists(result: ParityResult) -> str:
    parts = []
    for title, kind, is_fault in (
        ("Refused by a runtime", "fail", True),
        ("Not run here", "unrun", False),
    ):
        items = "".join(
            f"<li><b>{escape(case.name)}</b>: {escape(case.reason)}</li>"
            for case in result.unrun
            if case.is_fault == is_fault
        )
        if items:
            parts.append(f'<section><h2>{title}</h2><ul class="{kind}">{items}</ul></section>')
    if result.notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in result.notes)
        parts.append(f"<section><h2>Notes</h2><ul>{items}</ul></section>")
    return "".join(parts)


def _render_histograms(result: ParityResult) -> str:
    rows = result.rows
    if not rows:
        return ""
    box_decades = common_decades([row.candidates.box_px for row in rows])
    score_decades = common_decades([row.candidates.scores for row in rows])
    figures = []
    for row in rows:
        is_strict = row.case.precision == "fp32"
        box = draw_histogram(
            row.candidates.box_px,
            title="Box, px",
            unit="px",
            decades=box_decades,
            limit=result.tolerance.box_px if is_strict else None,
        )
        score = draw_histogram(
            row.candidates.scores,
            title="Score",
            unit="",
            decades=score_decades,
            limit=result.tolerance.score if is_strict else None,
        )
        figures.append(
            f"<figure><figcaption>{escape(row.case.name)} "
            f"<small>{len(row.candidates.box_px):,} pairs</small></figcaption>"
            f'<div class="pair">{box}{score}</div></figure>'
        )
    return (
        "<section><h2>How far boxes and scores lie apart</h2>"
        "<p>Pairs before suppression, counted on a logarithmic axis that all cases share.</p>"
        f'<div class="charts">{"".join(figures)}</div></section>'
    )


def _render_latencies(result: ParityResult) -> str:
    figures = []
    for group in result.groups:
        values = []
        if group.latency_ms is not None:
            values.append(("torch fp32", group.latency_ms, f"{group.latency_ms:.1f} ms", True))
        for row in group.rows:
            if row.latency_ms is not None:
                times = speed_up(row, group)
                more = "" if times is None else f", {times:.2f} ×"
                text = f"{row.latency_ms:.1f} ms{more}"
                values.append((row.case.name, row.latency_ms, text, False))
        if values:
            height, width = group.canvas
            figures.append(
                f"<figure><figcaption>Canvas {height} × {width}</figcaption>"
                f"{draw_bars(values)}</figure>"
            )
    if not figures:
        return ""
    threads = f"{result.threads} thread{'s' if result.threads > 1 else ''}"
    return (
        "<section><h2>Time per image</h2><p>Median over interleaved rounds, first call left out; "
        f"network and choice of candidates, without reading files, batch {result.batch}, "
        f"{threads}.</p>{''.join(figures)}</section>"
    )


def _render_pictures(result: ParityResult, pictures: Sequence[ParityPicture]) -> str:
    if not pictures:
        return ""
    figures = []
    for picture in pictures:
        content = base64.b64encode(picture.jpeg).decode("ascii")
        name = f"{picture.image}, {picture.case}: {picture.summary}"
        figures.append(
            f'<figure><img loading="lazy" alt="{escape(name)}" '
            f'src="data:image/jpeg;base64,{content}"><figcaption><b>{escape(picture.case)}</b> '
            f"{escape(picture.image)}<small>{escape(picture.summary)}</small></figcaption></figure>"
        )
    shown = {picture.case for picture in pictures}
    others = [row.case.name for row in result.rows if row.case.name not in shown]
    same = f"<p>No visible difference: {escape(', '.join(others))}.</p>" if others else ""
    return (
        "<section><h2>Where detections differ most</h2>"
        '<p class="legend"><span><i class="key reference"></i>torch fp32, solid</span>'
        '<span><i class="key candidate"></i>the case, dashed</span>'
        "<span>thick: only one of them has it; thin and alone: close to its threshold</span></p>"
        f'{same}<div class="pictures">{"".join(figures)}</div></section>'
    )


def _render_explanation(tolerance: ParityTolerance) -> str:
    ap = ", ".join(f"{name} {limit:g}" for name, limit in tolerance.ap.items())
    changed = ", ".join(f"{name} {limit:.1%}" for name, limit in tolerance.changed.items())
    return (
        "<section><h2>What is compared</h2><p>Every runtime gets the same canvases as torch in "
        "float32. A box of one is paired with one box of the other: same class, at least half "
        "overlapping, best pair first. Differences of boxes and scores are those of the candidates "
        "before suppression, because suppression can turn a rounding error into another choice "
        "between two boxes; changed detections are counted after it, and only where they score "
        f"clearly above the model's threshold.</p><p>fp32 has to keep every candidate within "
        f"{tolerance.box_px:g} px and {tolerance.score:g} of score; of the other types this share "
        f"of detections may change: {changed}. Where there is ground truth, AP may differ by at "
        f"most: {ap}.</p></section>"
    )
