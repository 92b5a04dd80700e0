"""A comparison of runtimes as text for a terminal or a log."""

from __future__ import annotations

from retinaray.evaluation.difference_histogram import DifferenceHistogram
from retinaray.evaluation.parity_rows import ParityGroup, ParityResult, ParityRow
from retinaray.reporting.columns import lay_out_table

_HEAD = (
    *("verdict", "box px: p50 p99 max", "score: p50 p99 max", "changed"),
    *("AP", "differs", "ms/image", "times"),
)
_LEAST = (7, 22, 23, 7, 6, 8, 8, 5)


def render_parity(result: ParityResult) -> str:
    """A table per canvas, the reasons of what failed, and what was not run.

    Differences of boxes and scores are those before suppression; `changed` is the share of
    detections that came, went or changed their class; `times` is how much faster than torch.
    Columns that a narrow terminal has no room for follow below.
    """
    head = (
        f"{result.num_images} images, batch {result.batch}, {result.threads} "
        f"thread{'s' if result.threads > 1 else ''}, {result.machine}"
    )
    if result.num_errors:
        head += f", {result.num_errors} UNREADABLE"
    width = max([14, *(len(row.case.name) for row in result.rows)])
    lines = [head]
    for group in result.groups:
        lines += _render_group(group, width)
    for row in result.rows:
        lines += [f"FAILS  {row.case.name}: {reason}" for reason in row.reasons]
    for case in result.unrun:
        lines.append(f"{'FAILS ' if case.is_fault else 'not run'} {case.name}: {case.reason}")
    return "\n".join([*lines, *(f"note   {note}" for note in result.notes)])


def _render_group(group: ParityGroup, width: int) -> list[str]:
    height, columns = group.canvas
    reference = ("torch fp32", "-", "", "", "", _number(group.ap, ".4f"), "")
    rows = [
        (f"canvas {height}x{columns}", *_HEAD),
        (*reference, _number(group.latency_ms, ".1f"), "1"),
        *(_cells(row, group) for row in group.rows),
    ]
    return lay_out_table(rows, num_left=2, least=(width, *_LEAST))


def _cells(row: ParityRow, group: ParityGroup) -> tuple[str, ...]:
    candidates = row.candidates
    return (
        row.case.name,
        "pass" if row.has_passed else "FAILS",
        _quantiles(candidates.box_px, 6),
        _quantiles(candidates.scores, 7),
        f"{row.detections.changed_share:.2%}",
        _number(row.ap, ".4f"),
        format_ap_difference(row.ap_difference),
        _number(row.latency_ms, ".1f"),
        _number(speed_up(row, group), ".2f"),
    )


def speed_up(row: ParityRow, group: ParityGroup) -> float | None:
    """How many times faster than the reference; none = not measured."""
    if not row.latency_ms or group.latency_ms is None:
        return None
    return group.latency_ms / row.latency_ms


def format_difference(value: float) -> str:
    """Two digits of any size: 0, 3.8e-06, 0.0021, 0.41, 2.2, 15."""
    if value == 0:
        return "0"
    if value < 1e-3:
        return f"{value:.1e}"
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def format_ap_difference(value: float | None) -> str:
    """Five digits with a sign; a dash when there is none."""
    # Adding zero takes the sign from what rounds to zero.
    return "-" if value is None else f"{round(value, 5) + 0.0:+.5f}"


def _quantiles(histogram: DifferenceHistogram, width: int) -> str:
    values = (histogram.quantile(0.5), histogram.quantile(0.99), histogram.max)
    return " ".join(f"{format_difference(value):>{width}}" for value in values)


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
