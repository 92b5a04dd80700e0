"""Charts of the parity page: histograms as inline SVG, bars as plain elements.

Colours come from the page's style by class, so that light and dark need no second picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from retinaray.evaluation.difference_histogram import DifferenceHistogram

_WIDTH, _HEIGHT = 260, 140
_LEFT, _RIGHT, _TOP, _BOTTOM = 2, 6, 22, 26


def common_decades(histograms: Sequence[DifferenceHistogram]) -> tuple[int, int]:
    """Powers of ten that hold the bars of all histograms; (-6, 0) when all are empty."""
    ends = [(low, high) for histogram in histograms for low, high, _ in histogram.bars() if low > 0]
    if not ends:
        return -6, 0
    first = math.floor(math.log10(min(low for low, _ in ends)) + 1e-9)
    last = math.ceil(math.log10(max(high for _, high in ends)) - 1e-9)
    return first, max(last, first + 1)


def draw_histogram(
    histogram: DifferenceHistogram,
    *,
    title: str,
    unit: str,
    decades: tuple[int, int],
    limit: float | None = None,
) -> str:
    """Draw one histogram on a logarithmic axis.

    Args:
        histogram: May be empty.
        title: What it shows.
        unit: Of the differences; empty when they have none.
        decades: First and last power of ten of the axis; differences of zero stand at its left end.
        limit: A tolerance to mark; none, or one beyond the axis, is not drawn.

    Returns:
        An svg element.
    """
    first, last = decades
    bars = histogram.bars()
    highest = max((count for _, _, count in bars), default=1)
    plot = _HEIGHT - _TOP - _BOTTOM

    def place(value: float) -> float:
        share = (math.log10(value) - first) / (last - first) if value > 0 else 0.0
        return _LEFT + min(max(share, 0.0), 1.0) * (_WIDTH - _LEFT - _RIGHT)

    shapes = []
    for low, high, count in bars:
        left = place(low)
        width = place(high) - left if low > 0 else 5.0
        tall = plot * count / highest
        text = f"{count} of {len(histogram)}: {low:.2g} to {high:.2g} {unit}".rstrip()
        shapes.append(
            f'<rect class="bar" x="{left + 0.5:.1f}" y="{_HEIGHT - _BOTTOM - tall:.1f}" '
            f'width="{max(width - 1, 1):.1f}" height="{tall:.1f}"><title>{text}</title></rect>'
        )
    shapes += _draw_axis(first, last, place(10.0**first), place(10.0**last))
    if limit is not None and 10.0**first < limit <= 10.0**last:
        shapes += [
            f'<line class="limit" x1="{place(limit):.1f}" x2="{place(limit):.1f}" y1="{_TOP}" '
            f'y2="{_HEIGHT - _BOTTOM}"/>',
            f'<text class="limit-text" x="{place(limit) - 4:.1f}" y="{_TOP + 9}" '
            f'text-anchor="end">{limit:g}</text>',
        ]
    label = f"{title}: median {histogram.quantile(0.5):.2g}, largest {histogram.max:.2g} {unit}"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label.rstrip())}">'
        f'<text class="title" x="{_LEFT}" y="13">{escape(title)}</text>{"".join(shapes)}</svg>'
    )


def _draw_axis(first: int, last: int, left: float, right: float) -> list[str]:
    base = _HEIGHT - _BOTTOM
    parts = [f'<line class="axis" x1="{left}" x2="{right}" y1="{base}" y2="{base}"/>']
    step = 1 if last - first <= 6 else 2
    for power in range(first, last + 1, step):
        x = left + (right - left) * (power - first) / (last - first)
        anchor = "start" if power == first else "end" if power == last else "middle"
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>'
            f'<text class="tick" x="{x:.1f}" y="{base + 16}" text-anchor="{anchor}">'
            f"{_format_power(power)}</text>"
        )
    return parts


def _format_power(power: int) -> str:
    if -3 <= power <= 3:
        return f"{10.0**power:g}"
    return f'10<tspan dy="-5" font-size="8">{power}</tspan>'


def draw_bars(values: Sequence[tuple[str, float, str, bool]]) -> str:
    """Draw horizontal bars with their numbers.

    Args:
        values: Name, length, text behind the bar, and whether it is the reference; may be empty.

    Returns:
        A list element.
    """
    longest = max((length for _, length, _, _ in values), default=0.0) or 1.0
    items = []
    for name, length, text, is_reference in values:
        kind = "bar reference" if is_reference else "bar"
        items.append(
            f'<li><span class="name">{escape(name)}</span><span class="track">'
            f'<span class="{kind}" style="width:{100 * length / longest:.1f}%"></span></span>'
            f'<span class="number">{escape(text)}</span></li>'
        )
    return f'<ul class="bars">{"".join(items)}</ul>'
