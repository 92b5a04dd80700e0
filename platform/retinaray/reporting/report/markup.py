"""Small pieces of HTML that several sections of a report share."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from retinaray.reporting.report.contents import Picture, ReportedRun


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        anchor: Its id.
        title: What is seen there.
        body: HTML; empty = there is nothing to show.
    """

    anchor: str
    title: str
    body: str


def show_number(value: object, digits: int = 3) -> str:
    """A number for people: so many digits behind the point, a dash for none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else escape(str(value))
    if not math.isfinite(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def show_share(value: float | None) -> str:
    """A share in [0, 1] as per cent."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def make_figure(caption: str, content: str, note: str = "") -> str:
    """A chart with its title above it; the caption and the note are HTML."""
    small = f"<small>{note}</small>" if note else ""
    return f"<figure><figcaption>{caption}{small}</figcaption>{content}</figure>"


def make_grid(figures: Sequence[str], kind: str = "charts") -> str:
    """Figures side by side as far as there is room."""
    return f'<div class="{kind}">{"".join(figures)}</div>'


def make_legend(entries: Sequence[tuple[int, int, str]]) -> str:
    """What lines mean.

    Args:
        entries: Series, dash and name of each.
    """
    dashes = ("", "12 5", "4 4", "14 5 4 5")
    items = "".join(
        '<li><svg class="key" viewBox="0 0 44 10" aria-hidden="true"><line x1="2" x2="42" y1="5" '
        f'y2="5" style="stroke:var(--series-{series})" stroke-dasharray="{dashes[dash % 4]}"/>'
        f"</svg>{escape(name)}</li>"
        for series, dash, name in entries
    )
    return f'<ul class="legend">{items}</ul>'


def legend_of_runs(runs: Sequence[tuple[int, ReportedRun]]) -> str:
    """Colours of the runs; empty when there is only one."""
    if len(runs) < 2:
        return ""
    return make_legend([(number, number, run.name) for number, run in runs])


def make_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str,
    kind: str = "numbers",
) -> str:
    """A table whose first column names its rows.

    Args:
        head: Titles of the columns, plain texts.
        rows: Cells as HTML.
        caption: What the table holds, for those who do not see it.
        kind: Class of the element.
    """
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    body = "".join(
        f'<tr><th scope="row">{cells[0]}</th>'
        f"{''.join(f'<td>{cell}</td>' for cell in cells[1:])}</tr>"
        for cells in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="{kind}"><caption class="unseen">{escape(caption)}</caption>'
        f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def make_bars(values: Sequence[tuple[str, float, str]], *, highest: float, series: int = 0) -> str:
    """Horizontal bars with their numbers.

    Args:
        values: Name, length and text of each.
        highest: Length of a full bar, > 0.
        series: Which of the page's series colours.
    """
    items = "".join(
        f'<li><span class="name">{escape(name)}</span><span class="track"><span class="bar" '
        f'style="width:{100 * min(max(length / highest, 0.0), 1.0):.1f}%;'
        f'background:var(--series-{series})"></span></span>'
        f'<span class="number">{escape(text)}</span></li>'
        for name, length, text in values
    )
    return f'<ul class="bars">{items}</ul>'


def make_picture(picture: Picture) -> str:
    """A picture with its caption, on white paper in the dark too."""
    content = base64.b64encode(picture.content).decode("ascii")
    return make_figure(
        escape(picture.caption),
        f'<img class="paper" decoding="async" alt="{escape(picture.caption)}" '
        f'src="data:{picture.media_type};base64,{content}">',
    )


def make_details(summary: str, content: str) -> str:
    """Something that opens when it is asked for."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def make_facts(facts: Mapping[str, str]) -> str:
    """Names and values."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    return f'<dl class="facts">{items}</dl>'
