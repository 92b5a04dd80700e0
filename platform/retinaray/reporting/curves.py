"""Curves of a training as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_training_curves(events: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Losses, validation AP and learning rate over epochs, as a PNG.

    Args:
        events: As `training_log.read_events` gives them; without progress nothing is drawn.
        path: File to write.
    """
    # The object interface leaves pyplot's global state and its display back end alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    progress = [event for event in events if event["kind"] == "progress"]
    validations = [event for event in events if event["kind"] == "validation"]
    if not progress:
        return
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    epochs = [event["epoch"] for event in progress]
    # A line through one point shows nothing.
    marker = "." if len(progress) == 1 else ""
    lines = [
        losses.plot(epochs, smooth([e[key] for e in progress]), marker=marker, label=label)[0]
        for key, label in (("class_loss", "class loss"), ("box_loss", "box loss"))
    ]
    losses.set_ylabel("loss per foreground anchor")
    losses.set_ylim(bottom=0)
    losses.grid(alpha=0.3)
    scored = [event for event in validations if event.get("AP") is not None]
    if scored:
        scores = losses.twinx()
        scored_epochs = [event["epoch"] for event in scored]
        for name, colour in (("AP", "tab:green"), ("AP50", "tab:olive")):
            lines += scores.plot(
                scored_epochs,
                [event[name] for event in scored],
                marker=".",
                color=colour,
                label=f"validation {name}",
            )
        scores.set_ylabel("validation AP")
        scores.set_ylim(0, 1)
    losses.legend(handles=lines, loc="upper center", ncols=4, bbox_to_anchor=(0.5, 1.12))
    learning_rates = [event["learning_rate"] for event in progress]
    rates.plot(epochs, learning_rates, marker=marker, color="tab:grey")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("epoch")
    rates.set_ylim(bottom=0)
    rates.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def smooth(values: Sequence[float], weight: float = 0.7) -> list[float]:
    """Exponential average without the bias of its start; values that are not finite are gaps."""
    smoothed = []
    total = norm = 0.0
    for value in values:
        if not math.isfinite(value):
            smoothed.append(math.nan)
            continue
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        smoothed.append(total / norm)
    return smoothed
