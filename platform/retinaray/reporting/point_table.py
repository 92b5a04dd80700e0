"""Operating points as text for a terminal or a log."""

from __future__ import annotations

from collections.abc import Sequence

from retinaray.evaluation.operating_points import OperatingPoint
from retinaray.reporting.columns import lay_out_table

_HEADS = ("threshold", "precision", "recall", "F1", "FP/image")
_LEAST = (5, 7, *[9] * len(_HEADS))


def render_points(points: Sequence[OperatingPoint]) -> str:
    """A line per class under a head: threshold, precision, recall, F1, false positives per image.

    Classes whose rule is not met end with the reason. Columns that a narrow terminal has no room
    for follow below.
    """
    rows = [("class", "boxes", *_HEADS), *map(_cells, points)]
    tails = {number: point.note for number, point in enumerate(points, start=1)}
    return "\n".join(lay_out_table(rows, least=_LEAST, tails=tails))


def _cells(point: OperatingPoint) -> tuple[str, ...]:
    values = (point.precision, point.recall, point.f1, point.false_positives_per_image)
    shown = (_format(value) for value in values)
    return (point.name, str(point.num_ground_truth), f"{point.threshold:.4f}", *shown)


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
