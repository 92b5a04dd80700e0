"""The parity page and its parts: nothing from elsewhere, every number in its place."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from retinaray.evaluation.difference_histogram import DifferenceHistogram
from retinaray.evaluation.parity_rows import (
    DifferenceTally,
    ParityCase,
    ParityGroup,
    ParityResult,
    ParityRow,
    ParityTolerance,
    UnrunCase,
)
from retinaray.reporting.parity_charts import common_decades, draw_bars, draw_histogram
from retinaray.reporting.parity_page import ParityPicture, render_page
from retinaray.reporting.parity_table import (
    format_ap_difference,
    format_difference,
    render_parity,
)

VOID = {"meta", "img", "br"}


class Structure(HTMLParser):
    """Checks that elements close in order; gathers text, attributes and names."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def count(*values: float) -> DifferenceHistogram:
    histogram = DifferenceHistogram()
    histogram.add(np.array(values))
    return histogram


def tally(values: tuple[float, float], num: int, *changes: int) -> DifferenceTally:
    """Box and score differences of one pair; then how many are missing, extra and flipped."""
    made = DifferenceTally()
    made.num_reference = num
    made.num_missing, made.num_extra, made.num_flips = changes or (0, 0, 0)
    made.box_px.add(np.array([0.0, values[0]]))
    made.scores.add(np.array([values[1]]))
    return made


@pytest.fixture
def parity_result() -> ParityResult:
    """Two rows, the second failing; one runtime refused a file, one is absent."""
    exact = ParityRow(
        case=ParityCase("m.onnx onnxruntime fp32", "m.onnx", "onnxruntime", "fp32"),
        num_images=30,
        candidates=tally((2.3e-4, 1e-6), 9000),
        detections=tally((2.3e-4, 1e-6), 1200),
        ap=0.5,
        ap_reference=0.5,
        latency_ms=50.0,
    )
    rough = replace(
        exact,
        case=ParityCase("m.onnx openvino bf16", "m.onnx", "openvino", "bf16"),
        candidates=tally((0.4, 0.01), 9000),
        detections=tally((5.0, 0.01), 1200, 2, 1, 1),
        ap=0.49,
        latency_ms=25.0,
        reasons=("AP differs by 0.0100 (tolerance 0.005)",),
    )
    return ParityResult(
        model="models/<m>.pth",
        groups=(ParityGroup((64, 96), 100.0, 0.5, (exact, rough)),),
        unrun=(
            UnrunCase("m.onnx tensorrt tf32", "no GPU here"),
            UnrunCase("m.plan tensorrt fp16", "refused by TensorRT", is_fault=True),
        ),
        notes=("m.onnx holds nms_iou=0.4",),
        tolerance=ParityTolerance(),
        num_images=30,
        num_errors=1,
        batch=2,
        threads=4,
        machine="a machine",
    )


PICTURES = [ParityPicture("m.onnx openvino bf16", "a&b.jpg", "1 missing", b"jpeg bytes")]


def test_render_page_needs_nothing_from_elsewhere(parity_result: ParityResult) -> None:
    page = render_page(parity_result, PICTURES)
    structure = Structure(page)
    assert structure.open == []
    # data: pictures only, no scripts, style sheets, fonts or addresses.
    assert structure.links == ["data:image/jpeg;base64,anBlZyBieXRlcw=="]
    assert not {"script", "link", "iframe", "object"} & set(structure.names)
    assert not re.search(r"https?:|url\(|@import", page)
    assert structure.names.count("svg") == 2 * len(parity_result.rows)


def test_render_page_follows_light_and_dark_and_narrow_screens(
    parity_result: ParityResult,
) -> None:
    page = render_page(parity_result, [])
    assert "prefers-color-scheme: dark" in page
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "@media (max-width: 860px)" in page
    # Each colour of the light palette has a dark one, or is meant for both.
    light, dark = (
        set(re.findall(r"(--[\w-]+):", block))
        for block in re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    )
    assert light - dark == {"--reference", "--candidate"}
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    assert used == light


def test_render_page_shows_verdicts_numbers_limits_and_reasons(
    parity_result: ParityResult,
) -> None:
    text = Structure(render_page(parity_result, PICTURES)).text
    for part in (
        "Parity of models/<m>.pth",
        "2 of 3 cases fail",
        "30 images",
        "1 unreadable",
        "batch 2",
        "4 threads",
        "Canvas 64 × 96",
        "m.onnx openvino bf16 judged as bf16",
        "AP differs by 0.0100 (tolerance 0.005)",
        "0.4900",
        "-0.01000 limit ±0.005",
        "25.0 ms",
        "4.00 × torch",
        "limit 0.05",
        "0.33% limit 3.0%2 missing, 1 extra, 1 other class of 1,200",
        "m.plan tensorrt fp16: refused by TensorRT",
        "m.onnx tensorrt tf32: no GPU here",
        "m.onnx holds nms_iou=0.4",
        "a&b.jpg1 missing",
        "No visible difference: m.onnx onnxruntime fp32.",
    ):
        assert part in text, part


def test_render_page_says_when_all_pass(parity_result: ParityResult) -> None:
    rows = tuple(replace(row, reasons=()) for row in parity_result.groups[0].rows)
    groups = (replace(parity_result.groups[0], rows=rows),)
    clean = replace(parity_result, groups=groups, unrun=(), notes=(), num_errors=0, threads=1)
    page = render_page(clean, [])
    text = Structure(page).text
    assert "All 2 cases pass" in text
    assert "1 thread\n" in re.sub(r"1 thread(?!s)", "1 thread\n", text)
    for absent in ("Not run here", "Refused", "Notes", "Where detections differ", "unreadable"):
        assert absent not in text
    assert '<span class="verdict fail">' not in page


def test_render_page_leaves_out_what_was_not_measured(parity_result: ParityResult) -> None:
    row = replace(parity_result.rows[0], ap=None, ap_reference=None, latency_ms=None)
    group = replace(parity_result.groups[0], rows=(row,), ap=None, latency_ms=None)
    text = Structure(render_page(replace(parity_result, groups=(group,)), [])).text
    assert "Time per image" in text  # the column
    assert "Median over interleaved rounds" not in text
    assert "± " not in text


def test_render_page_without_rows_still_lists_what_was_refused(
    parity_result: ParityResult,
) -> None:
    refused = replace(parity_result, groups=(), unrun=(UnrunCase("x", "bad", is_fault=True),))
    text = Structure(render_page(refused, [])).text
    assert "1 of 1 cases fail" in text
    assert "How far boxes" not in text


def test_render_parity_is_a_table_with_reasons(parity_result: ParityResult) -> None:
    lines = render_parity(parity_result).splitlines()
    assert lines[0] == "30 images, batch 2, 4 threads, a machine, 1 UNREADABLE"
    assert lines[1].startswith("canvas 64x96 ")
    assert re.fullmatch(r"torch fp32 +- +0\.5000 +100\.0 +1", lines[2])
    assert lines[3].split() == [
        *("m.onnx", "onnxruntime", "fp32", "pass"),
        *("0", "2.3e-04", "2.3e-04", "1.0e-06", "1.0e-06", "1.0e-06"),
        *("0.00%", "0.5000", "+0.00000", "50.0", "2.00"),
    ]
    assert lines[4].split() == [
        *("m.onnx", "openvino", "bf16", "FAILS"),
        *("0", "0.4", "0.4", "0.01", "0.01", "0.01"),
        *("0.33%", "0.4900", "-0.01000", "25.0", "4.00"),
    ]
    # Columns stand below each other.
    assert len({len(line) for line in lines[1:5]}) == 1
    assert lines[5:] == [
        "FAILS  m.onnx openvino bf16: AP differs by 0.0100 (tolerance 0.005)",
        "not run m.onnx tensorrt tf32: no GPU here",
        "FAILS  m.plan tensorrt fp16: refused by TensorRT",
        "note   m.onnx holds nms_iou=0.4",
    ]


def test_render_parity_shows_a_dash_for_what_was_not_measured(
    parity_result: ParityResult,
) -> None:
    row = replace(parity_result.rows[0], ap=None, ap_reference=None, latency_ms=None)
    group = replace(parity_result.groups[0], rows=(row,), ap=None, latency_ms=None)
    lines = render_parity(replace(parity_result, groups=(group,), threads=1)).splitlines()
    assert "1 thread, a machine" in lines[0]
    assert lines[3].split()[-4:] == ["-", "-", "-", "-"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (3.84e-6, "3.8e-06"), (0.00213, "0.0021"), (0.4149, "0.41"), (15.2, "15"),
     (123.4, "123")],
)  # fmt: skip
def test_format_difference_gives_two_digits_of_any_size(value: float, text: str) -> None:
    assert format_difference(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (-1e-7, "+0.00000"), (-0.00198, "-0.00198"), (0.1, "+0.10000")]
)
def test_format_ap_difference_has_a_sign_unless_it_is_zero(value: float | None, text: str) -> None:
    assert format_ap_difference(value) == text


def test_common_decades_hold_all_bars() -> None:
    assert common_decades([count(0.002), count(30), count(0)]) == (-3, 2)
    assert common_decades([count(), count(0)]) == (-6, 0)
    # A single bin still has an axis of at least a decade.
    first, last = common_decades([count(0.5)])
    assert last > first


def read_bars(svg: str) -> list[tuple[float, float, float]]:
    """Left, width and height of each bar."""
    pattern = r'<rect class="bar" x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="([\d.]+)"'
    return [tuple(map(float, found)) for found in re.findall(pattern, svg)]  # type: ignore[misc]


def test_draw_histogram_has_bars_in_proportion_on_the_axis() -> None:
    svg = draw_histogram(
        count(0.02, 0.02, 0.02, 5), title="Box, px", unit="px", decades=(-2, 2), limit=0.1
    )
    bars = [bar for bar in read_bars(svg) if bar[2] > 0]
    assert len(bars) == 2
    assert bars[0][2] == pytest.approx(3 * bars[1][2], rel=0.01)
    # Four decades on 252 units: 0.01 at the left end, 3.16 (the start of the bin of 5) at 5/8.
    assert bars[0][0] == pytest.approx(2.5)
    assert bars[1][0] == pytest.approx(2 + 252 * 5 / 8 + 0.5, abs=0.1)
    assert 'class="limit" x1="65.0"' in svg  # 0.1 is a quarter of the way
    assert "<title>3 of 4: 0.01 to 0.032 px</title>" in svg
    assert 'aria-label="Box, px: median 0.02, largest 5 px"' in svg


@pytest.mark.parametrize("limit", [None, 0.001, 500.0])
def test_draw_histogram_marks_no_limit_beyond_the_axis(limit: float | None) -> None:
    svg = draw_histogram(count(0.02), title="Box", unit="", decades=(-2, 2), limit=limit)
    assert 'class="limit"' not in svg


def test_draw_histogram_of_nothing_is_an_axis() -> None:
    svg = draw_histogram(count(), title="Box", unit="px", decades=(-6, 0))
    assert read_bars(svg) == []
    assert svg.count('class="tick"') == 7
    Structure(svg)


def test_draw_bars_have_lengths_in_proportion() -> None:
    bars = draw_bars([("torch <1>", 200.0, "200 ms", True), ("other", 50.0, "50 ms", False)])
    assert re.findall(r'class="(bar[ \w]*)" style="width:([\d.]+)%"', bars) == [
        ("bar reference", "100.0"),
        ("bar", "25.0"),
    ]
    assert "torch &lt;1&gt;" in bars
    assert Structure(bars).open == []
    assert draw_bars([]) == '<ul class="bars"></ul>'


def test_render_page_escapes_names(parity_result: ParityResult) -> None:
    evil = ParityPicture('<script>"x"', "<b>", "<i>", b"")
    page = render_page(parity_result, [evil])
    assert "<script" not in page
    assert "&lt;script&gt;" in page
