"""Whether a training waits for its images, told once and with what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_MAX_WAIT_SHARE = 0.1
_REPORTS_IN_A_ROW = 3
_BUSY_SHARE = 0.5
"""A process that computes for less than this part of its time waits for storage, or for a core."""


class InputWatch:
    """Follows the reports of a training; says once when the steps keep waiting for images.

    The first report of a start does not count: the loader processes start in it.
    """

    def __init__(self) -> None:
        self._last_step: int | None = None
        self._num_late = 0
        self._is_told = False

    def judge(self, event: Mapping[str, Any]) -> str | None:
        """Take in one progress report; see `TrainingLog.write`.

        Returns:
            What to tell the user, once in a training; None otherwise.
        """
        step = int(event["step"])
        is_start = self._last_step is None or step <= self._last_step
        self._last_step = step
        is_late = not is_start and event["wait_share"] > _MAX_WAIT_SHARE
        self._num_late = self._num_late + 1 if is_late else 0
        if self._is_told or self._num_late < _REPORTS_IN_A_ROW:
            return None
        self._is_told = True
        return describe_shortage(event)


def describe_shortage(event: Mapping[str, Any]) -> str:
    """One report in which the steps wait for images, as a sentence with what to do.

    Args:
        event: A progress report; one without measurements of the input, as an older version wrote
            it, gives the share alone.
    """
    text = f"the steps wait {event['wait_share']:.0%} of their time for images"
    need, gives = event.get("step_images_per_s"), event.get("loader_images_per_s")
    if need is None or gives is None:
        return f"{text}: raise --loader-processes, or keep the images with --cache DIR"
    num_loaders = int(event["num_loaders"])
    who = f"{num_loaders} loader process{'' if num_loaders == 1 else 'es'}"
    if num_loaders == 0:
        who = "the training process itself"
    text += (
        f": those of a worker would take {need:.3g} images/s; {who} can give "
        f"{gives * max(1, num_loaders):.3g}"
    )
    wanted = max(num_loaders + 1, math.ceil(need / gives))
    more = f"set --loader-processes {wanted}"
    core = event.get("core_images_per_s")
    if core is None:
        return f"{text}; {more}"
    text += f", and a core that only decodes and augments {core:.3g}"
    if gives < _BUSY_SHARE * core:
        return (
            f"{text}: they wait for storage, or for cores that others use; keep images of S3 or a "
            f"network disk with --cache DIR, or {more}"
        )
    return (
        f"{text}: {more} if the machine has the cores; --augment-hue 0 leaves the dearest change "
        "out, and --cache DIR --cache-decoded spares a small set its decoding"
    )
