"""How many trials fit a cluster at once."""

from __future__ import annotations

import itertools

import pytest

from retinaray.assembly.job_plan_workers import ClusterSize, SweepPlan, WorkerPlan, plan_sweep
from retinaray.errors import ClusterError


def _cluster(num_cpus: float, num_gpus: float = 0) -> ClusterSize:
    return ClusterSize(num_cpus=num_cpus, num_gpus=num_gpus, num_nodes=1, is_local=False)


@pytest.mark.parametrize(
    ("num_trials", "num_concurrent", "num_workers", "cluster", "expected"),
    [
        pytest.param(
            16, None, 1, _cluster(2), SweepPlan(2, WorkerPlan(1, 1, 0, 1)), id="a trial per core"
        ),
        pytest.param(
            16, 1, 1, _cluster(8), SweepPlan(1, WorkerPlan(1, 1, 0, 8)), id="one has all cores"
        ),
        pytest.param(
            1, None, 1, _cluster(8), SweepPlan(1, WorkerPlan(1, 1, 0, 8)), id="only one trial"
        ),
        pytest.param(
            3, 50, 2, _cluster(12), SweepPlan(3, WorkerPlan(2, 1, 0, 2)), id="50 asked, 3 trials"
        ),
        # 16 processors / (2 workers * 2 trials) = 4 threads.
        pytest.param(
            8, 2, 2, _cluster(16, 4), SweepPlan(2, WorkerPlan(2, 1, 1, 4)), id="all four GPUs"
        ),
        pytest.param(
            8, None, 3, _cluster(16, 4), SweepPlan(1, WorkerPlan(3, 1, 1, 5)), id="one GPU idle"
        ),
        pytest.param(
            9, None, 1, _cluster(4, 8), SweepPlan(4, WorkerPlan(1, 1, 1, 1)), id="a CPU per GPU"
        ),
        pytest.param(
            9, None, 1, _cluster(2.5), SweepPlan(2, WorkerPlan(1, 1, 0, 1)), id="part of a CPU"
        ),
    ],
)
def test_plan_sweep_fits_trials_into_the_cluster(
    num_trials: int,
    num_concurrent: int | None,
    num_workers: int,
    cluster: ClusterSize,
    expected: SweepPlan,
) -> None:
    plan = plan_sweep(
        num_trials=num_trials,
        num_concurrent=num_concurrent,
        num_workers=num_workers,
        cluster=cluster,
    )
    assert plan == expected


@pytest.mark.parametrize(
    ("num_concurrent", "num_workers", "cluster", "message"),
    [
        pytest.param(
            8,
            2,
            _cluster(16, 4),
            r"sweep\.concurrent=8: 8 trials x 2 GPUs need 16 GPUs, the cluster has 4: "
            r"lower --concurrent to 2, lower --workers, or add nodes",
            id="GPUs",
        ),
        pytest.param(
            3,
            1,
            _cluster(2),
            r"3 trials x 1 CPU need 3 CPUs, the cluster has 2: lower --concurrent to 2",
            id="CPUs",
        ),
        pytest.param(
            8,
            1,
            _cluster(4, 8),
            r"8 trials x 1 CPU need 8 CPUs, the cluster has 4: lower --concurrent to 4",
            id="GPUs without CPUs",
        ),
        pytest.param(
            99,
            1,
            _cluster(2),
            r"sweep\.concurrent=99: 20 trials x 1 CPU need 20 CPUs",
            id="no more than there are trials",
        ),
        pytest.param(
            None,
            5,
            _cluster(16, 4),
            r"run\.workers=5: a trial needs 5 GPUs, the cluster has 4: lower --workers",
            id="one trial alone",
        ),
        pytest.param(
            1,
            1,
            _cluster(0.5),
            r"run\.workers=1: a trial needs 1 CPU, the cluster has 0\.5",
            id="half a processor",
        ),
    ],
)
def test_plan_sweep_refuses_with_the_numbers_when_it_does_not_fit(
    num_concurrent: int | None, num_workers: int, cluster: ClusterSize, message: str
) -> None:
    with pytest.raises(ClusterError, match=message):
        plan_sweep(
            num_trials=20, num_concurrent=num_concurrent, num_workers=num_workers, cluster=cluster
        )


@pytest.mark.parametrize("num_gpus", [0, 1, 3, 4, 8, 64])
def test_plan_sweep_never_takes_more_than_the_cluster_has(num_gpus: int) -> None:
    num_planned = num_refused = 0
    for num_cpus, workers, trials, concurrent in itertools.product(
        (0.5, 1, 2, 3.5, 7, 16, 100), (1, 2, 3, 8), (1, 2, 9, 40), (None, 1, 2, 5, 50)
    ):
        cluster = _cluster(num_cpus, num_gpus)
        slots = min(num_gpus or num_cpus, num_cpus) // workers
        wanted = min(concurrent or 1, trials)
        try:
            plan = plan_sweep(
                num_trials=trials, num_concurrent=concurrent, num_workers=workers, cluster=cluster
            )
        except ClusterError:
            num_refused += 1
            assert wanted > slots
            continue
        num_planned += 1
        total = plan.num_concurrent * plan.workers.num_workers
        assert 1 <= plan.num_concurrent <= trials
        assert plan.num_concurrent == (wanted if concurrent else min(slots, trials))
        assert plan.workers.num_workers == workers
        assert total * plan.workers.num_cpus <= num_cpus
        assert total * plan.workers.num_gpus <= num_gpus
        assert 1 <= total <= total * plan.workers.num_threads <= num_cpus
    assert num_planned > 20
    assert num_refused > 20
