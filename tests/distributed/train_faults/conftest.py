"""A training of twelve steps with one checkpoint at its end, and what it gives undisturbed.

Whatever else is kept comes from a stop, a notice, or an order; so a test sees what it costs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import retinaray
from retinaray.config.loading import to_dict
from retinaray.config.schema import TrainJob
from retinaray.demo.scenes import SceneSet
from retinaray.distributed.train import run_training

NUM_STEPS = 12


@pytest.fixture(scope="session")
def make_long_job(make_train_job: Callable[..., TrainJob]) -> Callable[..., TrainJob]:
    """Twelve steps in six epochs, validated at the end; changes as in `make_train_job`."""

    def make(output: Path, **changes: object) -> TrainJob:
        return make_train_job(output, **({"run__epochs": 6, "run__val_every": 6} | changes))

    return make


@pytest.fixture(scope="session")
def reference(
    ray_cluster: object,
    make_long_job: Callable[..., TrainJob],
    tmp_path_factory: pytest.TempPathFactory,
    read_tensors: Callable[[Path], dict[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """The last weights of the training when nothing happens."""
    outcome = run_training(make_long_job(tmp_path_factory.mktemp("reference") / "model.pth"))
    assert (outcome.steps, outcome.recoveries, outcome.skipped_images) == (NUM_STEPS, (), 0)
    return read_tensors(Path(outcome.run_folder) / "last.pth")


@pytest.fixture(scope="session")
def check_same(
    read_tensors: Callable[[Path], dict[str, torch.Tensor]],
) -> Callable[[Path, dict[str, torch.Tensor]], None]:
    """Compare a weights file with tensors, bit for bit."""

    def check(path: Path, wanted: dict[str, torch.Tensor]) -> None:
        found = read_tensors(path)
        assert found.keys() == wanted.keys()
        assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]

    return check


@pytest.fixture(scope="session")
def image(scenes: SceneSet) -> Path:
    """A training image, read once in each epoch of two steps."""
    return sorted(scenes.images.glob("train*"))[0]


@pytest.fixture(scope="session")
def list_complete() -> Callable[[Path], list[int]]:
    """Steps of the complete checkpoints of a run folder, rising."""

    def find(folder: Path) -> list[int]:
        names = [path.parent.name for path in folder.glob("ray_train/step_*/checkpoint.json")]
        return sorted(int(name.split("_")[1]) for name in names)

    return find


_DRIVER = """
import json, sys
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import TrainJob
from retinaray.distributed.train import run_training
run_training(load_from_dict(TrainJob, json.loads(sys.argv[1])))
"""
_ELASTIC_DRIVER = """
import json, sys
from pathlib import Path
from retinaray.assembly.job_plan_workers import WorkerPlan
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import TrainJob
from retinaray.distributed.resources import connect
from retinaray.distributed.run_store import RunStore
from retinaray.distributed.stop_signals import StopSignal
from retinaray.reporting.training_log import TrainingLog
job = load_from_dict(TrainJob, json.loads(sys.argv[1]))
folder = Path(sys.argv[2])
with connect(), TrainingLog(folder) as log:
    from retinaray.distributed.train_events import TrainEvents
    from retinaray.distributed.train_run import RunSetup, fit_workers
    setup = RunSetup(
        run_id="elastic",
        store=RunStore(str(folder)),
        events=TrainEvents(folder, log.write),
        stop=StopSignal(),
        min_workers=int(sys.argv[3]),
    )
    fit_workers(job, WorkerPlan(job.run.workers, 1, 0, 1), setup)
"""


@pytest.fixture
def start_process(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a script with arguments and variables; its output goes to driver.log."""
    processes: list[subprocess.Popen[bytes]] = []
    with (tmp_path / "driver.log").open("wb") as log:

        def start(script: str, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
            root = str(Path(retinaray.__file__).parents[1])
            environment = {**os.environ, "PYTHONPATH": root, **variables}
            command = [sys.executable, "-c", script, *arguments]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            processes.append(process)
            return process

        try:
            yield start
        finally:
            for process in processes:
                process.kill()
                process.wait()


@pytest.fixture
def start_driver(
    start_process: Callable[..., subprocess.Popen[bytes]],
) -> Callable[[TrainJob], subprocess.Popen[bytes]]:
    """Start a job as a process with a Ray of its own."""
    return lambda job: start_process(_DRIVER, json.dumps(to_dict(job)))


@pytest.fixture
def start_elastic(
    start_process: Callable[..., subprocess.Popen[bytes]],
) -> Callable[..., subprocess.Popen[bytes]]:
    """Start a job on a cluster, with so many workers at least; its run folder is given."""

    def start(job: TrainJob, folder: Path, *, min_workers: int, address: str) -> Any:
        arguments = (json.dumps(to_dict(job)), str(folder), str(min_workers))
        return start_process(_ELASTIC_DRIVER, *arguments, RAY_ADDRESS=address)

    return start


@pytest.fixture
def ray_nodes(ray_cluster: object) -> Iterator[Any]:
    """A cluster of a head that runs no work and two nodes of one processor each."""
    from ray.cluster_utils import Cluster

    # Settings of the session's Ray, its token among them, hold for this one too: see `connect`.
    assert os.environ["RAY_AUTH_MODE"] == "token"
    size: dict[str, Any] = {"object_store_memory": 80_000_000, "include_dashboard": False}
    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **size})
    try:
        # A driver connects to any node of its own address; that must be the head.
        for address in ("127.0.0.2", "127.0.0.3"):
            cluster.add_node(num_cpus=1, node_ip_address=address, **size)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture
def call_later() -> Callable[..., Callable[[int], None]]:
    """For `hold_reader`: call_later(number, act) acts at the reading of that number alone."""

    def make(number: int, act: Callable[[], None]) -> Callable[[int], None]:
        return lambda reading: act() if reading == number else None

    return make


@pytest.fixture
def signal_workers(find_workers: Callable[[str], list[int]]) -> Callable[[int], list[int]]:
    """Send a signal to each training worker of this test's Ray; gives their process numbers."""

    def send(number: int) -> list[int]:
        pids = find_workers("ray::RayTrainWorker")
        for pid in pids:
            os.kill(pid, number)
        return pids

    return send
