"""What it takes to have training images ready, measured where it is done."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class InputCost:
    """Time that images took to be read, decoded, augmented and placed.

    Attributes:
        num_images: How many.
        wall_s: Seconds, one image after the other.
        cpu_s: Processor seconds of the thread that did it; the rest was waiting, for storage or for
            a core.
        num_processes: Loader processes that take turns; 0 = the training process itself.
    """

    num_images: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    num_processes: int = 0

    def __add__(self, other: InputCost) -> InputCost:
        """Both together; as many processes as the larger one has."""
        return InputCost(
            num_images=self.num_images + other.num_images,
            wall_s=self.wall_s + other.wall_s,
            cpu_s=self.cpu_s + other.cpu_s,
            num_processes=max(self.num_processes, other.num_processes),
        )

    @property
    def images_per_s(self) -> float | None:
        """What one process gives; None if nothing was measured."""
        return self.num_images / self.wall_s if self.wall_s > 0 else None

    @property
    def images_per_core_s(self) -> float | None:
        """What one core gives that waits for nothing; None if nothing was measured."""
        return self.num_images / self.cpu_s if self.cpu_s > 0 else None


class CostWatch:
    """Measures one image from its creation on.

    Args:
        num_processes: Loader processes that take turns.
    """

    def __init__(self, num_processes: int) -> None:
        self._num_processes = num_processes
        self._wall_s, self._cpu_s = time.perf_counter(), time.thread_time()

    def stop(self) -> InputCost:
        """The cost until now."""
        return InputCost(
            num_images=1,
            wall_s=time.perf_counter() - self._wall_s,
            cpu_s=time.thread_time() - self._cpu_s,
            num_processes=self._num_processes,
        )
