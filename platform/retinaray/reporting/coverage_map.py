"""Anchor coverage as a picture: the sizes and aspects that anchors reach, and the boxes on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from retinaray.anchoring.best_iou import best_iou_of
from retinaray.anchoring.coverage import LearnableBoxes
from retinaray.detector.anchors import AnchorSpec

_MAX_POINTS = 4000
_NUM_SIDES, _NUM_RATIOS, _NUM_POSITIONS = 72, 49, 48
# Okabe and Ito's vermilion and black: apart for every kind of colour vision, also from the blues.
_MISSED, _REACHED = "#D55E00", "black"


@dataclass(frozen=True)
class CoveragePanel:
    """One setting to draw.

    Attributes:
        title: What the setting is called.
        spec: Its anchors.
        boxes: Ground truth at its input size.
    """

    title: str
    spec: AnchorSpec
    boxes: LearnableBoxes


def draw_coverage_map(panels: Sequence[CoveragePanel], target: Path | BinaryIO) -> None:
    """Draw one panel per setting: a map of the best IoU, and the boxes on it.

    The background is the best IoU that a box of this size and aspect has with any anchor, as a mean
    over its possible positions; the lines are where that mean is 0.5 and 0.4. Each point is a box
    (4000 at most, at equal steps through the set), coloured by whether it reaches 0.5 where it
    really lies.

    Args:
        panels: At least one.
        target: Where the PNG goes.
    """
    # The object interface leaves pyplot's global state and its display back end alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 6.2 * len(panels), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    sides_px, ratios = _axis_ranges([panel.boxes for panel in panels])
    for axis, panel in zip(axes, panels, strict=True):
        image = _draw_map(axis, panel, sides_px, ratios)
        _draw_boxes(axis, panel)
        _label_axis(axis, panel, sides_px, ratios)
    axes[0].set_ylabel("aspect of the box, height : width")
    figure.colorbar(
        image,
        ax=list(axes),
        label="best IoU with any anchor (mean over positions)",
        fraction=0.05,
        pad=0.01,
    )
    figure.savefig(target, dpi=110, format="png")


def _axis_ranges(
    boxes_of_panel: Sequence[LearnableBoxes],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sides and aspects of the map, rising logarithmically: all boxes and some room."""
    sides = np.concatenate([boxes.sides_px for boxes in boxes_of_panel])
    ratios = np.concatenate([boxes.ratios for boxes in boxes_of_panel])
    is_drawable = (sides > 0) & np.isfinite(ratios) & (ratios > 0)
    sides, ratios = sides[is_drawable], ratios[is_drawable]
    low, high = (float(np.clip(f(sides, initial=64), 3, 4096)) for f in (np.min, np.max))
    steepest = float(np.clip(np.max(np.abs(np.log2(ratios)), initial=2), 2, 5)) + 0.25
    return (
        np.geomspace(low / 1.25, high * 1.25, _NUM_SIDES),
        2.0 ** np.linspace(-steepest, steepest, _NUM_RATIOS),
    )


def _draw_map(
    axis: Any, panel: CoveragePanel, sides_px: NDArray[np.float64], ratios: NDArray[np.float64]
) -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    mean_iou = map_best_iou(panel.spec, panel.boxes.canvas, sides_px, ratios)
    # Without the darkest blues, on which no point shows.
    colours = LinearSegmentedColormap.from_list("", colormaps["Blues"](np.linspace(0, 0.7, 256)))
    image = axis.pcolormesh(
        sides_px, ratios, mean_iou, cmap=colours, vmin=0, vmax=0.9, shading="gouraud"
    )
    lines = axis.contour(
        sides_px,
        ratios,
        mean_iou,
        levels=[0.4, 0.5],
        colors="black",
        linestyles=["dashed", "solid"],
        linewidths=1.4,
    )
    axis.clabel(lines, fmt="IoU %.1f", fontsize=8)
    return image


def map_best_iou(
    spec: AnchorSpec,
    canvas: tuple[int, int],
    sides_px: NDArray[np.float64],
    ratios: NDArray[np.float64],
) -> Float[np.ndarray, "ratios sides"]:
    """Mean of the best IoU over evenly spread positions, for each aspect and size of a box.

    Args:
        spec: The anchors.
        canvas: Network height and width; boxes that are larger are placed round its middle.
        sides_px: Square roots of the boxes' areas in network pixels, > 0.
        ratios: Heights over widths, > 0.
    """
    height = sides_px * np.sqrt(ratios)[:, None]
    width = sides_px / np.sqrt(ratios)[:, None]
    # The anchors repeat with the largest stride, so one such square in the middle stands for all.
    # Multiples of these irrational steps fill it evenly.
    steps = np.arange(1, _NUM_POSITIONS + 1)[:, None] * np.array([0.7548776662, 0.5698402910])
    shifts = (steps % 1 - 0.5) * min(spec.strides[-1], *canvas)
    centre_x, centre_y = canvas[1] / 2 + shifts[:, 0], canvas[0] / 2 + shifts[:, 1]
    boxes_xyxy = np.stack(
        [
            centre_x - width[..., None] / 2,
            centre_y - height[..., None] / 2,
            centre_x + width[..., None] / 2,
            centre_y + height[..., None] / 2,
        ],
        axis=-1,
    )
    best_iou = best_iou_of(boxes_xyxy.reshape(-1, 4), spec, canvas)
    return np.asarray(best_iou.reshape(*height.shape, _NUM_POSITIONS).mean(axis=-1))


def _draw_boxes(axis: Any, panel: CoveragePanel) -> None:
    boxes = panel.boxes
    is_reached = best_iou_of(boxes.boxes_xyxy, panel.spec, boxes.canvas) >= 0.5
    shown = np.zeros(len(boxes), np.bool_)
    shown[:: max(1, -(-len(boxes) // _MAX_POINTS))] = True
    for name, colour, is_member, size, alpha in (
        ("reach IoU 0.5", _REACHED, is_reached, 7, 0.4),
        ("do not", _MISSED, ~is_reached, 12, 0.7),
    ):
        rows = shown & is_member
        axis.scatter(
            boxes.sides_px[rows],
            boxes.ratios[rows],
            s=size,
            color=colour,
            alpha=alpha,
            linewidths=0,
            label=f"{np.count_nonzero(is_member):,} boxes {name}",
        )


def _label_axis(
    axis: Any, panel: CoveragePanel, sides_px: NDArray[np.float64], ratios: NDArray[np.float64]
) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xlim(sides_px[0], sides_px[-1])
    axis.set_ylim(ratios[0], ratios[-1])
    axis.xaxis.set_major_locator(FixedLocator([2.0**power for power in range(1, 13)]))
    axis.yaxis.set_major_locator(FixedLocator([2.0**power for power in range(-5, 6)]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _as_ratio(value)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_locator(NullLocator())
    canvas_height, canvas_width = panel.boxes.canvas
    axis.set_xlabel(f"side of the box in pixels of the {canvas_width} x {canvas_height} input")
    spec = panel.spec
    first, last = (stride.bit_length() - 1 for stride in (spec.strides[0], spec.strides[-1]))
    scales, ratios_text = (
        " ".join(f"{value:.3g}" for value in values) for values in (spec.scales, spec.ratios)
    )
    axis.set_title(
        f"{panel.title}\nscales {scales}   ratios {ratios_text}   levels P{first}-P{last}",
        fontsize=10,
    )
    legend = axis.legend(loc="upper right", fontsize=8, framealpha=0.9, markerscale=2)
    for handle in legend.legend_handles:
        handle.set_alpha(1)


def _as_ratio(ratio: float) -> str:
    return f"{ratio:g}:1" if ratio >= 1 else f"1:{1 / ratio:g}"
