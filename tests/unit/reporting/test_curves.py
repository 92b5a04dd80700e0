"""The picture of a training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retinaray.reporting.curves import draw_training_curves

Event = Callable[..., dict[str, Any]]


def count_colour(path: Path, colour: tuple[int, int, int]) -> int:
    """Pixels of about that colour."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(pixels - colour).max(axis=-1) < 25).sum())


BLUE, GREEN, OLIVE = (31, 119, 180), (44, 160, 44), (188, 189, 34)


def test_draw_training_curves_shows_losses_and_scores(
    tmp_path: Path, make_progress: Event, make_validation: Event
) -> None:
    path = tmp_path / "loss.png"
    events = [make_progress(step) for step in range(1, 30)]
    draw_training_curves(events, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size == (990, 715)  # 9 x 6.5 inches at 110 dpi
    assert count_colour(path, BLUE) > 500
    assert count_colour(path, GREEN) == 0
    events += [make_validation(10, 0.2), make_validation(20, 0.6), make_validation(15, None)]
    draw_training_curves(events, path)
    assert count_colour(path, GREEN) + count_colour(path, OLIVE) > 300


def test_draw_training_curves_shows_a_single_report(tmp_path: Path, make_progress: Event) -> None:
    empty, one = tmp_path / "empty.png", tmp_path / "one.png"
    draw_training_curves([make_progress(5, class_loss=float("nan"))], empty)
    draw_training_curves([make_progress(5, class_loss=0.4)], one)
    assert count_colour(one, BLUE) > count_colour(empty, BLUE) + 5


def test_draw_training_curves_goes_on_after_a_loss_that_is_not_finite(
    tmp_path: Path, make_progress: Event
) -> None:
    whole, broken = tmp_path / "whole.png", tmp_path / "broken.png"
    events = [make_progress(step, class_loss=0.5) for step in range(1, 50)]
    draw_training_curves(events, whole)
    events[4]["class_loss"], events[6]["class_loss"] = float("nan"), float("inf")
    draw_training_curves(events, broken)
    assert count_colour(broken, BLUE) > 0.85 * count_colour(whole, BLUE)


@pytest.mark.parametrize("has_validation", [False, True])
def test_draw_training_curves_draws_nothing_without_progress(
    tmp_path: Path, make_validation: Event, has_validation: bool
) -> None:
    events = [make_validation(1, 0.5)] if has_validation else []
    draw_training_curves(events, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
