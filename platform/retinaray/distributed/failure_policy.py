"""Which failures of workers are worth another try."""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import PreemptionError, TrainingFailedError, WorkerGroupError

from retinaray.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    DivergenceError,
    RetinarayError,
)

# What a person has to mend: the next try would end the same way, after minutes. A divergence too:
# the same batches come again.
_USERS_FAULTS = (ConfigError, DatasetError, CheckpointError, DivergenceError)


class MendableFailurePolicy(DefaultFailurePolicy):
    """Ray's counting of failures, but for those that no other try can mend.

    Lives in Ray's controller.

    Args:
        failure_config: Failures that are allowed.
        board: An `EventBoard`. It is told of machines that went as announced: Ray counts them apart
            and calls nobody back.
    """

    def __init__(self, failure_config: FailureConfig, board: Any) -> None:
        super().__init__(failure_config)
        self._board = board

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Whether the workers are started again."""
        if find_users_fault(training_failed_error) is not None:
            return FailureDecision.RAISE
        if isinstance(training_failed_error, PreemptionError):
            lost = training_failed_error.preemption_info.preempted_ranks
            event = {"kind": "failure", "num_workers": len(lost)}
            self._board.post.remote({**event, "reason": "their machine went as announced"})
        decision: FailureDecision = super().make_decision(training_failed_error)
        return decision


def find_users_fault(error: BaseException) -> RetinarayError | None:
    """The fault of settings or data, or the divergence, in a worker's words; none = other."""
    if not isinstance(error, WorkerGroupError):
        return None
    for failure in error.worker_failures.values():
        fault = _unwrap(failure)
        if isinstance(fault, _USERS_FAULTS):
            return type(fault)(_strip_stack(fault))
    return None


def is_users_fault(failure: BaseException) -> bool:
    """Whether what a worker raised is a fault of settings or data, or a divergence."""
    return isinstance(_unwrap(failure), _USERS_FAULTS)


def _unwrap(failure: BaseException) -> BaseException:
    fault: BaseException = getattr(failure, "_base_exc", failure)
    return fault


def _strip_stack(fault: RetinarayError) -> str:
    """The message without the stack that a loader's process puts before it."""
    own = f"{type(fault).__module__}.{type(fault).__qualname__}: "
    return str(fault).rpartition(own)[2].strip()
