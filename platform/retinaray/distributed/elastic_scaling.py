"""How many workers a training has while its cluster grows and shrinks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2.api.config import ScalingConfig

from retinaray.distributed.failure_policy import MendableFailurePolicy

logger = logging.getLogger(__name__)

_LOOK_S = 10.0
"""Nodes that came or went are noticed after so long."""
# A validation or a slow upload can come before the checkpoint that was asked for. More workers
# some minutes later cost less than the steps of an epoch a second time.
_PATIENCE_S = 300.0
_ANSWER_S = 5.0


def choose_num_workers(num_possible: int, *, num_shares: int) -> int:
    """The largest number of workers that a batch divides among.

    Args:
        num_possible: Workers that there is room for, >= 0.
        num_shares: What must divide: images per step over the parts of each.

    Returns:
        At most `num_possible`; 0 when that is 0.
    """
    return next((n for n in range(num_possible, 0, -1) if num_shares % n == 0), 0)


class BatchScalingPolicy(ElasticScalingPolicy):
    """As many workers as fit and as the batch divides among; grows after a checkpoint.

    The global batch and the order of the images stay what they are.

    Args:
        scaling_config: With the least and the greatest number of workers.
        num_shares: See `choose_num_workers`.
        board: An `EventBoard`: Ray resizes by going back to the last checkpoint, so that one is
            asked for before workers are added, and waited for.
        clock: Seconds.
    """

    def __init__(
        self,
        scaling_config: ScalingConfig,
        *,
        num_shares: int,
        board: Any,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(scaling_config)
        self._num_shares = num_shares
        self._board = board
        self._clock = clock
        self._wanted: ResizeDecision | None = None
        self._asked_s: float | None = None
        self._has_looked = False

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        self._has_looked = True
        num_possible = super()._count_possible_workers(reserved_resources)
        return choose_num_workers(num_possible, num_shares=self._num_shares)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """As many as fit; what was asked of the workers before them is void."""
        self._forget()
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Grow once a checkpoint is kept that was asked for; shrink at once.

        Fewer workers are wanted when a node is gone, and then no checkpoint would come. While one
        is drained, Ray keeps its workers until the deadline and asks for no decision.
        """
        self._has_looked = False
        decision = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        if isinstance(decision, ResizeDecision):
            self._wanted = decision
        elif self._has_looked:
            # Ray asks several times between two looks; only a look says that there is no room.
            self._forget()
        if self._wanted is None:
            return NoopDecision()
        is_growth = self._wanted.num_workers > worker_group_state.num_workers
        # Between two looks too: each step from the checkpoint to the next look is taken twice.
        if is_growth and not self._may_grow():
            return NoopDecision()
        decision = self._wanted
        self._forget()
        return decision

    def _forget(self) -> None:
        self._wanted = None
        self._asked_s = None

    def _may_grow(self) -> bool:
        """Whether the checkpoint is kept or was waited for too long; asks for it at first."""
        if self._asked_s is None:
            self._asked_s = self._clock()
            self._board.ask_for_checkpoint.remote()
            return False
        if self._has_checkpoint():
            return True
        waited_s = self._clock() - self._asked_s
        if waited_s < _PATIENCE_S:
            return False
        self._board.post.remote({"kind": "late", "seconds": round(waited_s, 1)})
        return True

    def _has_checkpoint(self) -> bool:
        try:
            return bool(ray.get(self._board.has_checkpoint.remote(), timeout=_ANSWER_S))
        except RayError as error:
            logger.info("the driver does not answer: %s", error)
            return False


class RunTrainer(TorchTrainer):
    """Ray's trainer with what it has no setting for.

    Args:
        policy: Decides about the number of workers; None = as many as asked for, always.
        board: An `EventBoard`, for what becomes of the workers.
        is_cleaned: Whether Ray's cleaner of stopped runs is started. It is not for a trial, whose
            sweep has a janitor: where the cleaner cannot do its work it never ends.
        **options: As for TorchTrainer.
    """

    def __init__(
        self,
        *args: Any,
        policy: BatchScalingPolicy | None,
        board: Any,
        is_cleaned: bool,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._policy = policy
        self._board = board
        self._is_cleaned = is_cleaned

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        if self._is_cleaned:
            return callbacks
        return [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        if self._policy is not None:
            options["scaling_policy"] = self._policy
        options["failure_policy"] = MendableFailurePolicy(
            self.run_config.failure_config,  # type: ignore[arg-type]  # of Ray's second generation
            self._board,
        )
        return super()._initialize_and_run_controller(**options)  # type: ignore[misc]


def make_scaling(
    num_workers: int, min_workers: int, *, resources: dict[str, float]
) -> ScalingConfig:
    """Ray's description of the workers; a fixed number when both are the same."""
    return ScalingConfig(
        num_workers=num_workers if min_workers == num_workers else (min_workers, num_workers),
        use_gpu="GPU" in resources,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=_LOOK_S,
    )
