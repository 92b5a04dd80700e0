"""What a training reports: means over the steps since the last report."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from retinaray.data.input_cost import InputCost
from retinaray.training.step import StepResult


@dataclass(frozen=True)
class Progress:
    """What the loop reports now and then.

    Losses, norms and counts are means over the steps since the last report that had a finite
    gradient, NaN if none had; times leave checkpoints out.

    Attributes:
        step: Steps taken.
        total_steps: Steps of the whole training.
        epoch: Passes over the training set so far, as a fraction.
        class_loss: Focal loss over the foreground count, this worker's share times the number of
            workers.
        box_loss: Regression loss, likewise.
        learning_rate: Rate of the last step.
        gradient_norm: Before clipping.
        num_foreground: Foreground anchors per image.
        num_skipped: Steps without a finite gradient, since the last report.
        images_per_s: Over all workers.
        wait_share: Part of the time that this worker spent waiting for images, in [0, 1].
        eta_s: Expected seconds to the end.
        skipped_image_ids: Images of the skipped steps, of this worker alone, in order.
        step_images_per_s: What this worker's steps would take if they never waited for images; none
            if they did nothing else.
        loader_images_per_s: What one process that reads, decodes and augments gives this worker
            while it is at it; none = not measured.
        core_images_per_s: What one core would give that only decodes and augments; none = not
            measured.
        num_loaders: Processes that give this worker its images; 0 = itself.
    """

    step: int
    total_steps: int
    epoch: float
    class_loss: float
    box_loss: float
    learning_rate: float
    gradient_norm: float
    num_foreground: float
    num_skipped: int
    images_per_s: float
    wait_share: float
    eta_s: float
    skipped_image_ids: tuple[int | str, ...] = ()
    step_images_per_s: float | None = None
    loader_images_per_s: float | None = None
    core_images_per_s: float | None = None
    num_loaders: int = 0


class ProgressWindow:
    """Collects the steps between two reports; reads the device only when it is summarised.

    Args:
        batch: Images per step over all workers.
        num_images: Images in the training set.
        total_steps: Steps of the whole training.
        world_size: Number of workers.
    """

    def __init__(self, *, batch: int, num_images: int, total_steps: int, world_size: int) -> None:
        self._batch = batch
        self._num_images = num_images
        self._total_steps = total_steps
        self._world_size = world_size
        self._clear()

    @property
    def has_steps(self) -> bool:
        """Whether there is anything to report."""
        return bool(self._results)

    def note_arrival(self, cost: InputCost | None = None) -> None:
        """The images of the next step are there.

        Args:
            cost: What it took to make them; none = not measured.
        """
        self._waited_s += time.perf_counter() - self._last
        if cost is not None:
            self._cost += cost

    def add(self, result: StepResult, image_ids: tuple[int | str, ...]) -> None:
        """Take in a step and the images that this worker saw in it."""
        self._results.append(result)
        self._image_ids.append(image_ids)
        self._last = time.perf_counter()

    def leave_out_pause(self) -> None:
        """Take the time since the last step out of the account: a checkpoint is no training."""
        now = time.perf_counter()
        self._start += now - self._last
        self._last = now

    def summarise(self, step: int, rate: float) -> Progress:
        """The report after a step, and an empty window; at least one step was added."""
        count = len(self._results)
        is_finite = torch.stack([result.is_finite for result in self._results])
        means = {
            name: float(torch.stack([getattr(r, name) for r in self._results])[is_finite].mean())
            for name in ("class_loss", "box_loss", "num_foreground", "gradient_norm")
        }
        taken = is_finite.tolist()
        skipped = [ids for ids, was in zip(self._image_ids, taken, strict=True) if not was]
        elapsed_s = max(1e-9, time.perf_counter() - self._start)
        busy_s = elapsed_s - self._waited_s
        own_images = count * self._batch / self._world_size
        progress = Progress(
            step=step,
            total_steps=self._total_steps,
            epoch=step * self._batch / self._num_images,
            class_loss=means["class_loss"] * self._world_size,
            box_loss=means["box_loss"] * self._world_size,
            learning_rate=rate,
            gradient_norm=means["gradient_norm"],
            num_foreground=means["num_foreground"] / self._batch,
            num_skipped=len(skipped),
            images_per_s=count * self._batch / elapsed_s,
            wait_share=min(1.0, self._waited_s / elapsed_s),
            eta_s=(self._total_steps - step) * elapsed_s / count,
            skipped_image_ids=tuple(image_id for ids in skipped for image_id in ids),
            step_images_per_s=own_images / busy_s if busy_s > 0 else None,
            loader_images_per_s=self._cost.images_per_s,
            core_images_per_s=self._cost.images_per_core_s,
            num_loaders=self._cost.num_processes,
        )
        self._clear()
        return progress

    def _clear(self) -> None:
        self._results: list[StepResult] = []
        self._image_ids: list[tuple[int | str, ...]] = []
        self._start = self._last = time.perf_counter()
        self._waited_s = 0.0
        self._cost = InputCost()
