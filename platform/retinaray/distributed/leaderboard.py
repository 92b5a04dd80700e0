"""What a person sees while a sweep runs: each validation in a line, failures, the best so far."""

from __future__ import annotations

import logging
from typing import Any

from ray.tune import Callback

logger = logging.getLogger(__name__)


class Leaderboard(Callback):
    """Logs what Ray Tune hears of its trials; it is pickled with the experiment's notes."""

    def __init__(self) -> None:
        self._best: tuple[float, str] | None = None
        self._order: dict[str, int] = {}
        self._epochs: dict[str, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say what a trial tries."""
        del iteration, trials, info
        number = self._order.setdefault(trial.trial_id, len(self._order) + 1)
        logger.info("trial %d (%s) starts: %s", number, trial.trial_id, _show_point(trial.config))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Say what a validation found."""
        del iteration, info
        if self._epochs.get(trial.trial_id) == result["epoch"]:
            # At its end a trial repeats its last report.
            return
        self._epochs[trial.trial_id] = result["epoch"]
        score = float(result["score"])
        if self._best is None or score > self._best[0]:
            self._best = (score, trial.trial_id)
        number = self._order.setdefault(trial.trial_id, len(self._order) + 1)
        logger.info(
            "trial %d (%s) epoch %.4g: score %.4f  AP %s  (best %.4f by trial %d; %s)",
            number,
            trial.trial_id,
            result["epoch"],
            score,
            "-" if result.get("AP") is None else f"{result['AP']:.3f}",
            self._best[0],
            self._order.get(self._best[1], 0),
            _count_states(trials),
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that a trial failed, and why."""
        del iteration, trials, info
        reason = str(trial.get_error() or "unknown").strip().splitlines()[-1]
        logger.warning("trial %s failed: %s", trial.trial_id, reason)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that a trial has ended, or was stopped."""
        del iteration, info
        logger.info("trial %s ended (%s)", trial.trial_id, _count_states(trials))


def _show_point(point: dict[str, Any]) -> str:
    return "  ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in point.items()
    )


def _count_states(trials: list[Any]) -> str:
    states = [trial.status for trial in trials]
    return ", ".join(
        f"{states.count(state)} {name}"
        for state, name in (("TERMINATED", "ended"), ("RUNNING", "running"), ("ERROR", "failed"))
    )
