"""Anchor coverage as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from retinaray.anchoring.coverage import CoverageReport, CoverageRow, poorly_covered
from retinaray.anchoring.fitting import AnchorFit
from retinaray.reporting.columns import lay_out_table

_MAX_CLASSES = 30
_HEAD = ("", "boxes", "IoU>=0.5 %", "IoU>=0.4 %", "mean IoU", "only by best anchor")


def render_coverage(report: CoverageReport) -> str:
    """A row for all boxes, each class, size and aspect.

    Of more than 30 classes those are listed that miss most boxes.
    """
    rows = [_HEAD, _cells("all", report.all)]
    by_class = dict(
        sorted(report.by_class.items(), key=lambda item: item[1].num_iou_50 - item[1].count)
        if len(report.by_class) > _MAX_CLASSES
        else report.by_class.items()
    )
    for title, group in (
        ("class", by_class),
        ("size (COCO, original pixels)", report.by_size),
        ("height:width", report.by_ratio),
    ):
        shown = list(group.items())[:_MAX_CLASSES]
        rows.append((title, *[""] * (len(_HEAD) - 1)))
        rows += [_cells(f"  {name}", row) for name, row in shown]
        if len(group) > len(shown):
            rows.append((f"  {len(group) - len(shown)} more", *[""] * (len(_HEAD) - 1)))
    return "\n".join(lay_out_table(rows))


def _cells(name: str, row: CoverageRow) -> tuple[str, ...]:
    if row.mean_best_iou is None:
        return (name, "0", "-", "-", "-", "-")
    return (
        name,
        f"{row.count:,}",
        f"{100 * row.num_iou_50 / row.count:.1f}",
        f"{100 * row.num_iou_40 / row.count:.1f}",
        f"{row.mean_best_iou:.3f}",
        f"{row.num_only_by_best_anchor:,}",
    )


def render_warnings(report: CoverageReport, *, num_unmatched: int | None) -> list[str]:
    """What a person has to know before training; empty when nearly all boxes are reached.

    Args:
        report: What was measured.
        num_unmatched: As `count_unmatched` gives it; None = not counted.
    """
    lines = []
    missed = poorly_covered(report)
    if missed:
        listed = ", ".join(f"{count:,} of {total:,} {name}" for name, total, count in missed[:5])
        more = f" and {len(missed) - 5} more classes" if len(missed) > 5 else ""
        lines.append(
            f"warning: no anchor reaches IoU 0.5 with {listed}{more}: they are learnt only through "
            "the best-anchor rule, if at all; other scales, a lower level or a larger input reach "
            "them (--fit proposes)"
        )
    if num_unmatched:
        lines.append(
            f"warning: {num_unmatched:,} boxes have no anchor of their own even with the "
            "best-anchor rule, because a box beside them takes it: training cannot see them"
        )
    return lines


def render_fit(fit: AnchorFit, head_gflops: Sequence[float]) -> str:
    """A row per setting, with its gain over the default in points of coverage at IoU 0.5.

    Args:
        fit: The settings.
        head_gflops: Cost of both heads per image, by candidate.
    """
    head = (
        "setting", "scales", "ratios", "levels", "input", "anchors", "head GFLOPs", "IoU>=0.5 %",
        "gain",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    marks = []
    for candidate, gflops in zip(fit.candidates, head_gflops, strict=True):
        notes = [
            text
            for text, marked in (
                ("<- chosen", fit.chosen),
                ("<- chosen at this size", fit.chosen_at_size),
            )
            if candidate is marked
        ]
        height, width = candidate.size.canvas
        gain = 100 * (candidate.share_iou_50 - fit.default.share_iou_50)
        rows.append(
            (
                candidate.name,
                " ".join(f"{scale:.3g}" for scale in candidate.scales),
                " ".join(f"{ratio:.3g}" for ratio in candidate.ratios),
                candidate.levels,
                f"{height}x{width}",
                f"{candidate.report.anchors_per_image:,}",
                f"{gflops:.1f}",
                f"{100 * candidate.share_iou_50:.1f}",
                f"{gain:+.1f}",
            )
        )
        marks.append(" ".join(notes[:1]))
    tails = {number: mark for number, mark in enumerate(marks, start=1) if mark}
    return "\n".join(lay_out_table(rows, num_left=5, tails=tails))
