"""What a validation is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from retinaray.distributed.validation import rate

METRICS = {"AP": 0.5, "AP_small": 0.25, "AP_large": None, "AP/car": 0.75, "latency_ms": 20.0}


@pytest.mark.parametrize(
    ("objective", "latency_price", "score"),
    [
        ("AP", 0.0, 0.5),
        ("AP_small", 0.0, 0.25),
        ("AP/car", 0.0, 0.75),
        ("AP", 0.01, 0.3),  # 0.5 - 0.01 * 20
        ("AP_small", 0.05, -0.75),  # 0.25 - 0.05 * 20: slow may be worse than nothing
        ("AP_large", 0.01, -1.0),
        ("AP/bus", 0.0, -1.0),
    ],
)
def test_rate_takes_the_price_of_the_latency_off_the_objective(
    objective: str, latency_price: float, score: float
) -> None:
    assert rate(METRICS, objective=objective, latency_price=latency_price) == pytest.approx(score)


def test_rate_takes_nothing_off_when_there_is_no_latency() -> None:
    metrics: Mapping[str, Any] = {"AP": 0.5}
    assert rate(metrics, objective="AP", latency_price=0.01) == 0.5


def test_rate_puts_no_ground_truth_below_a_score_of_zero() -> None:
    found_nothing = rate({"AP": 0.0}, objective="AP", latency_price=0.0)
    assert found_nothing == 0.0
    assert rate({"AP": None}, objective="AP", latency_price=0.0) < found_nothing
