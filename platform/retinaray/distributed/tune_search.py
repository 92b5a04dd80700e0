"""A sweep's space, search and scheduler in Ray Tune's terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher

from retinaray.config.schema import SweepConfig
from retinaray.config.search_space import Domain, encode_choice

# A trial's end is its own to choose: the scheduler only stops what is weak on the way.
_NO_LAST_EPOCH = 1_000_000


def make_space(domains: Sequence[Domain], *, is_grid: bool) -> dict[str, Any]:
    """Tune's parameter space, by dotted key.

    Args:
        domains: What is searched; choices only when `is_grid`.
        is_grid: Every combination instead of draws.
    """
    return {domain.key: _make_domain(domain, is_grid=is_grid) for domain in domains}


def _make_domain(domain: Domain, *, is_grid: bool) -> Any:
    values: tuple[Any, ...] = tuple(map(encode_choice, domain.values))
    if domain.kind == "choice":
        return tune.grid_search(list(values)) if is_grid else tune.choice(list(values))
    low, high = values[:2]
    # Tune draws the upper end of whole numbers in steps of more than one only.
    if domain.kind == "quniform" and not (domain.is_integer and values[2] == 1):
        return (tune.qrandint if domain.is_integer else tune.quniform)(low, high, values[2])
    if domain.is_integer:
        # Tune leaves the upper end of these out.
        draw_integer = tune.lograndint if domain.kind == "loguniform" else tune.randint
        return draw_integer(low, high + 1)
    return (tune.loguniform if domain.kind == "loguniform" else tune.uniform)(low, high)


def make_search(
    sweep: SweepConfig, first_points: Sequence[Mapping[str, object]], *, seed: int
) -> Searcher | SearchAlgorithm:
    """The search algorithm.

    Args:
        sweep: How to search.
        first_points: What the first trials are: a value for every searched key.
        seed: Of the draws.
    """
    points = [{key: encode_choice(value) for key, value in p.items()} for p in first_points]
    if sweep.search == "tpe":
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return OptunaSearch(
            sampler=optuna.samplers.TPESampler(seed=seed),
            points_to_evaluate=points or None,
            metric="score",
            mode="max",
        )
    return BasicVariantGenerator(points_to_evaluate=points or None, random_state=seed)


def make_scheduler(sweep: SweepConfig) -> TrialScheduler:
    """The scheduler; it counts in epochs, which a restored trial continues, not in reports."""
    if sweep.scheduler == "none":
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    return ASHAScheduler(
        time_attr="epoch",
        max_t=_NO_LAST_EPOCH,
        grace_period=sweep.grace_epochs,
        reduction_factor=sweep.reduction,
    )
