"""The learning rate of each step, as a pure function."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then cosine decay or milestones.

    Attributes:
        peak_lr: Rate after warm-up.
        total_steps: Length of the training, >= 1.
        warmup_steps: Steps of the warm-up, which starts at a tenth of the peak.
        kind: `cosine` falls to 1 % of the peak; `milestones` multiplies by `gamma` at each
            milestone.
        milestones: Steps, for `milestones`.
        gamma: Factor, for `milestones`.

    Source: ODTK's warm-up (0.9 * step / warmup + 0.1); Loshchilov and Hutter 2016
    (arXiv:1608.03983) for cosine.
    """

    peak_lr: float
    total_steps: int
    warmup_steps: int = 0
    kind: Literal["cosine", "milestones"] = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def rate_at(self, step: int) -> float:
        """Learning rate of a step counted from 0."""
        if step < self.warmup_steps:
            return self.peak_lr * (0.1 + 0.9 * step / self.warmup_steps)
        if self.kind == "milestones":
            passed = sum(1 for milestone in self.milestones if milestone <= step)
            return self.peak_lr * float(self.gamma**passed)
        remaining = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / remaining)
        return self.peak_lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
