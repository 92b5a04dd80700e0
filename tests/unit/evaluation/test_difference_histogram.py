from __future__ import annotations

import math

import numpy as np
import pytest

from retinaray.evaluation.difference_histogram import DifferenceHistogram


def count(*values: float) -> DifferenceHistogram:
    histogram = DifferenceHistogram()
    histogram.add(np.array(values, dtype=np.float32))
    return histogram


def test_an_empty_histogram_is_all_zero() -> None:
    empty = count()
    assert (len(empty), empty.max, empty.mean, empty.quantile(0.5)) == (0, 0.0, 0.0, 0.0)
    assert empty.bars() == []


def test_quantile_is_the_right_value_within_a_bin_when_there_are_many_values() -> None:
    rng = np.random.default_rng(0)
    values = rng.lognormal(mean=-4, sigma=3, size=20_000)
    histogram = DifferenceHistogram()
    for part in np.array_split(values, 7):
        histogram.add(part)
    assert len(histogram) == 20_000
    assert histogram.max == values.max()
    assert histogram.mean == pytest.approx(values.mean())
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        right = np.quantile(values, share, method="inverted_cdf")
        # A bin is a hundredth of a decade wide: 10 ** 0.01 = 1.0233.
        assert right <= histogram.quantile(share) * (1 + 1e-9)
        assert histogram.quantile(share) <= right * 1.0234


def test_quantile_never_exceeds_the_largest_value() -> None:
    assert count(0.3).quantile(0.5) == pytest.approx(0.3)
    assert count(0.1, 0.2, 0.3).quantile(0.99) == pytest.approx(0.3)


def test_quantile_of_zeros_is_zero() -> None:
    histogram = count(0, 0, 0, 5)
    assert histogram.quantile(0.75) == 0.0
    assert histogram.quantile(0.76) == 5.0


def test_values_beyond_the_axis_keep_their_maximum() -> None:
    histogram = count(1e-12, 1e9)
    assert histogram.max == pytest.approx(1e9)
    assert histogram.quantile(0.5) == 0.0
    assert histogram.quantile(1.0) == pytest.approx(1e4, rel=0.03)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_numbers_count_as_the_largest(value: float) -> None:
    histogram = count(0.1, value)
    assert histogram.max == math.inf
    assert histogram.quantile(0.5) == pytest.approx(0.1, rel=0.03)


def test_bars_hold_every_value_between_the_first_and_the_last() -> None:
    histogram = count(0, 0.002, 0.02, 0.02, 4)
    bars = histogram.bars(per_decade=1)
    assert [(round(math.log10(high)), number) for _, high, number in bars] == [
        (-8, 1),
        (-2, 1),
        (-1, 2),
        (0, 0),
        (1, 1),
    ]
    assert bars[0][0] == 0.0
    assert [low for low, _, _ in bars[2:]] == pytest.approx([high for _, high, _ in bars[1:-1]])
    assert sum(number for _, _, number in count(3, 2e5).bars()) == 2
