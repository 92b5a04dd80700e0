"""What the host learns from steps that the device has finished: votes to stop, and divergence.

Reading a value of the step just sent would make the host wait for the device. Each step's flags are
therefore copied on their own, and read when two newer steps have been sent.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from retinaray.errors import DivergenceError
from retinaray.training.step import StepResult

READ_DELAY = 2
_IDS_NAMED = 8


@dataclass(frozen=True)
class _Flags:
    """Flags of a step on their way to the host, with its number and its images."""

    values: Tensor
    copied: torch.cuda.Event | None
    step: int
    image_ids: tuple[int | str, ...]

    def read(self) -> tuple[bool, bool]:
        """Whether somebody wants to stop, and whether the step was taken."""
        if self.copied is not None:
            self.copied.synchronize()
        num_stop_votes, is_finite = self.values.tolist()
        return num_stop_votes > 0, is_finite > 0


class StepSignals:
    """Follows the flags of the steps; all workers see the same, since all flags are shared.

    Args:
        max_skipped_steps: Steps in a row without a finite gradient that are a divergence, >= 1.
        num_skipped_in_a_row: Of these, directly before the first step that is sent.

    Attributes:
        must_stop: Whether somebody voted to stop.
        num_skipped_in_a_row: Steps without a finite gradient up to the last one that was read.
    """

    def __init__(self, *, max_skipped_steps: int, num_skipped_in_a_row: int = 0) -> None:
        self._max_skipped_steps = max_skipped_steps
        self._sent: deque[_Flags] = deque()
        self._last_skipped: _Flags | None = None
        self.must_stop = False
        self.num_skipped_in_a_row = num_skipped_in_a_row

    @property
    def has_diverged(self) -> bool:
        """Whether too many steps in a row were skipped, the newest of them seen here."""
        return (
            self._last_skipped is not None and self.num_skipped_in_a_row >= self._max_skipped_steps
        )

    def send(self, result: StepResult, step: int, image_ids: tuple[int | str, ...]) -> None:
        """Let a step's flags go to the host.

        Args:
            result: Of the step.
            step: Its number, counted from 1.
            image_ids: This worker's images in it.
        """
        values = torch.stack((result.num_stop_votes, result.is_finite.to(torch.float32)))
        copied = None
        if values.is_cuda:
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = pinned.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._sent.append(_Flags(values, copied, step, image_ids))

    def receive(self, *, num_behind: int = READ_DELAY) -> None:
        """Read the flags of all steps but the newest ones.

        Args:
            num_behind: How many are left unread; 0 waits for the device.
        """
        while len(self._sent) > num_behind and not self.has_diverged:
            flags = self._sent.popleft()
            wants_stop, is_finite = flags.read()
            self.must_stop = self.must_stop or wants_stop
            self._last_skipped = None if is_finite else flags
            self.num_skipped_in_a_row = 0 if is_finite else self.num_skipped_in_a_row + 1

    def describe_divergence(self) -> DivergenceError:
        """The error for a training that has diverged; only when it has."""
        assert self._last_skipped is not None
        last = self._last_skipped
        return DivergenceError(
            f"no finite gradient in {self.num_skipped_in_a_row} steps up to step {last.step} "
            f"(last images: {', '.join(map(str, last.image_ids[:_IDS_NAMED]))}): lower the "
            "learning rate (--lr), look at these images with `retinaray doctor`, or allow more "
            "such steps in a row (--max-skipped)"
        )
