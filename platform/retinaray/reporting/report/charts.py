"""Charts of a report: drawn by matplotlib as SVG, small ones by hand; coloured by the page.

Each colour is drawn as a stand-in and replaced by a variable of the page's style, so that light and
dark need no second picture. Texts stay texts, in the page's font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Float

MAX_SERIES = 8
_WIDTH_IN, _HEIGHT_IN = 4.3, 2.8
_MAX_POINTS = 400
# A small chart is as wide as a third of a chart, and there may be hundreds.
_MAX_SMALL_POINTS = 60
_SMALL_WIDTH, _SMALL_HEIGHT = 150, 100
_SMALL_DASHES = ("none", "6 3", "2 2", "7 3 2 3")
_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
# Stand-ins that matplotlib writes as they are; no chart uses these colours for anything else.
_TEXT, _SOFT, _GRID, _PAGE = "#010101", "#010102", "#010103", "#010104"
_SERIES = tuple(f"#0202{number:02x}" for number in range(1, MAX_SERIES + 1))
_VARIABLES = {
    _TEXT: "var(--text)",
    _SOFT: "var(--soft)",
    _GRID: "var(--line)",
    _PAGE: "var(--card)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES)},
}


@dataclass(frozen=True, eq=False)
class Line:
    """One line of a chart.

    Attributes:
        x: Positions, rising; with y as many.
        y: Values; those that are not finite are gaps.
        series: Which of the page's series colours.
        dash: Which of four dash patterns, so that no line is told by its colour alone.
        has_markers: Points are marked, for few points.
        is_steps: Values hold up to the next position, as of a histogram.
        is_filled: The area below is shaded.
    """

    x: Sequence[float] | Float[np.ndarray, " P"]
    y: Sequence[float] | Float[np.ndarray, " P"]
    series: int = 0
    dash: int = 0
    has_markers: bool = False
    is_steps: bool = False
    is_filled: bool = False


@dataclass(frozen=True)
class Mark:
    """One point of a chart.

    Attributes:
        x: Position.
        y: Value.
        series: Which of the page's series colours.
        is_hollow: Drawn as a ring.
    """

    x: float
    y: float
    series: int = 0
    is_hollow: bool = False


@dataclass(frozen=True)
class Axes:
    """Axes of a chart.

    Attributes:
        x_label: What goes to the right, with its unit.
        y_label: What goes up, with its unit.
        x_range: Ends; none = what the lines need.
        y_range: Likewise; the upper end may be none.
        has_diagonal: A line from corner to corner, for shares against shares.
    """

    x_label: str
    y_label: str
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float | None] | None = None
    has_diagonal: bool = False


def draw_chart(lines: Sequence[Line], axes: Axes, *, label: str, marks: Sequence[Mark] = ()) -> str:
    """Draw a chart.

    Args:
        lines: May be none.
        axes: Their axes.
        label: What is seen, for those who do not see it.
        marks: Points over the lines.

    Returns:
        An svg element without ids of its own, as wide as its place.
    """
    # The object interface leaves pyplot's global state and its display back end alone.
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 9.5}
    with rc_context(settings):
        figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), layout="constrained")
        FigureCanvasSVG(figure)
        panel = figure.subplots()
        _prepare_axes(panel, axes)
        for line in lines:
            _draw_line(panel, line)
        for mark in marks:
            _draw_mark(panel, mark)
        _limit_axes(panel, axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True)
    return _adapt_svg(stream.getvalue(), label)


def draw_small_chart(lines: Sequence[Line], *, label: str, marks: Sequence[Mark] = ()) -> str:
    """Draw shares against shares, both axes from 0 to 1 without numbers: a tenth of a chart's size.

    Args:
        lines: Their positions and values are finite; markers, steps and areas are not drawn.
        label: What is seen, for those who do not see it.
        marks: Points over the lines.

    Returns:
        An svg element without ids, as wide as its place.
    """
    middle_x, middle_y = _SMALL_WIDTH / 2, _SMALL_HEIGHT / 2
    shapes = [
        f'<path d="M0 0V{_SMALL_HEIGHT}H{_SMALL_WIDTH}" style="stroke:var(--soft)"/>',
        f'<path d="M{middle_x:g} 0V{_SMALL_HEIGHT}M0 {middle_y:g}H{_SMALL_WIDTH}" '
        'style="stroke:var(--line)"/>',
    ]
    for line in lines:
        thin = _thin_out(line, _MAX_SMALL_POINTS)
        points = " ".join(_place_small(x, y) for x, y in zip(thin.x, thin.y, strict=True))
        # The last point twice: a line of one point would not be seen.
        path = f'points="{points} {points.rpartition(" ")[2]}" stroke-linecap="round"'
        dash = f'stroke-dasharray="{_SMALL_DASHES[line.dash % len(_SMALL_DASHES)]}"'
        style = f"stroke:var(--series-{line.series % MAX_SERIES});stroke-width:1.8"
        shapes.append(f'<polyline {path} {dash} style="{style}"/>' if points else "")
    for mark in marks:
        x, _, y = _place_small(mark.x, mark.y).partition(",")
        fill = f"fill:var(--series-{mark.series % MAX_SERIES})"
        shapes.append(f'<circle cx="{x}" cy="{y}" r="3.5" style="{fill};stroke:var(--text)"/>')
    return (
        f'<svg class="chart" viewBox="-4 -4 {_SMALL_WIDTH + 8} {_SMALL_HEIGHT + 8}" role="img" '
        f'fill="none" aria-label="{escape(label)}">{"".join(shapes)}</svg>'
    )


def _place_small(x: float, y: float) -> str:
    return f"{x * _SMALL_WIDTH:.1f},{(1 - y) * _SMALL_HEIGHT:.1f}"


def _prepare_axes(panel: Any, axes: Axes) -> None:
    panel.set_xlabel(axes.x_label, color=_TEXT)
    panel.set_ylabel(axes.y_label, color=_TEXT)
    panel.tick_params(colors=_SOFT, labelcolor=_SOFT, length=3, labelsize=9)
    panel.grid(color=_GRID, linewidth=0.7)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color(_SOFT)
    if axes.has_diagonal:
        panel.plot([0, 1], [0, 1], color=_SOFT, linewidth=0.9, linestyle=(0, (2, 2)))


def _draw_line(panel: Any, line: Line) -> None:
    thin = _thin_out(line, _MAX_POINTS)
    colour = _SERIES[thin.series % MAX_SERIES]
    dash = _DASHES[thin.dash % len(_DASHES)]
    style = {"color": colour, "linewidth": 1.6, "linestyle": dash}
    if thin.is_steps:
        panel.step(thin.x, thin.y, where="post", **style)
    else:
        is_point = len(thin.x) == 1
        marker = "o" if thin.has_markers or is_point else ""
        panel.plot(thin.x, thin.y, marker=marker, markersize=3.5, **style)
    if thin.is_filled:
        step = "post" if thin.is_steps else None
        panel.fill_between(thin.x, thin.y, step=step, color=colour, alpha=0.18, linewidth=0)


def _draw_mark(panel: Any, mark: Mark) -> None:
    colour = _SERIES[mark.series % MAX_SERIES]
    panel.plot(
        [mark.x],
        [mark.y],
        marker="o",
        markersize=7,
        color=colour,
        markerfacecolor=_PAGE if mark.is_hollow else colour,
        markeredgecolor=colour if mark.is_hollow else _TEXT,
        markeredgewidth=1.6 if mark.is_hollow else 1.0,
        clip_on=False,
        zorder=5,
    )


def _limit_axes(panel: Any, axes: Axes) -> None:
    if axes.x_range is not None:
        panel.set_xlim(*axes.x_range)
    if axes.y_range is not None:
        low, high = axes.y_range
        if high is None:
            # Nothing but its lower end has no height that could be drawn.
            high = max(panel.get_ylim()[1], low + 1e-6)
        panel.set_ylim(low, high)


def _thin_out(line: Line, most: int) -> Line:
    """At most so many points as can be told apart; the first and the last stay."""
    x, y = np.asarray(line.x, dtype=np.float64), np.asarray(line.y, dtype=np.float64)
    if len(x) > most:
        kept = np.unique(np.linspace(0, len(x) - 1, most).round().astype(np.int64))
        x, y = x[kept], y[kept]
    return replace(line, x=x, y=y)


def _adapt_svg(text: str, label: str) -> str:
    """What matplotlib writes as an element of the page: its colours, its fonts, no own size."""
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # Groups have ids that all charts share; what is referred to has ids made from the label.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    body = svg[svg.index(">") + 1 :]
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], body)
    return (
        f'<svg class="chart" {view_box[0] if view_box else ""} role="img" '
        f'aria-label="{escape(label)}">{body.strip()}'
    )
