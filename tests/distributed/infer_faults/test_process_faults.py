"""Nodes and workers that end in the middle of a run, and images that change under it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from retinaray.config.schema import InferJob
from retinaray.distributed.batch_inference import run_inference

pytestmark = pytest.mark.local_ray

Results = dict[str, bytes]
WaitUntil = Callable[[Callable[[], object], str], None]
ListParts = Callable[[object], dict[str, float]]

# Longer than what the helpers of a test wait for, so that theirs is the message.
PATIENCE_S = 900.0


@pytest.fixture
def ray_nodes(undisturbed: Results) -> Iterator[Any]:
    """A cluster of a head that runs no work and two nodes of two processors each."""
    from ray.cluster_utils import Cluster

    # Settings of the session's Ray, its token among them, hold for this one too: see `connect`.
    assert os.environ["RAY_AUTH_MODE"] == "token"
    size: dict[str, Any] = {"object_store_memory": 80_000_000, "include_dashboard": False}
    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **size})
    try:
        # A driver connects to any node of its own address; that must be the head.
        for address in ("127.0.0.2", "127.0.0.3"):
            cluster.add_node(num_cpus=2, node_ip_address=address, **size)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_infer_completes_when_a_node_is_killed(
    undisturbed: Results,
    ray_nodes: Any,
    pictures: list[Path],
    start_driver: Callable[..., subprocess.Popen[bytes]],
    hold_reader: Callable[..., Any],
    find_reader: Callable[[Path], int],
    find_ancestors: Callable[[int], list[int]],
    is_running: Callable[[int], bool],
    list_parts: ListParts,
    read_results: Callable[[object], Results],
    wait_until: WaitUntil,
    tmp_path: Path,
) -> None:
    output, held = tmp_path / "run", pictures[19]
    readers: list[int] = []
    has_reader = threading.Event()

    def wait_for_death(reading: int) -> None:
        if reading > 1:
            return
        wait_until(lambda: len(list_parts(output)) >= 3, "three parts")
        readers.append(find_reader(held))
        has_reader.set()
        wait_until(lambda: not is_running(readers[0]), "the end of the worker")

    with hold_reader(held, wait_for_death) as failures:
        # Three workers that take a processor each cannot all be on one node.
        driver = start_driver(output, workers=3, batch=2, address=ray_nodes.address)
        wait_until(lambda: has_reader.is_set() or driver.poll() is not None, "a worker to kill")
        assert readers, "the run ended before a worker was held"
        (node,) = [
            node
            for node in ray_nodes.worker_nodes
            if node.all_processes["raylet"][0].process.pid in find_ancestors(readers[0])
        ]
        # Ray starts and ends nodes in the main thread only.
        ray_nodes.remove_node(node, allow_graceful=False)
        assert driver.wait(PATIENCE_S) == 0
    assert not failures
    assert read_results(output) == undisturbed
    assert (output / "_SUCCESS").exists()


@pytest.mark.slow
def test_infer_gives_the_same_bytes_when_three_workers_in_a_row_are_killed(
    undisturbed: Results,
    make_job: Callable[..., InferJob],
    pictures: list[Path],
    hold_reader: Callable[..., Any],
    find_reader: Callable[[Path], int],
    is_running: Callable[[int], bool],
    read_results: Callable[[object], Results],
    wait_until: WaitUntil,
    tmp_path: Path,
) -> None:
    killed: list[int] = []

    def kill_reader_of(path: Path) -> Callable[[int], None]:
        def kill(reading: int) -> None:
            if reading > 1:
                return
            pid = find_reader(path)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            wait_until(lambda: not is_running(pid), "the end of the worker")

        return kill

    first, second, third = pictures[5], pictures[16], pictures[29]
    with (
        hold_reader(first, kill_reader_of(first)) as first_failures,
        hold_reader(second, kill_reader_of(second)) as second_failures,
        hold_reader(third, kill_reader_of(third)) as third_failures,
    ):
        outcome = run_inference(make_job(tmp_path / "run", workers=2))
    assert not [*first_failures, *second_failures, *third_failures]
    assert len(set(killed)) == 3
    assert read_results(outcome.run) == undisturbed


def test_infer_accounts_once_for_images_that_changed_after_they_were_listed(
    undisturbed: Results,
    make_job: Callable[..., InferJob],
    pictures: list[Path],
    hold_reader: Callable[..., Any],
    read_results: Callable[[object], Results],
    tmp_path: Path,
) -> None:
    output = tmp_path / "run"
    # Of the last part the first image becomes another one, and the second becomes none.
    replaced, ruined = pictures[30], pictures[31]
    other = pictures[0].read_bytes()
    contents = {path: path.read_bytes() for path in (replaced, ruined)}

    def change(reading: int) -> None:
        # What is listed stands in the record by now.
        assert json.loads((output / "run.json").read_bytes())["num_inputs"] == 33
        replaced.write_bytes(other)
        ruined.write_bytes(contents[ruined][:100])

    try:
        with hold_reader(pictures[0], change) as failures:
            outcome = run_inference(make_job(output))
    finally:
        for path, content in contents.items():
            path.write_bytes(content)
    assert not failures
    found = read_results(output)

    last, first = "parts/part-000000010.jsonl", "parts/part-000000000.jsonl"
    rows = [json.loads(line) for line in undisturbed[last].splitlines()]
    seen = json.loads(undisturbed[first].splitlines()[0])["detections"]
    assert rows[0]["detections"] != seen
    rows[0]["detections"] = seen
    wanted = [rows[0], rows[2]]
    assert [json.loads(line) for line in found.pop(last).splitlines()] == wanted
    (error,) = [json.loads(line) for line in found.pop("errors/part-000000010.jsonl").splitlines()]
    assert (error["uri"], error["exception"]) == (str(ruined), "ImageError")
    assert (outcome.totals.num_images, outcome.totals.num_errors) == (31, 2)
    ids = [row["image_id"] for row in json.loads(found["images.json"])]
    assert len(ids) == len(set(ids)) == 31
    # Every other part, and every other error, is what it would have been.
    kept = {name for name in undisturbed if "/" in name} - {last}
    assert {name: found[name] for name in found if "/" in name} == {
        name: undisturbed[name] for name in kept
    }
