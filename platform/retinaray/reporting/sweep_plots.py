"""Pictures of a sweep: what every trial tried beside what it scored, and accuracy against time.

It knows nothing of Ray or of settings: a trial is a mapping with `trial` (text), `status` (`done`,
`stopped` or `failed`), `score` (number or None), `metrics` (mapping; `AP` and `latency_ms` are
read) and `point` (mapping of key to number, text, list or None).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retinaray.reporting.value_axis import (
    is_number,
    list_ticks,
    make_axis,
    place_apart,
    show_value,
)

Trial = Mapping[str, Any]

_DPI = 110
_AXIS_WIDTH_IN = 1.75
_LOG_FROM_FACTOR = 10.0
_LABEL_LETTERS = 17
_LETTERS_PER_IN = 13
_MAX_NAMED = 6
_MAX_LABELLED = 30
_BEST_COLOUR = "crimson"
# The end of viridis is too light for lines on white.
_LIGHTEST = 0.93
_MARKERS = {"done": "o", "stopped": "D", "failed": "X"}


def draw_parallel_coordinates(trials: Sequence[Trial], path: Path) -> None:
    """One line per trial through an axis per searched key, the score last, as a PNG.

    Lines are coloured by score; the best is thick and on top, stopped trials are dashed, failed
    ones and those without a score are named below the axes.

    Args:
        trials: What was tried; when all failed or none has a score, nothing is drawn.
        path: File to write.
    """
    from matplotlib import colormaps, patheffects

    drawn = [t for t in trials if t["status"] != "failed" and is_number(t["score"])]
    # Of equal scores the first is the best, hence the last to be drawn.
    drawn = sorted(reversed(drawn), key=lambda trial: float(trial["score"]))
    if not drawn:
        return
    keys = list(dict.fromkeys(key for trial in drawn for key in trial["point"]))
    columns = [[trial["point"].get(key) for trial in drawn] for key in keys]
    columns.append([float(trial["score"]) for trial in drawn])
    axes = [make_axis(column) for column in columns[:-1]]
    axes.append(make_axis(columns[-1], is_score=True))
    heights = [place_apart(axis, column) for axis, column in zip(axes, columns, strict=True)]
    width_in = max(7.0, _AXIS_WIDTH_IN * (len(axes) + 0.5))
    figure = _make_figure(width_in, 5.6)
    plot = figure.subplots()
    for position, (name, axis, column) in enumerate(
        zip([*keys, "score"], axes, columns, strict=True)
    ):
        _draw_axis(plot, position, name, list_ticks(axis, column))
    _draw_colours_of_axis(plot, len(axes) - 1, is_single=axes[-1].low == axes[-1].high)
    for index, trial in enumerate(drawn):
        is_best = index == len(drawn) - 1
        (line,) = plot.plot(
            range(len(axes)),
            [column[index] for column in heights],
            color=colormaps["viridis"](_LIGHTEST * heights[-1][index]),
            linewidth=3.0 if is_best else 1.3,
            linestyle="--" if trial["status"] == "stopped" else "-",
            alpha=1.0 if is_best else 0.8,
            zorder=2 + index / len(drawn),
        )
        if is_best:
            outline = patheffects.withStroke(linewidth=5.0, foreground="black")
            line.set_path_effects([outline])
    plot.set_title(
        f"best: trial {drawn[-1]['trial']}, score {show_value(columns[-1][-1])}", fontsize=11
    )
    caption = _make_caption(trials, drawn, {"stopped": "dashed"}, width_in=width_in)
    figure.supxlabel(caption, fontsize=8.5)
    figure.savefig(path)


def _draw_axis(plot: Any, position: int, name: str, ticks: list[tuple[float, str]]) -> None:
    """A vertical line with its name above and its values on the right."""
    plot.plot([position, position], [0, 1], color="0.35", linewidth=1.0, zorder=1)
    section, dot, last = name.rpartition(".")
    header = f"{section}{dot}\n{last}" if section else name
    plot.text(position, 1.035, header, ha="center", va="bottom", fontsize=9, fontweight="bold")
    for height, text in ticks:
        plot.plot([position - 0.02, position + 0.02], [height, height], color="0.35", zorder=1)
        plot.text(
            position + 0.045,
            height,
            "\n".join(_wrap_name(text)),
            va="center",
            fontsize=8,
            zorder=5,
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.8},
        )


def _wrap_name(text: str) -> list[str]:
    """Lines of a name; paths are broken behind their slashes."""
    lines = textwrap.wrap(text.replace("/", "/ "), _LABEL_LETTERS)
    return [line.replace("/ ", "/") for line in lines]


def _draw_colours_of_axis(plot: Any, position: int, *, is_single: bool) -> None:
    """The colours of the scores along their axis, and the frame of the whole."""
    if not is_single:
        gradient = [[_LIGHTEST * index / 255] for index in range(256)]
        plot.imshow(
            gradient,
            extent=(position - 0.025, position + 0.025, 0, 1),
            origin="lower",
            cmap="viridis",
            vmin=0,
            vmax=1,
            zorder=1.5,
        )
    plot.set_aspect("auto")
    plot.set_xlim(-0.35, position + 0.55)
    plot.set_ylim(-0.03, 1.16)
    plot.set_axis_off()


def draw_pareto(trials: Sequence[Trial], path: Path) -> None:
    """AP of each trial against the time of one image, with the front of the best, as a PNG.

    A trial is on the front when no other is at least as accurate and as fast, and better in one.

    Args:
        trials: What was tried; without any AP nothing is drawn. Trials without a latency are
            counted below; when none has one, all stand in one column.
        path: File to write.
    """
    scored = [trial for trial in trials if is_number(trial["metrics"].get("AP"))]
    timed = [trial for trial in scored if is_number(trial["metrics"].get("latency_ms"))]
    drawn = timed or scored
    if not drawn:
        return
    points = [
        (float(trial["metrics"]["latency_ms"]) if timed else 0.0, float(trial["metrics"]["AP"]))
        for trial in drawn
    ]
    front = find_front(points)
    figure = _make_figure(8.0, 5.6)
    plot = figure.subplots()
    for status, marker in _MARKERS.items():
        members = [
            point for point, trial in zip(points, drawn, strict=True) if trial["status"] == status
        ]
        if members:
            xs, ys = zip(*members, strict=True)
            plot.scatter(xs, ys, s=30, marker=marker, color="tab:blue", alpha=0.65, label=status)
    plot.plot(
        *zip(*(points[index] for index in front), strict=True),
        color=_BEST_COLOUR,
        marker="o",
        markersize=10,
        markerfacecolor="none",
        drawstyle="steps-post",
        label="best for its time" if timed else "best",
    )
    times = [time for time, _ in points]
    _arrange_pareto(plot, times if timed else [])
    labels = _shorten([str(trial["trial"]) for trial in drawn])
    figure.supxlabel(_make_caption(trials, drawn, {}, width_in=8.0), fontsize=8.5)
    _label_points(figure, plot, labels, points, front)
    figure.savefig(path)


def _arrange_pareto(plot: Any, times: Sequence[float]) -> None:
    """Scales, names and legend; no times when none was measured."""
    from matplotlib.ticker import LogLocator, NullFormatter

    plot.set_ylabel("validation AP")
    plot.margins(0.12, 0.12)
    plot.grid(alpha=0.3)
    if times:
        plot.set_xlabel("time of one image on the training device (ms)")
        if 0 < min(times) < max(times) / _LOG_FROM_FACTOR:
            plot.set_xscale("log")
            plot.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            plot.xaxis.set_major_formatter("{x:g}")
            plot.xaxis.set_minor_formatter(NullFormatter())
    else:
        plot.set_xlim(-1, 1)
        plot.set_xticks([])
        plot.set_xlabel("no time was measured")
    plot.legend(loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=4, fontsize=9, frameon=False)


def find_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other beats.

    Args:
        points: Pairs of a cost, better when low, and a gain, better when high.

    Returns:
        Indices by rising cost, hence by rising gain; of equal points the first only.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def _label_points(
    figure: Any,
    plot: Any,
    labels: Sequence[str],
    points: Sequence[tuple[float, float]],
    front: Sequence[int],
) -> None:
    """Names beside points, the front's first, as long as there is room for them."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    frame = plot.get_window_extent(renderer)
    centres = [tuple(centre) for centre in plot.transData.transform(points)]
    others = sorted(set(range(len(points))) - set(front), key=lambda index: -points[index][1])
    taken: list[Any] = []
    for index in [*front, *others][:_MAX_LABELLED]:
        is_front = index in front
        text = plot.annotate(
            labels[index],
            points[index],
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8.5 if is_front else 7.5,
            color=_BEST_COLOUR if is_front else "0.25",
            fontweight="bold" if is_front else "normal",
        )
        text.set_in_layout(False)
        for side, rise in ((1, 1), (-1, 1), (1, -1), (-1, -1)):
            text.set_position((7 * side, 5 * rise))
            text.set_horizontalalignment("left" if side > 0 else "right")
            text.set_verticalalignment("bottom" if rise > 0 else "top")
            box = text.get_window_extent(renderer)
            is_inside = frame.x0 < box.x0 and box.x1 < frame.x1
            is_inside = is_inside and frame.y0 < box.y0 and box.y1 < frame.y1
            is_free = not any(box.overlaps(other) for other in taken)
            if is_inside and is_free and not any(box.contains(*centre) for centre in centres):
                taken.append(box)
                break
        else:
            text.remove()


def _shorten(names: Sequence[str]) -> list[str]:
    """Names without the part up to an underscore that all share."""
    prefix = names[0][: names[0].rfind("_") + 1]
    if len(set(names)) > 1 and all(name.startswith(prefix) for name in names):
        return [name.removeprefix(prefix) for name in names]
    return list(names)


def _make_caption(
    trials: Sequence[Trial],
    drawn: Sequence[Trial],
    look_of: Mapping[str, str],
    *,
    width_in: float,
) -> str:
    """How many trials ended how, and the names of those that are not drawn."""
    counts = []
    for status in _MARKERS:
        count = sum(trial["status"] == status for trial in trials)
        look = f" ({look_of[status]})" if status in look_of else ""
        if count:
            counts.append(f"{count} {status}{look}")
    is_drawn = {id(trial) for trial in drawn}
    missing = [str(trial["trial"]) for trial in trials if id(trial) not in is_drawn]
    text = f"{len(trials)} trial{'s' if len(trials) != 1 else ''}: {', '.join(counts)}"
    if missing:
        rest = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
        text += f"; not drawn: {', '.join(missing[:_MAX_NAMED])}{rest}"
    return "\n".join(textwrap.wrap(text, int(_LETTERS_PER_IN * width_in)))


def _make_figure(width_in: float, height_in: float) -> Any:
    # The object interface leaves pyplot's global state and its display back end alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
