"""Trainings that lose workers, their driver, or the room for a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from retinaray.assembly.job_plan_workers import ClusterSize, plan_training
from retinaray.config.schema import TrainJob
from retinaray.distributed.train import run_training
from retinaray.distributed.train_run import run_workers
from retinaray.errors import ClusterError

pytestmark = [pytest.mark.local_ray, pytest.mark.usefixtures("ray_cluster")]

NUM_STEPS = 12
# Longer than what the helpers of a test wait for, so that theirs is the message.
PATIENCE_S = 900.0

Tensors = dict[str, torch.Tensor]
ReadEvents = Callable[[Path, str], list[dict[str, Any]]]
ReadTensors = Callable[[Path], Tensors]
WaitUntil = Callable[[Callable[[], object], str], None]


@pytest.mark.slow
def test_a_training_goes_on_when_all_its_workers_were_killed(
    reference: Tensors,
    make_long_job: Callable[..., TrainJob],
    image: Path,
    hold_reader: Callable[..., Any],
    call_later: Callable[..., Any],
    signal_workers: Callable[[int], list[int]],
    list_complete: Callable[[Path], list[int]],
    read_tensors: ReadTensors,
    read_events: ReadEvents,
    wait_until: WaitUntil,
    tmp_path: Path,
) -> None:
    # Two epochs between two checkpoints: after steps 4, 8 and 12.
    job = make_long_job(tmp_path / "model.pth", run__workers=2, run__val_every=2)
    folder = tmp_path / "model_run"
    killed: list[int] = []

    def kill_all() -> None:
        wait_until(lambda: _is_registered(folder, "step_00000004"), "the first checkpoint")
        killed.extend(signal_workers(signal.SIGKILL))

    # The third epoch is that of steps 5 and 6.
    with hold_reader(image, call_later(3, kill_all)) as failures:
        outcome = run_training(job)
    assert not failures
    assert len(killed) == 2
    (recovery,) = read_events(folder, "recovery")
    assert recovery["restored_step"] == 4
    assert recovery["lost_steps"] <= 1
    assert recovery["cause"] == "workers failed or were lost"
    assert outcome.recoveries == (recovery["seconds"],)
    assert list_complete(folder)[-1] == NUM_STEPS
    # Two workers add up in another order than one.
    found = read_tensors(folder / "last.pth")
    for name, tensor in reference.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_a_training_goes_on_when_its_driver_was_killed(
    reference: Tensors,
    make_long_job: Callable[..., TrainJob],
    start_driver: Callable[[TrainJob], subprocess.Popen[bytes]],
    image: Path,
    hold_reader: Callable[..., Any],
    call_later: Callable[..., Any],
    list_complete: Callable[[Path], list[int]],
    check_same: Callable[[Path, Tensors], None],
    read_events: ReadEvents,
    wait_until: WaitUntil,
    tmp_path: Path,
) -> None:
    job, folder = make_long_job(tmp_path / "model.pth", run__val_every=2), tmp_path / "model_run"
    drivers: list[subprocess.Popen[bytes]] = []

    def kill_driver() -> None:
        # Whole, but not necessarily known to Ray: the files tell.
        wait_until(lambda: list_complete(folder) == [4], "the first checkpoint")
        os.kill(drivers[0].pid, signal.SIGKILL)
        drivers[0].wait(PATIENCE_S)

    with hold_reader(image, call_later(3, kill_driver)) as failures:
        drivers.append(start_driver(job))
        assert drivers[0].wait(PATIENCE_S) == -signal.SIGKILL
    assert not failures
    # Killed somewhat earlier, Ray would not have heard of the checkpoint.
    snapshot = folder / "ray_train" / "checkpoint_manager_snapshot.json"
    if snapshot.exists():
        snapshot.unlink()
    outcome = run_training(job)
    check_same(folder / "last.pth", reference)
    (recovery,) = read_events(folder, "recovery")
    assert (recovery["restored_step"], recovery["step"]) == (4, 5)
    assert recovery["lost_steps"] <= 1
    assert recovery["cause"] == "the command was started again"
    assert outcome.recoveries == (recovery["seconds"],)


@pytest.mark.slow
def test_a_training_names_the_full_disk_and_goes_on_when_there_is_room(
    ray_cluster: ClusterSize,
    reference: Tensors,
    make_long_job: Callable[..., TrainJob],
    small_disk: Callable[[str], Path],
    check_same: Callable[[Path, Tensors], None],
    list_complete: Callable[[Path], list[int]],
    tmp_path: Path,
) -> None:
    job = make_long_job(tmp_path / "model.pth", run__val_every=3, run__max_failures=0)
    weights_kib = sum(value.numel() * 4 for value in reference.values()) // 1024
    # A checkpoint is five times the weights: model, two moments, average, and the weights' file.
    disk = small_disk(f"size={7 * weights_kib}k")
    # Other threads would add up in another order.
    plan = plan_training(1, ray_cluster)
    events: list[Any] = []
    options: dict[str, Any] = {"folder": disk, "run_id": "disk", "handle_event": events.append}
    with pytest.raises(ClusterError, match=r"cannot write .*/step_00000012/.*No space left") as e:
        run_workers(job, plan, **options)
    assert "\n" not in str(e.value)
    assert list_complete(disk) == [6]

    small_disk(f"size={30 * weights_kib}k")
    result = run_workers(job, plan, **options)
    assert result.return_value == "finished"
    check_same(Path(result.checkpoint.path) / "weights.pth", reference)
    assert list_complete(disk)[-1] == NUM_STEPS


def _is_registered(folder: Path, checkpoint: str) -> bool:
    """Whether Ray would go on from a checkpoint: it is listed, not only there."""
    return any(checkpoint in path.read_text() for path in folder.rglob("*snapshot.json"))
