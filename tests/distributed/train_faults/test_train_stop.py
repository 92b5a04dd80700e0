"""Trainings that are told to stop, or that their machine is about to go."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from retinaray.config.schema import TrainJob
from retinaray.distributed.train import run_training

pytestmark = [pytest.mark.local_ray, pytest.mark.usefixtures("ray_cluster")]

NUM_STEPS = 12
# All workers agree on a stop with votes that need three steps.
VOTE_STEPS = 3
ORDER_S = 3.0

Tensors = dict[str, torch.Tensor]
ReadEvents = Callable[[Path, str], list[dict[str, Any]]]
WaitUntil = Callable[[Callable[[], object], str], None]


@pytest.mark.slow
def test_a_stopped_training_keeps_its_steps_and_goes_on_even_from_a_damaged_last_checkpoint(
    reference: Tensors,
    make_long_job: Callable[..., TrainJob],
    image: Path,
    hold_reader: Callable[..., Any],
    call_later: Callable[..., Any],
    list_complete: Callable[[Path], list[int]],
    check_same: Callable[[Path, Tensors], None],
    read_events: ReadEvents,
    wait_until: WaitUntil,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="retinaray")
    job, folder = make_long_job(tmp_path / "model.pth"), tmp_path / "model_run"

    def stop() -> None:
        wait_until(lambda: len(read_events(folder, "progress")) >= 2, "two steps")
        os.kill(os.getpid(), signal.SIGTERM)
        # The worker asks every half second.
        sent_s = time.monotonic()
        wait_until(lambda: time.monotonic() - sent_s > ORDER_S, "the order's way to the worker")

    with (
        hold_reader(image, call_later(2, stop)) as failures,
        pytest.raises(SystemExit) as caught,
    ):
        run_training(job)
    assert not failures
    assert caught.value.code == 128 + signal.SIGTERM
    (step,) = list_complete(folder)
    # The second epoch's reading is in step 3 or 4, and the votes follow that step.
    assert step <= 4 + VOTE_STEPS
    assert f"kept {folder}/ray_train/step_{step:08d}; the same command goes on" in caplog.text
    assert not Path(job.output).exists()

    outcome = run_training(job)
    assert outcome.steps == NUM_STEPS
    # No step was taken twice.
    progress = [event["step"] for event in read_events(folder, "progress")]
    assert progress == list(range(1, NUM_STEPS + 1))
    check_same(folder / "last.pth", reference)
    (recovery,) = read_events(folder, "recovery")
    assert (recovery["restored_step"], recovery["lost_steps"]) == (step, 0)
    assert outcome.recoveries == (recovery["seconds"],)
    assert "survived 1 interruptions, going on after" in outcome.to_text()

    _damage_and_go_on(job, folder, step, caplog)
    check_same(folder / "last.pth", reference)
    assert [event["step"] for event in read_events(folder, "progress")][NUM_STEPS:] == list(
        range(step + 1, NUM_STEPS + 1)
    )


def _damage_and_go_on(
    job: TrainJob, folder: Path, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Truncate the last state, and lose Ray's list as a driver does that dies while it writes."""
    state = folder / "ray_train" / f"step_{NUM_STEPS:08d}" / "training.pth"
    state.write_bytes(state.read_bytes()[:-1000])
    names = [path.name for path in (folder / "ray_train").glob("step_*")]
    assert f"step_{step:08d}" in names
    snapshot = folder / "ray_train" / "checkpoint_manager_snapshot.json"
    snapshot.write_text(snapshot.read_text()[:100])
    outcome = run_training(job)
    assert outcome.steps == NUM_STEPS
    assert f"{state} is truncated or foreign" in caplog.text
    assert json.loads(snapshot.read_text())["latest_checkpoint_result"]["checkpoint_dir_name"] == (
        f"step_{NUM_STEPS:08d}_2"
    )


@pytest.mark.slow
def test_checkpoints_by_the_clock_change_neither_weights_nor_validations(
    reference: Tensors,
    make_long_job: Callable[..., TrainJob],
    list_complete: Callable[[Path], list[int]],
    check_same: Callable[[Path, Tensors], None],
    read_events: ReadEvents,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model_run"
    # One is wanted after the first step, and again after the first step beyond each of them.
    job = make_long_job(tmp_path / "model.pth", run__checkpoint_minutes=1e-9)
    outcome = run_training(job)
    assert outcome.steps == NUM_STEPS
    first, second = 1 + VOTE_STEPS, 2 * (1 + VOTE_STEPS)
    # Ray removes all but two and the last.
    assert set(list_complete(folder)) & {first, second}
    assert len(read_events(folder, "validation")) == 1
    progress = [event["step"] for event in read_events(folder, "progress")]
    assert progress == list(range(1, NUM_STEPS + 1))
    check_same(folder / "last.pth", reference)


@pytest.mark.slow
def test_a_worker_whose_machine_gets_notice_loses_no_step_before_it(
    reference: Tensors,
    make_long_job: Callable[..., TrainJob],
    image: Path,
    hold_reader: Callable[..., Any],
    kill_worker: Callable[..., int],
    signal_workers: Callable[[int], list[int]],
    list_complete: Callable[[Path], list[int]],
    check_same: Callable[[Path, Tensors], None],
    read_events: ReadEvents,
    wait_until: WaitUntil,
    tmp_path: Path,
) -> None:
    job, folder = make_long_job(tmp_path / "model.pth"), tmp_path / "model_run"

    def give_notice(reading: int) -> None:
        if reading == 2:
            signal_workers(signal.SIGTERM)
        if reading == 5:
            # Four steps or more after the notice, with no checkpoint planned before the end.
            wait_until(lambda: list_complete(folder), "the checkpoint that the notice asked for")
            snapshot = folder / "ray_train" / "checkpoint_manager_snapshot.json"
            wait_until(snapshot.exists, "Ray's knowledge of it")
            kill_worker("ray::RayTrainWorker")

    with hold_reader(image, give_notice) as failures:
        outcome = run_training(job)
    assert not failures
    assert outcome.steps == NUM_STEPS
    check_same(folder / "last.pth", reference)
    (recovery,) = read_events(folder, "recovery")
    # Readings 2 and 5 are in steps 3 or 4 and 9 or 10.
    assert 3 <= recovery["restored_step"] <= 4 + VOTE_STEPS
    assert recovery["lost_steps"] <= 10 - recovery["restored_step"]
    assert recovery["cause"] == "workers failed or were lost"
    assert recovery["seconds"] > 0
