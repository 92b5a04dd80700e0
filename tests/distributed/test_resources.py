from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from retinaray.assembly.job_plan_workers import (
    ClusterSize,
    WorkerPlan,
    plan_inference,
    plan_training,
)
from retinaray.config.nodes import ClusterConfig
from retinaray.distributed.resources import connect
from retinaray.errors import ClusterError

LAPTOP = ClusterSize(num_cpus=2, num_gpus=0, num_nodes=1, is_local=True)
SERVER = ClusterSize(num_cpus=16, num_gpus=0, num_nodes=1, is_local=True)
GPU_BOX = ClusterSize(num_cpus=16, num_gpus=4, num_nodes=1, is_local=False)
# As many GPUs as processors: no processor would be left for Ray Data at one each.
THIN_GPU_BOX = ClusterSize(num_cpus=8, num_gpus=8, num_nodes=2, is_local=False)


@pytest.mark.parametrize(
    ("num_workers", "cluster", "expected"),
    [
        pytest.param(1, LAPTOP, WorkerPlan(1, 1, 0, 2), id="one worker computes with all cores"),
        pytest.param(2, LAPTOP, WorkerPlan(2, 1, 0, 1), id="as many workers as cores"),
        pytest.param(3, SERVER, WorkerPlan(3, 1, 0, 5), id="16 / 3 = 5 threads, rounded down"),
        pytest.param(
            2, replace(LAPTOP, num_cpus=2.5), WorkerPlan(2, 1, 0, 1), id="part of a processor"
        ),
        pytest.param(2, GPU_BOX, WorkerPlan(2, 1, 1, 8), id="two of four GPUs"),
        pytest.param(4, GPU_BOX, WorkerPlan(4, 1, 1, 4), id="all GPUs"),
        pytest.param(8, THIN_GPU_BOX, WorkerPlan(8, 1, 1, 1), id="one processor for each GPU"),
    ],
)
def test_plan_training_gives_each_worker_its_share(
    num_workers: int, cluster: ClusterSize, expected: WorkerPlan
) -> None:
    assert plan_training(num_workers, cluster) == expected


@pytest.mark.parametrize(
    ("num_workers", "cluster", "message"),
    [
        pytest.param(5, GPU_BOX, "run.workers=5 needs 5 GPUs, the cluster has 4", id="GPUs"),
        pytest.param(3, LAPTOP, "run.workers=3 needs 3 CPUs, the cluster has 2", id="CPUs"),
        pytest.param(
            2, replace(LAPTOP, num_cpus=1.5), "needs 2 CPUs, the cluster has 1.5", id="half a CPU"
        ),
        pytest.param(
            4,
            replace(GPU_BOX, num_cpus=3),
            "needs 4 CPUs, the cluster has 3",
            id="GPUs without CPUs",
        ),
    ],
)
def test_plan_training_refuses_when_cluster_is_too_small(
    num_workers: int, cluster: ClusterSize, message: str
) -> None:
    with pytest.raises(ClusterError, match=message):
        plan_training(num_workers, cluster)


@pytest.mark.parametrize(
    ("num_workers", "num_parts", "cluster", "expected"),
    [
        pytest.param(None, 99, LAPTOP, WorkerPlan(1, 1.0, 0, 2), id="two cores make one worker"),
        pytest.param(None, 99, SERVER, WorkerPlan(8, 1.0, 0, 2), id="a worker per two cores"),
        pytest.param(None, 99, GPU_BOX, WorkerPlan(4, 1.0, 1, 4), id="a worker per GPU"),
        pytest.param(None, 3, GPU_BOX, WorkerPlan(3, 1.0, 1, 5), id="no more workers than parts"),
        pytest.param(2, 99, GPU_BOX, WorkerPlan(2, 1.0, 1, 8), id="fewer workers than GPUs"),
        pytest.param(2, 99, LAPTOP, WorkerPlan(2, 0.5, 0, 1), id="two workers share one CPU"),
        pytest.param(3, 99, LAPTOP, WorkerPlan(3, 0.33, 0, 1), id="a third, rounded down"),
        pytest.param(
            None, 99, replace(LAPTOP, num_cpus=1), WorkerPlan(1, 0.5, 0, 1), id="one core in all"
        ),
        # 7 of 8 processors for 8 workers: 0.875, rounded down.
        pytest.param(None, 99, THIN_GPU_BOX, WorkerPlan(8, 0.87, 1, 1), id="CPUs as many as GPUs"),
        pytest.param(100, 999, LAPTOP, WorkerPlan(100, 0.01, 0, 1), id="the least share"),
    ],
)
def test_plan_inference_gives_each_worker_its_share(
    num_workers: int | None, num_parts: int, cluster: ClusterSize, expected: WorkerPlan
) -> None:
    assert plan_inference(num_workers, num_parts, cluster) == expected


@pytest.mark.parametrize("num_cpus", [1, 1.5, 2, 3, 4, 8, 16, 63, 64])
@pytest.mark.parametrize("num_workers", [None, 1, 2, 3, 7, 40])
def test_plan_inference_leaves_half_a_processor_free(
    num_workers: int | None, num_cpus: float
) -> None:
    cluster = replace(LAPTOP, num_cpus=num_cpus)
    plan = plan_inference(num_workers, 1000, cluster)
    assert 0 < plan.num_workers * plan.num_cpus <= max(num_cpus - 1, 0.5)


@pytest.mark.parametrize(
    ("num_workers", "cluster", "message"),
    [
        pytest.param(5, GPU_BOX, "workers=5 of 1 GPUs each do not fit on the 4 GPUs", id="GPUs"),
        pytest.param(101, LAPTOP, "workers=101 is too many for 2 CPUs", id="CPUs"),
    ],
)
def test_plan_inference_refuses_when_cluster_is_too_small(
    num_workers: int, cluster: ClusterSize, message: str
) -> None:
    with pytest.raises(ClusterError, match=message):
        plan_inference(num_workers, 1000, cluster)


@pytest.mark.parametrize(
    ("share", "num_workers", "num_gpus"), [(1.0, 4, 1.0), (0.5, 8, 0.5), (0.33, 12, 0.3333)]
)
def test_plan_inference_fills_every_gpu(share: float, num_workers: int, num_gpus: float) -> None:
    plan = plan_inference(None, 1000, GPU_BOX, gpus_per_worker=share)
    assert (plan.num_workers, plan.num_gpus) == (num_workers, num_gpus)
    # The engines of one GPU must fit on it as Ray counts.
    assert num_workers // 4 * num_gpus <= 1


def test_plan_inference_leaves_the_decoders_their_processors() -> None:
    plan = plan_inference(None, 1000, GPU_BOX, decode_cpus=14)
    # 16 - 14 - 1 for Ray Data is one processor for four workers.
    assert (plan.num_workers, plan.num_cpus) == (4, 0.25)
    with pytest.raises(ClusterError, match="num_cpus=16 leaves none of 16 CPUs"):
        plan_inference(None, 1000, GPU_BOX, decode_cpus=16)
    with pytest.raises(ClusterError, match=r"workers=9 of 0\.5 GPUs each do not fit on the 4"):
        plan_inference(9, 1000, GPU_BOX, gpus_per_worker=0.5)


def test_counting_on_plans_for_gpus_that_an_autoscaler_will_bring() -> None:
    head = ClusterSize(num_cpus=0, num_gpus=0, num_nodes=1, is_local=False)
    with pytest.raises(ClusterError, match="say with --gpus or --cpus how many an autoscaler"):
        plan_training(4, head)
    plan = plan_training(4, head.counting_on(num_cpus=None, num_gpus=4))
    assert (plan.num_workers, plan.num_gpus, plan.num_cpus) == (4, 1, 1)
    plan = plan_training(4, head.counting_on(num_cpus=16, num_gpus=None))
    assert (plan.num_gpus, plan.num_threads) == (0, 4)


def test_counting_on_leaves_gpus_to_others() -> None:
    assert (
        plan_inference(None, 1000, GPU_BOX.counting_on(num_cpus=None, num_gpus=2)).num_workers == 2
    )
    assert plan_training(2, GPU_BOX.counting_on(num_cpus=None, num_gpus=0)).num_gpus == 0


@pytest.mark.parametrize(
    "wanted", [{"num_cpus": 3, "num_gpus": None}, {"num_cpus": None, "num_gpus": 1}]
)
def test_counting_on_refuses_when_nobody_brings_more_to_one_machine(
    wanted: dict[str, int | None],
) -> None:
    with pytest.raises(ClusterError, match="there is no cluster to grow: set RAY_ADDRESS"):
        LAPTOP.counting_on(**wanted)


@pytest.mark.local_ray
def test_connect_says_what_an_autoscaler_has_to_bring(
    ray_cluster: ClusterSize, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # An address makes it a cluster that may grow; the connection that is there is kept.
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with (
        caplog.at_level("INFO", "retinaray.distributed.resources"),
        connect(counting_on=ClusterConfig(gpus=8)) as cluster,
    ):
        assert (cluster.num_gpus, cluster.num_cpus) == (8, max(8, ray_cluster.num_cpus))
    assert "8 GPUs; 2 and 0 are there, an autoscaler has to bring the rest" in caplog.text


@pytest.mark.local_ray
def test_connect_keeps_the_connection_that_is_there(ray_cluster: ClusterSize) -> None:
    import ray

    with connect() as again:
        assert again == ray_cluster
    assert ray.is_initialized()
    assert ray_cluster.num_cpus >= 2
    assert (ray_cluster.num_gpus, ray_cluster.num_nodes) == (0, 1)


@pytest.mark.local_ray
@pytest.mark.usefixtures("ray_cluster")
def test_connect_demands_a_token_for_its_own_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        # Set first, so that the test's end takes away what connect() sets.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with connect():
        assert os.environ["RAY_AUTH_MODE"] == "token"
        first = os.environ["RAY_AUTH_TOKEN"]
    assert len(bytes.fromhex(first)) == 32


@pytest.mark.local_ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("name", ["RAY_AUTH_MODE", "RAY_ADDRESS"])
def test_connect_leaves_authentication_alone_when_the_user_chose(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(other, "")
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, "disabled")
    with connect():
        assert os.environ[name] == "disabled"
        assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.local_ray
def test_connect_refuses_when_no_ray_is_at_the_address() -> None:
    script = (
        "from retinaray.distributed.resources import connect\n"
        "from retinaray.errors import ClusterError\n"
        "try:\n"
        "    connect().__enter__()\n"
        "except ClusterError as error:\n"
        "    raise SystemExit(str(error))\n"
    )
    # Port 9 is `discard`: nobody listens there.
    answer = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert answer.returncode == 1
    assert "cannot reach Ray at 127.0.0.1:9 (RAY_ADDRESS)" in answer.stderr
    assert "Traceback" not in answer.stderr
