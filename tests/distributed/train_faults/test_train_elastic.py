"""A training whose nodes go and come: it goes on with as many workers as there is room for."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from retinaray.assembly.job_plan_workers import WorkerPlan
from retinaray.assembly.training import make_card, read_inputs
from retinaray.config.schema import TrainJob
from retinaray.distributed.train_run import run_workers

pytestmark = [pytest.mark.local_ray, pytest.mark.usefixtures("ray_cluster")]

NUM_STEPS = 40
# An epoch has two steps and a checkpoint, which waits until the one before it is written: at worst
# one is cut off, and the training stands at the end of the epoch after it.
MOST_LOST = 4
# Longer than what the helpers of a test wait for, so that theirs is the message.
PATIENCE_S = 900.0


@pytest.mark.slow
def test_a_training_shrinks_when_a_node_is_lost_and_grows_when_one_comes(
    ray_nodes: Any,
    make_long_job: Callable[..., TrainJob],
    start_elastic: Callable[..., subprocess.Popen[bytes]],
    image: Path,
    hold_reader: Callable[..., Any],
    find_workers: Callable[[str], list[int]],
    is_running: Callable[[int], bool],
    read_events: Callable[[Path, str], list[dict[str, Any]]],
    read_tensors: Callable[[Path], dict[str, torch.Tensor]],
    wait_until: Callable[[Callable[[], object], str], None],
    tmp_path: Path,
) -> None:
    job = make_long_job(
        tmp_path / "model.pth",
        data__val_annotations=None,
        run__epochs=NUM_STEPS // 2,
        run__val_every=1,
        run__workers=2,
    )
    folder = tmp_path / "run"
    has_reader, is_node_gone = threading.Event(), threading.Event()

    def recoveries() -> list[dict[str, Any]]:
        return read_events(folder, "recovery") if (folder / "metrics.jsonl").exists() else []

    def follow(reading: int) -> None:
        if reading == 2:
            wait_until(lambda: _is_registered(folder, "step_00000002"), "the first checkpoint")
            workers = find_workers("ray::RayTrainWorker")
            has_reader.set()
            wait_until(is_node_gone.is_set, "the end of a node")
            # They outlive their node for a moment, in which steps would be taken.
            wait_until(lambda: not all(map(is_running, workers)), "the end of its worker")
        if reading > 3 and len(recoveries()) < 2:
            # Nodes are counted every ten seconds: the epochs are made long enough for that.
            threading.Event().wait(3.0)

    with hold_reader(image, follow) as failures:
        driver = start_elastic(job, folder, min_workers=1, address=ray_nodes.address)
        wait_until(lambda: has_reader.is_set() or driver.poll() is not None, "a reader")
        assert driver.poll() is None
        # Ray starts and ends nodes in the main thread only.
        try:
            ray_nodes.remove_node(next(iter(ray_nodes.worker_nodes)), allow_graceful=False)
        finally:
            is_node_gone.set()
        wait_until(lambda: recoveries() or driver.poll() is not None, "steps of one worker")
        ray_nodes.add_node(
            num_cpus=1,
            node_ip_address="127.0.0.4",
            object_store_memory=80_000_000,
            include_dashboard=False,
        )
        assert driver.wait(PATIENCE_S) == 0
    assert not failures
    lost, grown = recoveries()[:2]
    assert (lost["num_workers"], lost["cause"]) == (1, "workers failed or were lost")
    assert lost["lost_steps"] <= 2
    assert (grown["num_workers"], grown["cause"]) == (2, "the workers were changed")
    assert grown["lost_steps"] <= MOST_LOST
    steps = [event["step"] for event in read_events(folder, "progress")]
    assert sorted(set(steps)) == list(range(1, NUM_STEPS + 1))
    # The same batches in the same order, whoever was there; several add up in another order.
    calm = tmp_path / "calm"
    options: dict[str, Any] = {"folder": calm, "run_id": "calm", "handle_event": lambda _: None}
    run_workers(job, WorkerPlan(1, 1, 0, 1), **options)
    wanted, found = (
        read_tensors(max(run.glob("ray_train/*/weights.pth"))) for run in (calm, folder)
    )
    start = make_card(job, read_inputs(job), run_id="start")[1].state_dict()
    assert found.keys() == wanted.keys() == start.keys()
    apart, moved = (
        sum(float((wanted[name] - other[name]).square().sum()) for name in wanted) ** 0.5
        for other in (found, start)
    )
    assert apart < 0.05 * moved


def _is_registered(folder: Path, checkpoint: str) -> bool:
    """Whether Ray would go on from a checkpoint: it is listed, not only there."""
    return any(checkpoint in path.read_text() for path in folder.rglob("*snapshot.json"))
