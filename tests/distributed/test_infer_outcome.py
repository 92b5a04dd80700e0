"""The end of a batch inference: one line for machines, a few for people."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from retinaray.distributed.infer_outcome import InferOutcome
from retinaray.inference.bottleneck import WorkerPool
from retinaray.inference.run_files import RunTotals
from retinaray.inference.run_pace import PartReport, RunPace
from retinaray.inference.stage_times import StageTimes

MakeOutcome = Callable[[dict[str, Any]], InferOutcome]


@pytest.fixture
def make_outcome() -> MakeOutcome:
    """An outcome of 8 images and 2 errors with a given summary."""

    def make(summary: dict[str, Any]) -> InferOutcome:
        return InferOutcome(
            run="/runs/monday",
            detections="/runs/monday/detections.json",
            totals=RunTotals(num_parts=2, num_images=8, num_errors=2, num_detections=30),
            errors=({"uri": "a.jpg", "reason": "cut off"}, {"uri": "b.jpg", "reason": "empty"}),
            backend="onnxruntime: no GPU",
            seconds=20.0,
            images_per_s=0.5,
            scores=None,
            summary=summary,
        )

    return make


@pytest.fixture
def summary() -> dict[str, Any]:
    """Of one part of ten images in 10 s, which a worker took 5 s to start for."""
    now = [0.0]
    pool = WorkerPool(num_workers=1, read_threads=2, cores=2, has_gpu=False)
    pace = RunPace(num_images=10, num_done=0, pool=pool, clock=lambda: now[0])
    now[0] = 15.0
    times = StageTimes(fetch_s=2.0, decode_s=5.0, engine_s=9.0, num_bytes=2048)
    pace.add(PartReport("a:1", 5.0, 15.0, 8, 2, 30, times))
    return pace.summary()


def test_to_text_tells_speed_and_bottleneck_before_what_else_there_is(
    make_outcome: MakeOutcome, summary: dict[str, Any]
) -> None:
    assert make_outcome(summary).to_text().splitlines() == [
        "8 images, 30 detections, 2 errors in 20 s (0.5 img/s, onnxruntime: no GPU)",
        "  error: a.jpg: cut off",
        "  error: b.jpg: empty",
        "detections  /runs/monday/detections.json",
        "run         /runs/monday",
        # 10 images in 10 s of the worker, in 15 s of the command.
        "speed       1.0 img/s with all workers at work, 0.7 since the start, first part after "
        "0:15",
        # 9 of 10 s of the engine; 5 and 2 of 20 s of two threads.
        "stages      engine 90 %, decode 25 %, read 10 %, commit 0 % busy; 2.0 KiB read",
        "bottleneck  engine-bound (engine 90 % busy, decoding takes up to 25 % of the same cores): "
        "more machines or a GPU, an INT8 model, a smaller canvas",
    ]


def test_to_text_leaves_the_speed_out_when_nothing_was_left_to_do(
    make_outcome: MakeOutcome,
) -> None:
    assert make_outcome({}).to_text().splitlines()[-1] == "run         /runs/monday"


def test_to_json_is_one_line_with_the_summary(
    make_outcome: MakeOutcome, summary: dict[str, Any]
) -> None:
    text = make_outcome(summary).to_json()
    assert "\n" not in text
    assert json.loads(text)["summary"] == summary
    assert json.loads(text)["exit_code"] == 0
