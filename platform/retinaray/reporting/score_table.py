"""COCO scores as text for a terminal or a log."""

from __future__ import annotations

from retinaray.evaluation.coco_map import ClassScores, CocoScores
from retinaray.reporting.columns import join_pieces, lay_out_table

_COLUMNS = ("AP", "AP50", "AP_small", "AP_medium", "AP_large", "AR_100")
_LEAST = (5, 7, *[9] * len(_COLUMNS))


def render_scores(scores: CocoScores) -> str:
    """The twelve numbers in two lines, then a line per class; `absent` without ground truth.

    Columns that a narrow terminal has no room for follow below.
    """
    summary = [f"{name} {_format(value)}" for name, value in scores.summary.items()]
    lines = [*join_pieces(summary[:6]), *join_pieces(summary[6:])]
    rows = [("class", "boxes", *_COLUMNS), *map(_cells, scores.classes)]
    tails = {
        number: "absent from the ground truth"
        for number, entry in enumerate(scores.classes, start=1)
        if entry.num_ground_truth == 0
    }
    return "\n".join([*lines, *lay_out_table(rows, least=_LEAST, tails=tails)])


def _cells(entry: ClassScores) -> tuple[str, ...]:
    if entry.num_ground_truth == 0:
        return (entry.name, "0")
    values = (_format(getattr(entry, name)) for name in _COLUMNS)
    return (entry.name, str(entry.num_ground_truth), *values)


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
