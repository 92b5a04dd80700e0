"""Where values stand on the axes of pictures."""

from __future__ import annotations

import itertools
import math

import pytest

from retinaray.reporting.value_axis import (
    ValueAxis,
    is_number,
    list_ticks,
    make_axis,
    place_apart,
    show_value,
)


@pytest.mark.parametrize(
    ("values", "axis"),
    [
        ([3, 1.0, 2], ValueAxis(1.0, 3.0)),
        ([1, 10.0, 4], ValueAxis(1.0, 10.0)),  # a factor of ten is not more than ten
        ([1, 10.1, 4], ValueAxis(1.0, 10.1, is_log=True)),
        ([0.0, 100.0, 5], ValueAxis(0.0, 100.0)),
        ([-1.0, 100.0, 5], ValueAxis(-1.0, 100.0)),
        ([0.5], ValueAxis(0.5, 0.5)),
        # Numbers that repeat were choices.
        ([2, 3, 2, 3], ValueAxis(names=("2", "3"))),
        ([5.0, 5.0], ValueAxis(names=("5",))),
        (["b", "a", "b"], ValueAxis(names=("a", "b"))),
        ([10, 9.0, None], ValueAxis(names=("none", "9", "10"))),
        ([[1.0, 2], [1.0, 0.5], "x"], ValueAxis(names=("1 0.5", "1 2", "x"))),
        ([True, False], ValueAxis(names=("false", "true"))),
        ([1.0, math.nan], ValueAxis(names=("1", "nan"))),
    ],
)
def test_make_axis_makes_a_scale_of_numbers_and_names_of_the_rest(
    values: list[object], axis: ValueAxis
) -> None:
    assert make_axis(values) == axis


def test_make_axis_keeps_scores_on_a_linear_scale() -> None:
    assert make_axis([0.001, 0.5], is_score=True) == ValueAxis(0.001, 0.5)
    assert make_axis([0.5, 0.5], is_score=True) == ValueAxis(0.5, 0.5)


@pytest.mark.parametrize(
    ("axis", "value", "height"),
    [
        (ValueAxis(2.0, 4.0), 2, 0.0),
        (ValueAxis(2.0, 4.0), 3.5, 0.75),
        (ValueAxis(0.001, 0.1, is_log=True), 0.01, 0.5),
        (ValueAxis(0.001, 0.1, is_log=True), 0.1, 1.0),
        (ValueAxis(7.0, 7.0), 7.0, 0.5),
        (ValueAxis(names=("a", "b")), "a", 0.25),
        (ValueAxis(names=("a", "b")), "b", 0.75),
        (ValueAxis(names=("none", "1 2")), [1.0, 2], 0.75),
    ],
)
def test_place_gives_the_height(axis: ValueAxis, value: object, height: float) -> None:
    assert axis.place(value) == pytest.approx(height)


def test_place_apart_stacks_equal_names_around_their_place() -> None:
    axis = make_axis(["a", "b", "a", "a"])
    # Names at 0.25 and 0.75; 0.012 between the three lines of "a".
    assert place_apart(axis, ["a", "b", "a", "a"]) == pytest.approx([0.238, 0.75, 0.25, 0.262])


@pytest.mark.parametrize("num_values", [2, 50, 1000])
def test_place_apart_keeps_names_apart_however_many_lines(num_values: int) -> None:
    values = ["a", "b", "c", "a"] * num_values
    heights = place_apart(make_axis(values), values)
    for name, low in (("a", 0.0), ("b", 1 / 3), ("c", 2 / 3)):
        members = [h for h, value in zip(heights, values, strict=True) if value == name]
        assert low < min(members) <= max(members) < low + 1 / 3
        assert len(set(members)) == len(members)


def test_place_apart_moves_no_number() -> None:
    assert place_apart(ValueAxis(0.0, 1.0), [0.5, 0.5, 1.0]) == [0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([2, 2.5, 4], ["2", "4", "2.5"]),
        ([0.5], ["0.5"]),
        (["b", "a"], ["a", "b"]),
        # 2.01 is too near 2 for its text.
        ([2.0, 2.01, 4.0], ["2", "4"]),
        ([index / 7 for index in range(8)], ["0", "1", "0.2", "0.4", "0.6", "0.8"]),
        (
            [0.00013 * 1.3**index for index in range(20)],
            ["0.00013", "0.019", "0.001", "0.01", "0.0002", "0.002", "0.0005", "0.005"],
        ),
        # Three digits would make these equal.
        ([0.35411, 0.35412], ["0.35411", "0.35412"]),
    ],
    ids=["few", "one", "names", "near", "fifths", "log", "digits"],
)
def test_list_ticks_shows_ends_and_round_numbers(values: list[object], texts: list[str]) -> None:
    axis = make_axis(values)
    ticks = list_ticks(axis, values)
    assert [text for _, text in ticks] == texts
    assert all(height == pytest.approx(axis.place(_read(text)), abs=0.02) for height, text in ticks)


def _read(text: str) -> object:
    return text if text.isalpha() else float(text)


@pytest.mark.parametrize(
    "values",
    [
        [float(index) for index in range(100)],
        [1.07**index for index in range(200)],
        [f"name {index}" for index in range(100)],
        [-3.0, 1e6, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    ],
)
def test_list_ticks_leaves_room_between(values: list[object]) -> None:
    heights = sorted(height for height, _ in list_ticks(make_axis(values), values))
    assert 2 <= len(heights) <= (12 if isinstance(values[0], str) else 19)
    assert all(later - earlier > 0.05 for earlier, later in itertools.pairwise(heights))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.123"),
        (5, "5"),
        (12345, "12345"),
        (None, "none"),
        (True, "true"),
        ([1.0, 2.519842, 0.5], "1 2.52 0.5"),
        ([], "empty"),
        ("3-7", "3-7"),
    ],
)
def test_show_value_is_short(value: object, text: str) -> None:
    assert show_value(value) == text


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, True), (0.5, True), (True, False), ("1", False), (None, False), (math.inf, False)],
)
def test_is_number_takes_finite_numbers_only(value: object, expected: bool) -> None:
    assert is_number(value) is expected
