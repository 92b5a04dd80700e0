"""When a training is told that it waits for its images, and what it is told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retinaray.reporting.input_watch import InputWatch, describe_shortage
from retinaray.reporting.training_log import TrainingLog

Event = Callable[..., dict[str, Any]]


def told_at(make_progress: Event, shares: list[float], steps: list[int] | None = None) -> list[int]:
    """Numbers of the reports, from 1, at which something was told."""
    watch = InputWatch()
    numbers = range(1, len(shares) + 1)
    return [
        number
        for number, step, share in zip(numbers, steps or numbers, shares, strict=True)
        if watch.judge(make_progress(step, wait_share=share)) is not None
    ]


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ([0.9, 0.1, 0.1, 0.1, 0.1], []),
        # The first one is the start of the loader processes.
        ([0.9, 0.2, 0.2, 0.2, 0.2, 0.2], [4]),
        ([0.0, 0.11, 0.11, 0.10, 0.11, 0.11], []),
        ([0.0, 0.11, 0.11, 0.10, 0.11, 0.11, 0.11, 0.9, 0.9], [7]),
        ([0.9, 0.9, 0.9], []),
    ],
)
def test_judge_speaks_once_after_three_late_reports_in_a_row(
    make_progress: Event, shares: list[float], told: list[int]
) -> None:
    assert told_at(make_progress, shares) == told


def test_judge_leaves_out_the_first_report_after_a_failure(make_progress: Event) -> None:
    # Went back from step 3 to 2: the fourth report is a start again.
    assert told_at(make_progress, [0.0, 0.5, 0.5, 0.5, 0.5, 0.5], [1, 2, 3, 2, 3, 4]) == []
    assert told_at(make_progress, [0.0] + [0.5] * 6, [1, 2, 3, 2, 3, 4, 5]) == [7]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            # 100 over 30 are 4 processes.
            {"step_images_per_s": 100.0, "loader_images_per_s": 30.0, "num_loaders": 2}
            | {"core_images_per_s": 40.0},
            "those of a worker would take 100 images/s; 2 loader processes can give 60, and a core "
            "that only decodes and augments 40: set --loader-processes 4 if the machine has the "
            "cores; --augment-hue 0 leaves the dearest change out, and --cache DIR --cache-decoded "
            "spares a small set its decoding",
        ),
        (
            {"step_images_per_s": 50.0, "loader_images_per_s": 10.0, "num_loaders": 1}
            | {"core_images_per_s": 40.0},
            "those of a worker would take 50 images/s; 1 loader process can give 10, and a core "
            "that only decodes and augments 40: they wait for storage, or for cores that others "
            "use; keep images of S3 or a network disk with --cache DIR, or set --loader-processes "
            "5",
        ),
        (
            {"step_images_per_s": 9.0, "loader_images_per_s": 20.0, "num_loaders": 0}
            | {"core_images_per_s": None},
            "those of a worker would take 9 images/s; the training process itself can give 20; "
            "set --loader-processes 1",
        ),
    ],
    ids=["decoding", "reading", "none"],
)
def test_describe_shortage_says_what_is_needed_given_and_to_do(
    make_progress: Event, changes: dict[str, Any], expected: str
) -> None:
    text = describe_shortage(make_progress(5, wait_share=0.345, **changes))
    assert text == f"the steps wait 34% of their time for images: {expected}"


def test_describe_shortage_advises_when_nothing_was_measured(make_progress: Event) -> None:
    text = describe_shortage(make_progress(5, wait_share=0.5))
    assert text == (
        "the steps wait 50% of their time for images: raise --loader-processes, or keep the images "
        "with --cache DIR"
    )


def test_training_log_warns_once_and_keeps_the_figures(
    tmp_path: Path, make_progress: Event, caplog: pytest.LogCaptureFixture
) -> None:
    figures = {"step_images_per_s": 100.0, "loader_images_per_s": 30.0, "num_loaders": 2}
    with caplog.at_level(logging.WARNING), TrainingLog(tmp_path) as log:
        for step in range(1, 8):
            log.write(make_progress(step, wait_share=0.4, **figures, core_images_per_s=None))
    assert [record.getMessage()[:47] for record in caplog.records] == [
        "the steps wait 40% of their time for images: th"
    ]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loader_images_per_s"] for line in lines] == [30.0] * 7
    assert lines[0]["core_images_per_s"] is None
