"""A training on a machine that EC2 announces to take away."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from retinaray.config.schema import TrainJob

pytestmark = [pytest.mark.local_ray, pytest.mark.usefixtures("ray_cluster")]

PROGRAM = Path(__file__).parents[3] / "cluster" / "spot_notice.py"
NUM_STEPS = 40
NOTICE_S = 30.0
# An epoch has two steps.
EPOCH_S = 3.0
# A checkpoint is kept fifteen seconds before the end; two steps more until all have noticed that.
MOST_LOST = 15 * 2 / EPOCH_S + 2
# Longer than what the helpers of a test wait for, so that theirs is the message.
PATIENCE_S = 900.0


@pytest.mark.slow
def test_a_training_keeps_a_checkpoint_at_ec2s_notice_and_goes_on_elsewhere(
    ray_nodes: Any,
    ec2_metadata: Any,
    make_long_job: Callable[..., TrainJob],
    start_elastic: Callable[..., subprocess.Popen[bytes]],
    image: Path,
    hold_reader: Callable[..., Any],
    read_events: Callable[[Path, str], list[dict[str, Any]]],
    wait_until: Callable[[Callable[[], object], str], None],
    tmp_path: Path,
) -> None:
    # The only planned checkpoint is that of the end.
    job = make_long_job(
        tmp_path / "model.pth",
        data__val_annotations=None,
        run__epochs=NUM_STEPS // 2,
        run__val_every=NUM_STEPS // 2,
        run__workers=2,
    )
    folder = tmp_path / "run"
    node = next(iter(ray_nodes.worker_nodes))
    has_reader = threading.Event()

    def recoveries() -> list[dict[str, Any]]:
        return read_events(folder, "recovery") if (folder / "metrics.jsonl").exists() else []

    def follow(reading: int) -> None:
        if reading == 2:
            has_reader.set()
            wait_until(lambda: b"is drained" in notes.read_bytes(), "the node's drain")
        if reading > 2 and not recoveries():
            threading.Event().wait(EPOCH_S)

    notes = tmp_path / "spot_notice.log"
    with hold_reader(image, follow) as failures, notes.open("wb") as log:
        driver = start_elastic(job, folder, min_workers=1, address=ray_nodes.address)
        program = subprocess.Popen(
            [sys.executable, str(PROGRAM), "--poll-s", "1", "--node-id", node.node_id],
            env={**os.environ, "AWS_EC2_METADATA_SERVICE_ENDPOINT": ec2_metadata.endpoint},
            stdout=log,
            stderr=log,
        )
        try:
            wait_until(lambda: has_reader.is_set() or driver.poll() is not None, "a reader")
            assert driver.poll() is None
            ec2_metadata.announce(datetime.now(UTC) + timedelta(seconds=NOTICE_S))
            assert program.wait(PATIENCE_S) == 0
            # Ray ends the node itself at that time.
            wait_until(lambda: recoveries() or driver.poll() is not None, "steps elsewhere")
            assert driver.wait(PATIENCE_S) == 0
        finally:
            program.kill()
            program.wait()
    assert not failures
    (recovery,) = recoveries()
    assert (recovery["num_workers"], recovery["cause"]) == (1, "workers failed or were lost")
    # Reading 2 is in step 3 or 4.
    assert recovery["restored_step"] >= 3
    assert recovery["lost_steps"] <= MOST_LOST
    steps = [event["step"] for event in read_events(folder, "progress")]
    assert sorted(set(steps)) == list(range(1, NUM_STEPS + 1))
