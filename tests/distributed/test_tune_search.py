"""Spaces, searches and schedulers as Ray Tune takes them; no cluster is started."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import BasicVariantGenerator

from retinaray.config.schema import SweepConfig, TrainJob
from retinaray.config.search_space import Domain, decode_point, parse_space
from retinaray.distributed.tune_search import make_scheduler, make_search, make_space

SPACE: dict[str, object] = {
    "anchors.base_scale": {"loguniform": [1.0, 8.0]},
    "anchors.num_scales": {"quniform": [1, 4, 1]},
    "anchors.ratios": [[1, 2, 0.5], [1.0, 3.0]],
    "model.backbone_weights": [None, "DEFAULT"],
    "loss.keep_best_anchor": [True, False],
    "loss.focal_gamma": {"quniform": [0.5, 2.0, 0.5]},
    "augment.flip": {"uniform": [0.0, 0.5]},
    "optim.warmup_steps": {"loguniform": [1, 4]},
    "run.batch": {"quniform": [2, 6, 2]},
    "run.seed": {"uniform": [1, 3]},
}
FIRST: dict[str, object] = {
    "anchors.base_scale": 4.0,
    "anchors.num_scales": 3,
    "anchors.ratios": [1, 2, 0.5],
    "model.backbone_weights": None,
    "loss.keep_best_anchor": False,
    "loss.focal_gamma": 1.5,
    "augment.flip": 0.5,
    "optim.warmup_steps": 4,
    "run.batch": 6,
    "run.seed": 3,
}


@pytest.fixture
def domains() -> tuple[Domain, ...]:
    """One domain of every kind, whole numbers and lists among them."""
    return parse_space(SPACE, TrainJob)


@pytest.fixture
def _seeded() -> Iterator[None]:
    state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(1)
    np.random.seed(1)
    yield
    random.setstate(state)
    np.random.set_state(numpy_state)


def _do_nothing(point: dict[str, Any]) -> None:
    """Stands for a trial that is never started."""


def _suggest(search: Any, space: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Points of a searcher; scores favour a high flip."""
    assert search.set_search_properties("score", "max", space)
    points = []
    for number in range(count):
        point = search.suggest(f"trial{number}")
        search.on_trial_complete(f"trial{number}", {"score": point["augment.flip"]})
        points.append(decode_point(point))
    return points


@pytest.mark.usefixtures("_seeded")
def test_make_space_draws_what_the_domains_hold_and_both_their_ends(
    domains: tuple[Domain, ...],
) -> None:
    space = make_space(domains, is_grid=False)
    assert list(space) == list(SPACE)
    for domain in domains:
        draws = [decode_point({"k": space[domain.key].sample()})["k"] for _ in range(200)]
        assert all(domain.holds(value) for value in draws), domain
        ends = domain.values if domain.kind == "choice" else domain.values[:2]
        if domain.kind in ("choice", "quniform") or domain.is_integer:
            assert all(Domain("k", "choice", tuple(draws)).holds(end) for end in ends), domain
        if domain.is_integer:
            assert all(isinstance(value, (int, np.integer)) for value in draws)


def test_make_space_makes_every_combination_when_it_is_a_grid() -> None:
    choices: dict[str, object] = {
        "anchors.ratios": [[1, 2], [1, 3], [2, 3]],
        "anchors.levels": ["3-7", "2-7"],
    }
    space = make_space(parse_space(choices, TrainJob), is_grid=True)
    assert space == {
        "anchors.ratios": {"grid_search": ["[1, 2]", "[1, 3]", "[2, 3]"]},
        "anchors.levels": {"grid_search": ["3-7", "2-7"]},
    }


def test_make_search_begins_with_the_first_points_and_stays_in_the_space(
    domains: tuple[Domain, ...],
) -> None:
    search = make_search(SweepConfig(), [FIRST, {**FIRST, "run.seed": 2}], seed=5)
    points = _suggest(search, make_space(domains, is_grid=False), 40)
    assert points[:2] == [FIRST, {**FIRST, "run.seed": 2}]
    for domain in domains:
        values = [point[domain.key] for point in points]
        assert all(domain.holds(value) for value in values), domain
        assert len({str(value) for value in values}) > 1, domain


def test_make_search_follows_its_seed(domains: tuple[Domain, ...]) -> None:
    space = make_space(domains, is_grid=False)
    first, again, other = (
        _suggest(make_search(SweepConfig(), [], seed=seed), space, 6) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_make_search_learns_from_scores(domains: tuple[Domain, ...]) -> None:
    points = _suggest(
        make_search(SweepConfig(), [], seed=0), make_space(domains, is_grid=False), 60
    )
    flips = [float(point["augment.flip"]) for point in points]
    # The first ten are random; a search that went down instead would end near 0.
    assert np.mean(flips[-20:]) > np.mean(flips[:10]) + 0.1


@pytest.mark.parametrize("search", ["random", "grid"])
def test_make_search_draws_without_memory_when_it_is_not_tpe(search: str) -> None:
    config = SweepConfig.model_validate({"search": search})
    assert isinstance(make_search(config, [], seed=0), BasicVariantGenerator)


def test_make_search_random_begins_with_the_first_points(
    domains: tuple[Domain, ...], tmp_path: Path
) -> None:
    search = make_search(SweepConfig(search="random"), [FIRST], seed=0)
    assert isinstance(search, BasicVariantGenerator)
    space = make_space(domains, is_grid=False)
    experiment = tune.Experiment(
        "sweep", _do_nothing, config=space, num_samples=3, storage_path=str(tmp_path)
    )
    search.add_configurations([experiment])
    trials = [search.next_trial() for _ in range(3)]
    points = [decode_point(trial.config) for trial in trials if trial is not None]
    assert len(points) == 3
    assert points[0] == FIRST
    assert all(domain.holds(point[domain.key]) for domain in domains for point in points)


def test_make_scheduler_counts_in_epochs() -> None:
    scheduler = make_scheduler(SweepConfig(grace_epochs=4, reduction=2.0))
    assert isinstance(scheduler, ASHAScheduler)
    assert scheduler._time_attr == "epoch"
    milestones = [milestone for milestone, _ in scheduler._brackets[0]._rungs]
    assert sorted(milestones)[:3] == [4, 8, 16]
    assert max(milestones) >= 1_000_000 / 2


def test_make_scheduler_stops_nobody_when_there_is_none() -> None:
    assert type(make_scheduler(SweepConfig(scheduler="none"))) is FIFOScheduler


def test_make_scheduler_stops_the_weak_after_the_grace() -> None:
    scheduler = make_scheduler(SweepConfig(grace_epochs=3, reduction=3.0))
    assert scheduler.set_search_properties("score", "max")
    trials = [tune.experiment.Trial("trial", trial_id=f"t{n}", stub=True) for n in range(6)]
    for trial in trials:
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]

    def decide(index: int, epoch: int, score: float) -> str:
        result = {"epoch": epoch, "score": score, "training_iteration": 1}
        return scheduler.on_trial_result(None, trials[index], result)  # type: ignore[arg-type]

    # Nobody is stopped before the grace is over, however weak.
    assert [decide(n, 2, 0.5 - 0.1 * n) for n in range(5)] == ["CONTINUE"] * 5
    assert [decide(n, 3, 0.1 * (n + 1)) for n in range(5)] == ["CONTINUE"] * 5
    assert decide(5, 3, 0.05) == "STOP"
