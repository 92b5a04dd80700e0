"""COCO scores as text for a terminal or a log."""

from __future__ import annotations

from retinaray.evaluation.coco_map import ClassScores, CocoScores

_COLUMNS = ("AP", "AP50", "AP_small", "AP_medium", "AP_large", "AR_100")


def render_scores(scores: CocoScores) -> str:
    """The twelve numbers in two lines, then a line per class; `absent` without ground truth."""
    summary = scores.summary
    lines = [
        "  ".join(f"{name} {_format(summary[name])}" for name in list(summary)[:6]),
        "  ".join(f"{name} {_format(summary[name])}" for name in list(summary)[6:]),
    ]
    width = max([5, *(len(entry.name) for entry in scores.classes)])
    head = "  ".join(f"{name:>9}" for name in _COLUMNS)
    lines.append(f"{'class':<{width}}  {'boxes':>7}  {head}")
    lines += [_render_class(entry, width) for entry in scores.classes]
    return "\n".join(lines)


def _render_class(entry: ClassScores, width: int) -> str:
    if entry.num_ground_truth == 0:
        return f"{entry.name:<{width}}  {0:>7}  absent from the ground truth"
    values = "  ".join(f"{_format(getattr(entry, name)):>9}" for name in _COLUMNS)
    return f"{entry.name:<{width}}  {entry.num_ground_truth:>7}  {values}"


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
