from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def make_progress() -> Callable[..., dict[str, Any]]:
    """Progress events: make_progress(step, class_loss=..., ...)."""

    def make(step: int, **changes: Any) -> dict[str, Any]:
        return {
            "kind": "progress",
            "step": step,
            "total_steps": 100,
            "epoch": step / 10,
            "class_loss": 1 / step,
            "box_loss": 0.5,
            "learning_rate": 1e-3,
            "gradient_norm": 2.0,
            "num_foreground": 40.0,
            "num_skipped": 0,
            "images_per_s": 12.34,
            "wait_share": 0.1,
            "eta_s": 61.0,
        } | changes

    return make


@pytest.fixture(scope="session")
def make_validation() -> Callable[..., dict[str, Any]]:
    """Validation events: make_validation(step, ap)."""

    def make(step: int, ap: float | None) -> dict[str, Any]:
        scores = dict.fromkeys(("AP", "AP50", "AP_small", "AP_medium", "AP_large"), ap)
        return {"kind": "validation", "step": step, "epoch": step / 10, **scores}

    return make
