"""Operating points as text for a terminal or a log."""

from __future__ import annotations

from collections.abc import Sequence

from retinaray.evaluation.operating_points import OperatingPoint

_HEADS = ("threshold", "precision", "recall", "F1", "FP/image")


def render_points(points: Sequence[OperatingPoint]) -> str:
    """A line per class under a head: threshold, precision, recall, F1, false positives per image.

    Classes whose rule is not met end with the reason.
    """
    width = max([5, *(len(point.name) for point in points)])
    head = f"{'class':<{width}}  {'boxes':>7}  " + "  ".join(f"{name:>9}" for name in _HEADS)
    return "\n".join([head, *(_render_point(point, width) for point in points)])


def _render_point(point: OperatingPoint, width: int) -> str:
    values = (point.precision, point.recall, point.f1, point.false_positives_per_image)
    columns = [f"{point.threshold:>9.4f}", *(f"{_format(value):>9}" for value in values)]
    line = f"{point.name:<{width}}  {point.num_ground_truth:>7}  {'  '.join(columns)}"
    return f"{line}  {point.note}" if point.note else line


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
