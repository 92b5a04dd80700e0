"""Runs that ended early and were started again: nothing is lost, done twice, or different."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from retinaray.config.schema import InferJob
from retinaray.distributed.batch_inference import run_inference
from retinaray.errors import ClusterError
from retinaray.storage import Storage

pytestmark = pytest.mark.local_ray

Results = dict[str, bytes]
StartDriver = Callable[..., subprocess.Popen[bytes]]
WaitUntil = Callable[[Callable[[], object], str], None]

# Longer than what the helpers of a test wait for, so that theirs is the message.
PATIENCE_S = 900.0


@pytest.fixture
def interrupt(
    start_driver: StartDriver,
    pictures: list[Path],
    hold_reader: Callable[..., Any],
    list_parts: Callable[[object], dict[str, float]],
    end_process: Callable[..., None],
    wait_until: WaitUntil,
) -> Callable[..., None]:
    """Run the command until a worker waits for the first of some images, and end it then.

    A worker may have several parts at hand: the other images keep what outlives its driver from
    finishing everything.
    """

    def run(
        output: object,
        *,
        images: tuple[int, ...],
        num_parts: int,
        by: signal.Signals,
        **options: int,
    ) -> None:
        drivers: list[subprocess.Popen[bytes]] = []
        ended: list[int] = []
        lock = threading.Lock()

        def end_at_first_reading(reading: int) -> None:
            with lock:
                if not ended:
                    wait_until(lambda: len(list_parts(output)) >= num_parts, f"{num_parts} parts")
                    end_process(drivers[0].pid, by)
                    ended.append(reading)

        with ExitStack() as stack:
            failures = [
                stack.enter_context(hold_reader(pictures[image], end_at_first_reading))
                for image in images
            ]
            drivers.append(start_driver(output, **options))
            drivers[0].wait(PATIENCE_S)
        assert not [failure for found in failures for failure in found]
        assert ended == [1]
        assert drivers[0].returncode != 0

    return run


@pytest.mark.slow
def test_infer_goes_on_at_once_when_its_driver_was_killed(
    undisturbed: Results,
    interrupt: Callable[..., None],
    start_driver: StartDriver,
    read_log: Callable[[int], str],
    read_results: Callable[[object], Results],
    list_parts: Callable[[object], dict[str, float]],
    spoiled: Callable[[object], Any],
    s3_bucket: str,
) -> None:
    output = f"{s3_bucket}/run"
    interrupt(output, images=(19, 25), num_parts=5, by=signal.SIGKILL, workers=1, batch=2)
    kept = list_parts(output)
    assert 5 <= len(kept) <= 9
    # Nobody could give it back.
    assert any(uri.endswith(".json") for uri in Storage().list_files(f"{output}/lock"))
    assert not Storage().exists(f"{output}/_SUCCESS")

    with spoiled(kept):
        assert start_driver(output, workers=1, batch=2).wait(PATIENCE_S) == 0

    assert read_results(output) == undisturbed
    after = list_parts(output)
    assert {uri: after[uri] for uri in kept} == kept
    log = read_log(1)
    assert "resuming run" in log
    assert f"{11 - len(kept)} of 11 parts to do" in log
    assert "waiting whether it lives" not in log
    totals = json.loads(log.splitlines()[-1])["totals"]
    assert (totals["num_images"], totals["num_errors"]) == (32, 1)
    assert list(Storage().list_files(f"{output}/lock")) == []


@pytest.mark.slow
def test_infer_gives_the_same_bytes_when_interrupted_three_times_and_given_other_workers(
    undisturbed: Results,
    make_job: Callable[..., InferJob],
    interrupt: Callable[..., None],
    read_results: Callable[[object], Results],
    list_parts: Callable[[object], dict[str, float]],
    spoiled: Callable[[object], Any],
    tmp_path: Path,
) -> None:
    output = tmp_path / "run"
    interrupt(output, images=(10, 22), num_parts=2, by=signal.SIGKILL, workers=1, batch=2)
    first = list_parts(output)
    assert 2 <= len(first) <= 9

    # Two parts that cannot be written end the second attempt.
    obstacles = [output / "parts" / f"part-{number:09}.jsonl" for number in (3, 7)]
    for path in obstacles:
        path.mkdir()
    with (
        spoiled(first),
        pytest.raises(ClusterError, match=r"2 of 11 parts were not finished, first \[3, 7\]"),
    ):
        run_inference(make_job(output, workers=2, batch=3))
    for path in obstacles:
        path.rmdir()
    second = list_parts(output)
    assert len(second) == 9
    assert first.items() <= second.items()

    # A spot instance is given notice in this way.
    interrupt(output, images=(22,), num_parts=9, by=signal.SIGTERM, workers=1, batch=1)
    third = list_parts(output)
    assert 9 <= len(third) <= 10
    assert second.items() <= third.items()

    with spoiled(third):
        outcome = run_inference(make_job(output, workers=2, batch=8))
    assert read_results(output) == undisturbed
    assert third.items() <= list_parts(output).items()
    assert (outcome.totals.num_images, outcome.totals.num_errors) == (32, 1)
    assert list((output / "attempts").iterdir()) == []
    assert list((output / "lock").iterdir()) == []
