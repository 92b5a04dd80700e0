"""Pictures of a sweep, by their pixels and by the texts and lines that matplotlib drew."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from retinaray.reporting.sweep_plots import draw_parallel_coordinates, draw_pareto, find_front

CRIMSON = (220, 20, 60)


def make_trial(number: int, score: float | None, *, status: str = "done", **point: Any) -> Any:
    """A trial whose AP is its score and whose latency is 10 ms more than its number."""
    metrics = {} if score is None else {"AP": score, "latency_ms": 10.0 + number}
    values = point or {"anchors.base_scale": 2.0 + number, "optim.peak_lr": 10.0**-number}
    return {
        "trial": f"ab12_{number:05d}",
        "status": status,
        "score": score,
        "metrics": metrics,
        "point": values,
    }


def make_sweep(count: int) -> list[Any]:
    """Trials of every kind of key and every end, the same for the same count."""
    draw = random.Random(count)
    return [
        make_trial(
            number,
            None if status == "failed" else draw.uniform(0.1, 0.4),
            status=status,
            **{
                "anchors.base_scale": draw.uniform(1.5, 4),
                "anchors.num_scales": draw.choice([2, 3]),
                "anchors.ratios": draw.choice([[1.0, 2.0, 0.5], [1.0, 3.0, 1 / 3, 2.0, 0.5]]),
                "optim.peak_lr": 10 ** draw.uniform(-4, -2),
                "model.backbone_weights": draw.choice([None, "/mnt/shared/some/where/body.pth"]),
            },
        )
        for number in range(count)
        for status in [draw.choice(["done", "done", "stopped", "failed"]) if number else "done"]
    ]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved, for a look at what is in it."""
    saved: list[Figure] = []
    save, draw = Figure.savefig, Text.draw

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        saved.append(figure)
        vars(figure)["drawn_texts"] = []
        save(figure, *arguments, **options)

    def note(text: Text, renderer: Any) -> None:
        drawn = vars(text.get_figure(root=True)).get("drawn_texts")
        is_seen = text.get_visible() and text.get_text()
        if drawn is not None and is_seen and text not in drawn:
            drawn.append(text)
        draw(text, renderer)

    monkeypatch.setattr(Figure, "savefig", keep)
    monkeypatch.setattr(Text, "draw", note)
    return saved


def texts_of(figure: Figure) -> list[Text]:
    """All texts that are seen; tick labels outside the limits are not."""
    return list(vars(figure)["drawn_texts"])


def words_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in texts_of(figure)]


def lines_of(axes: Axes) -> list[Any]:
    """The lines of trials: they have a point on every axis."""
    return [line for line in axes.lines if list(line.get_xdata())[:2] == [0, 1]]


def count_colour(path: Path, colour: tuple[int, int, int]) -> int:
    """Pixels of about that colour."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(pixels - colour).max(axis=-1) < 25).sum())


def assert_texts_are_whole_and_apart(figure: Figure) -> None:
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(figure)]
    assert len(boxes) > 5
    for text, box in boxes:
        assert min(box.x0, box.y0) >= 0, text
        assert box.x1 <= figure.bbox.width, text
        assert box.y1 <= figure.bbox.height, text
    for (first, box), (second, other) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other), (first, second)


def test_draw_parallel_coordinates_has_a_line_per_trial_and_an_axis_per_key(
    tmp_path: Path, figures: list[Figure]
) -> None:
    trials = [
        make_trial(1, 0.2),
        make_trial(2, 0.4, status="stopped"),
        make_trial(3, 0.3),
        make_trial(4, None, status="failed"),
        make_trial(5, 0.9, status="failed"),
    ]
    draw_parallel_coordinates(trials, tmp_path / "p.png")
    (figure,) = figures
    words = words_of(figure)
    assert {"anchors.\nbase_scale", "optim.\npeak_lr", "score"} <= set(words)
    assert "best: trial ab12_00002, score 0.4" in words
    assert (
        "5 trials: 2 done, 1 stopped (dashed), 2 failed; not drawn: ab12_00004, ab12_00005" in words
    )
    lines = lines_of(figure.axes[0])
    # From the lowest score to the highest, so that the best lies on top: heights of base_scale 3,
    # 5, 4 from 3 to 5; of 10^-1, 10^-3, 10^-2 on a log axis; of 0.2, 0.3, 0.4.
    expected = [[0.0, 1.0, 0.0], [1.0, 0.0, 0.5], [0.5, 0.5, 1.0]]
    assert [list(line.get_ydata()) for line in lines] == [pytest.approx(row) for row in expected]
    assert [line.get_linestyle() for line in lines] == ["-", "-", "--"]
    assert lines[2].get_linewidth() > 2 * lines[1].get_linewidth() == 2 * lines[0].get_linewidth()
    assert lines[0].get_zorder() < lines[1].get_zorder() < lines[2].get_zorder()


def test_draw_parallel_coordinates_colours_by_score(tmp_path: Path, figures: list[Figure]) -> None:
    draw_parallel_coordinates([make_trial(n, 0.1 * n) for n in (1, 2, 3)], tmp_path / "p.png")
    low, middle, high = (line.get_color() for line in lines_of(figures[0].axes[0]))
    # Viridis goes from dark violet over green-blue to a light yellow-green.
    assert low == pytest.approx((0.267, 0.005, 0.329, 1.0), abs=0.01)
    assert sum(low[:3]) < sum(middle[:3]) < sum(high[:3])


def test_draw_parallel_coordinates_calls_the_first_of_equal_scores_the_best(
    tmp_path: Path, figures: list[Figure]
) -> None:
    trials = [make_trial(1, 0.2), make_trial(2, 0.3), make_trial(3, 0.3)]
    draw_parallel_coordinates(trials, tmp_path / "p.png")
    assert "best: trial ab12_00002, score 0.3" in words_of(figures[0])


def test_draw_parallel_coordinates_labels_choices_at_equal_distances(
    tmp_path: Path, figures: list[Figure]
) -> None:
    choices = [None, [1.0, 2.0], "IMAGENET1K_V1"]
    trials = [make_trial(n, 0.1 * n, **{"a.b": choice}) for n, choice in enumerate(choices)]
    draw_parallel_coordinates(trials, tmp_path / "p.png")
    heights = {text.get_text(): text.get_position()[1] for text in texts_of(figures[0])}
    assert heights["none"] == pytest.approx(1 / 6)
    assert heights["1 2"] == pytest.approx(3 / 6)
    assert heights["IMAGENET1K_V1"] == pytest.approx(5 / 6)


def test_draw_parallel_coordinates_takes_a_key_that_some_trials_lack(
    tmp_path: Path, figures: list[Figure]
) -> None:
    trials = [make_trial(1, 0.1, **{"a.b": 1}), make_trial(2, 0.2, **{"a.b": 2, "c": "x"})]
    draw_parallel_coordinates(trials, tmp_path / "p.png")
    assert {"a.\nb", "c", "none", "x"} <= set(words_of(figures[0]))


def test_draw_parallel_coordinates_names_no_more_than_a_few_of_the_missing(
    tmp_path: Path, figures: list[Figure]
) -> None:
    trials = [make_trial(n, None, status="failed") for n in range(1, 40)]
    draw_parallel_coordinates([make_trial(0, 0.5), *trials], tmp_path / "p.png")
    (caption,) = (words for words in words_of(figures[0]) if words.startswith("40 trials"))
    assert " ".join(caption.split()).endswith("ab12_00005, ab12_00006 and 33 more")


@pytest.mark.parametrize("count", [1, 8, 100])
def test_pictures_have_whole_texts_that_do_not_overlap(
    tmp_path: Path, figures: list[Figure], count: int
) -> None:
    trials = make_sweep(count)
    draw_parallel_coordinates(trials, tmp_path / "p.png")
    draw_pareto(trials, tmp_path / "f.png")
    assert len(figures) == 2
    num_scored = sum(trial["score"] is not None for trial in trials)
    assert len(lines_of(figures[0].axes[0])) == num_scored
    for figure in figures:
        assert_texts_are_whole_and_apart(figure)


@pytest.mark.parametrize("draw", [draw_parallel_coordinates, draw_pareto])
def test_pictures_take_equal_values(tmp_path: Path, figures: list[Figure], draw: Any) -> None:
    trials = [make_trial(0, 0.25, **{"a.b": 3, "c": "x"}) for _ in range(4)]
    draw(trials, tmp_path / "equal.png")
    assert len(figures) == 1
    with Image.open(tmp_path / "equal.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 500


@pytest.mark.parametrize("draw", [draw_parallel_coordinates, draw_pareto])
@pytest.mark.parametrize("trials", [[], [make_trial(1, None, status="failed")]], ids=["no", "1"])
def test_pictures_are_not_drawn_when_nothing_has_a_score(
    tmp_path: Path, draw: Any, trials: list[Any]
) -> None:
    draw(trials, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1.0, 0.5)], [0]),
        # Cheaper and worse, dearer and better: all stay.
        ([(3.0, 0.5), (1.0, 0.3), (2.0, 0.4)], [1, 2, 0]),
        # Dearer and no better: out.
        ([(1.0, 0.3), (2.0, 0.3), (3.0, 0.2), (4.0, 0.4)], [0, 3]),
        # As dear and worse: out; equal: the first.
        ([(1.0, 0.2), (1.0, 0.3), (1.0, 0.3)], [1]),
        ([], []),
    ],
)
def test_find_front_keeps_what_no_other_beats(
    points: list[tuple[float, float]], front: list[int]
) -> None:
    assert find_front(points) == front


def test_find_front_agrees_with_the_definition() -> None:
    draw = random.Random(0)
    points = [(float(draw.randint(0, 15)), draw.randint(0, 15) / 15) for _ in range(120)]
    beaten = {
        i
        for i, (cost, gain) in enumerate(points)
        for c, g in points
        if c <= cost and g >= gain and (c, g) != (cost, gain)
    }
    best = {points[i] for i in range(len(points)) if i not in beaten}
    front = find_front(points)
    assert {points[i] for i in front} == best
    assert len(front) == len(best)


def test_draw_pareto_draws_the_front_and_names_trials(
    tmp_path: Path, figures: list[Figure]
) -> None:
    trials = [make_trial(1, 0.2), make_trial(2, 0.4, status="stopped"), make_trial(3, 0.3)]
    draw_pareto(trials, tmp_path / "f.png")
    (line,) = figures[0].axes[0].lines
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [(11.0, 0.2), (12.0, 0.4)]
    assert count_colour(tmp_path / "f.png", CRIMSON) > 300
    # Without what all names begin with.
    assert {"00001", "00002", "00003", "done", "stopped"} <= set(words_of(figures[0]))


def test_draw_pareto_names_whole_trials_when_nothing_is_shared(
    tmp_path: Path, figures: list[Figure]
) -> None:
    trials = [{**make_trial(n, 0.1 * n), "trial": name} for n, name in ((1, "x_1"), (2, "y_1"))]
    draw_pareto(trials, tmp_path / "f.png")
    assert {"x_1", "y_1"} <= set(words_of(figures[0]))


def test_draw_pareto_counts_trials_without_a_time(tmp_path: Path, figures: list[Figure]) -> None:
    trials = [make_trial(n, 0.1 * n) for n in (1, 2, 3)]
    del trials[2]["metrics"]["latency_ms"]
    draw_pareto(trials, tmp_path / "f.png")
    words = words_of(figures[0])
    assert "3 trials: 3 done; not drawn: ab12_00003" in words
    assert "time of one image on the training device (ms)" in words


def test_draw_pareto_stands_in_one_column_when_no_time_was_measured(
    tmp_path: Path, figures: list[Figure]
) -> None:
    trials = [make_trial(n, 0.1 * n) for n in (1, 2, 3)]
    for trial in trials:
        trial["metrics"]["latency_ms"] = None
    draw_pareto(trials, tmp_path / "f.png")
    assert {"no time was measured", "best"} <= set(words_of(figures[0]))
    (line,) = figures[0].axes[0].lines
    assert list(line.get_ydata()) == pytest.approx([0.3])


def test_draw_pareto_has_a_log_scale_when_times_span_more_than_a_factor_of_ten(
    tmp_path: Path, figures: list[Figure]
) -> None:
    trials = [make_trial(n, 0.1 * n) for n in (1, 2, 150)]
    draw_pareto(trials, tmp_path / "f.png")
    assert figures[0].axes[0].get_xscale() == "log"
    # Of 11, 12 and 160 ms.
    assert {"20", "50", "100"} <= set(words_of(figures[0]))
    assert_texts_are_whole_and_apart(figures[0])
