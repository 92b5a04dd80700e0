"""Charts: coloured by the page, read by everybody, no larger than what can be seen."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from retinaray.reporting.report.charts import Axes, Line, Mark, draw_chart, draw_small_chart

AXES = Axes("epoch", "loss (per box)", y_range=(0, None))


@pytest.fixture(scope="module")
def chart() -> str:
    """Two lines, a mark and a diagonal."""
    lines = [
        Line([0, 1, 2], [3.0, 2.0, 1.0], series=0),
        Line([0, 1, 2], [1.0, 2.0, 2.5], series=3, dash=1, has_markers=True, is_filled=True),
    ]
    axes = Axes("epoch", "loss (per box)", (0, 2), (0, 3), has_diagonal=True)
    return draw_chart(lines, axes, label='loss of "a" & b', marks=[Mark(1, 2, 3)])


def test_draw_chart_leaves_all_colours_to_the_page(chart: str) -> None:
    assert re.findall(r"#[0-9a-fA-F]{6}\b", chart) == []
    used = set(re.findall(r"var\((--[\w-]+)\)", chart))
    assert used == {"--series-0", "--series-3", "--text", "--soft", "--line"}


def test_draw_chart_says_what_is_seen_in_texts(chart: str, read_page: Callable[[str], Any]) -> None:
    assert 'role="img" aria-label="loss of &quot;a&quot; &amp; b"' in chart
    assert "epoch" in read_page(chart).text
    assert "loss (per box)" in read_page(chart).text
    assert "DejaVu" not in chart


def test_draw_chart_gives_one_element_without_a_size_of_its_own(
    chart: str, read_page: Callable[[str], Any]
) -> None:
    assert chart.startswith('<svg class="chart" viewBox="0 0 ')
    assert "<metadata" not in chart
    assert "<g id=" not in chart
    assert read_page(chart).names.count("svg") == 1


def test_draw_chart_gives_the_same_text_for_the_same_values() -> None:
    line = Line([0, 1], [1.0, 2.0])
    assert draw_chart([line], AXES, label="a") == draw_chart([line], AXES, label="a")


def test_draw_chart_thins_lines_out_when_there_are_more_points_than_can_be_seen() -> None:
    # Zigzag, which no simplification of straight pieces shortens.
    long = Line(range(5000), [float(x % 7) for x in range(5000)])
    text = draw_chart([long], AXES, label="long")
    points = max(len(re.findall(r"[ML] ", path)) for path in re.findall(r'd="([^"]*)"', text))
    assert 300 < points <= 400


def test_draw_chart_leaves_gaps_when_values_are_not_finite() -> None:
    text = draw_chart([Line([0, 1, 2, 3, 4], [1, 2, math.nan, 2, 1])], AXES, label="gap")
    assert "nan" not in text.lower()
    paths = re.findall(r'd="([^"]*)"', text)
    assert any(path.count("M ") == 2 and path.count("L ") == 2 for path in paths)


def test_draw_chart_marks_a_line_of_one_point() -> None:
    alone = draw_chart([Line([1], [2.0])], AXES, label="one")
    assert alone.count("var(--series-0)") > draw_chart([], AXES, label="one").count("--series-0")
    assert '<use xlink:href="#' in alone


def test_draw_small_chart_puts_shares_where_they_belong(read_page: Callable[[str], Any]) -> None:
    # 150 wide, 100 high, and upwards is down in SVG.
    lines = [Line([0, 0.5, 1], [1, 0.75, 0], series=1, dash=1), Line([0.2], [0.4], series=2)]
    text = draw_small_chart(lines, label='of "a"', marks=[Mark(0.5, 0.75, 1)])
    assert re.findall(r'points="([^"]*)"', text) == [
        "0.0,0.0 75.0,25.0 150.0,100.0 150.0,100.0",
        "30.0,60.0 30.0,60.0",
    ]
    assert '<circle cx="75.0" cy="25.0"' in text
    assert re.findall(r'dasharray="([^"]*)"', text) == ["6 3", "none"]
    assert 'role="img" fill="none" aria-label="of &quot;a&quot;"' in text
    assert re.findall(r"#[0-9a-fA-F]{3,6}\b", text) == []
    assert set(re.findall(r"var\((--series-\d)\)", text)) == {"--series-1", "--series-2"}
    assert read_page(text).names.count("svg") == 1


def test_draw_small_chart_stays_small_when_lines_are_long() -> None:
    long = Line([x / 5000 for x in range(5001)], [(x % 7) / 7 for x in range(5001)])
    text = draw_small_chart([long, Line([], [])], label="long")
    (points,) = re.findall(r'points="([^"]*)"', text)
    assert len(points.split()) == 61
    assert points.startswith("0.0,")
    assert points.endswith(" 150.0,71.4 150.0,71.4")
    assert len(text) < 1500
