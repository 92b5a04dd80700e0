"""Where the values of a setting stand on an axis of a picture: numbers to scale, or names.

Heights are in [0, 1], from the foot of the axis to its head.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_LOG_FROM_FACTOR = 10.0
_MAX_TICKS = 12
_MIN_TICK_GAP = 0.055
# Of an axis with at most so many values, each twice on average, the values were choices.
_MAX_REPEATED = 6
_LARGEST_SPREAD = 0.012
_SPREAD_SHARE = 0.6


@dataclass(frozen=True)
class ValueAxis:
    """Where values stand between the foot (0) and the head (1) of an axis.

    Attributes:
        low: Smallest number; meaningless when there are names.
        high: Largest number.
        is_log: Equal factors have equal distances.
        names: Texts at equal distances, from the foot on; empty when values are numbers.
    """

    low: float = 0.0
    high: float = 0.0
    is_log: bool = False
    names: tuple[str, ...] = ()

    def place(self, value: object) -> float:
        """Height of a value of the axis, in [0, 1]."""
        if self.names:
            return (self.names.index(show_value(value)) + 0.5) / len(self.names)
        number = float(str(value))
        if self.low == self.high:
            return 0.5
        if self.is_log:
            return math.log(number / self.low) / math.log(self.high / self.low)
        return (number - self.low) / (self.high - self.low)


def make_axis(values: Sequence[object], *, is_score: bool = False) -> ValueAxis:
    """An axis from the smallest to the largest value.

    Args:
        values: At least one; numbers make a scale, logarithmic when it spans more than a factor of
            ten; anything else, and a few numbers that repeat, make names, in the order of their
            numbers and letters.
        is_score: Always a linear scale.
    """
    distinct = {show_value(value): value for value in values}
    is_choice = len(set(map(str, values))) <= min(_MAX_REPEATED, len(values) // 2)
    if all(map(is_number, values)) and (is_score or not is_choice):
        numbers = [float(str(value)) for value in values]
        low, high = min(numbers), max(numbers)
        is_log = not is_score and 0 < low < high / _LOG_FROM_FACTOR
        return ValueAxis(low, high, is_log=is_log)
    return ValueAxis(names=tuple(sorted(distinct, key=lambda text: _rank(distinct[text], text))))


def place_apart(axis: ValueAxis, values: Sequence[object]) -> list[float]:
    """Heights of all values; those of one name a little apart, so that lines hide no others.

    Args:
        axis: Of these values.
        values: In the order in which equal ones are stacked.
    """
    heights = [axis.place(value) for value in values]
    if not axis.names:
        return heights
    counts = Counter(heights)
    gap = min(_LARGEST_SPREAD, _SPREAD_SHARE / (len(axis.names) * max(counts.values())))
    seen: Counter[float] = Counter()
    apart = []
    for height in heights:
        apart.append(height + gap * (seen[height] - (counts[height] - 1) / 2))
        seen[height] += 1
    return apart


def list_ticks(axis: ValueAxis, values: Sequence[object]) -> list[tuple[float, str]]:
    """Heights and texts for an axis, with room between: every value, or round ones and both ends.

    Args:
        axis: Of these values.
        values: At least one.

    Returns:
        The ends first; of many names a dozen at most.
    """
    if axis.names:
        step = math.ceil(len(axis.names) / _MAX_TICKS)
        return [(axis.place(name), name) for name in axis.names[::step]]
    numbers = sorted({float(str(value)) for value in values})
    wanted = [axis.low, axis.high]
    wanted += numbers if len(numbers) <= _MAX_TICKS // 2 else _list_round_numbers(axis)
    ticks: dict[float, float] = {}
    for number in wanted:
        height = axis.place(number)
        if all(abs(height - taken) >= _MIN_TICK_GAP for taken in ticks):
            ticks[height] = number
    return list(zip(ticks, _write_apart(list(ticks.values())), strict=True))


def _write_apart(numbers: Sequence[float]) -> list[str]:
    """Different numbers with three digits, or as many more as their texts need to differ."""
    for num_digits in range(3, 18):
        texts = [f"{number:.{num_digits}g}" for number in numbers]
        if len(set(texts)) == len(numbers):
            break
    return texts


def _list_round_numbers(axis: ValueAxis) -> list[float]:
    """Numbers of one digit, or fifths of the range rounded to such steps, inside an axis."""
    if axis.is_log:
        exponents = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
        numbers = [digit * 10.0**exponent for digit in (1, 2, 5) for exponent in exponents]
    else:
        rough = (axis.high - axis.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = unit * min((1, 2, 5, 10), key=lambda factor: abs(factor * unit - rough))
        first, last = math.ceil(axis.low / step), math.floor(axis.high / step)
        numbers = [index * step for index in range(first, last + 1)]
    return [number for number in numbers if axis.low <= number <= axis.high]


def show_value(value: object) -> str:
    """A value in few letters: numbers with three digits, lists with spaces."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return " ".join(map(show_value, value)) or "empty"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _rank(value: object, text: str) -> tuple[int, list[float], str]:
    """Order of names: none, numbers, lists by their numbers, texts by their letters."""
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    if value is None:
        return 0, [], text
    if all(map(is_number, numbers)):
        return 1, [float(str(number)) for number in numbers], text
    return 2, [], text


def is_number(value: object) -> bool:
    """Whether a value is a finite number; true and false are none."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and math.isfinite(float(str(value)))
