"""The loop over steps of one process; what happens at a checkpoint is handed in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from retinaray.data.batching import Batch
from retinaray.errors import RetinarayError
from retinaray.training.schedule import Schedule
from retinaray.training.state import TrainingState
from retinaray.training.step import LossSettings, StepResult, take_step

# This many steps in a row without a finite gradient are a diverged training, not a bad batch.
MAX_SKIPPED_IN_A_ROW = 20


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs to know.

    Attributes:
        batch: Images per step over all workers.
        num_images: Images in the training set.
        checkpoint_steps: Steps after which a checkpoint is due, rising; the last is the end.
        log_every: Steps between two progress reports.
        loss: Matching and loss.
        schedule: Learning rate.
        clip_norm: Largest gradient norm; 0 = no clipping.
        autocast_dtype: Type of the convolutions; none = float32.
    """

    batch: int
    num_images: int
    checkpoint_steps: tuple[int, ...]
    log_every: int
    loss: LossSettings
    schedule: Schedule
    clip_norm: float
    autocast_dtype: torch.dtype | None


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
        wait_share: Part of the time that was spent waiting for images, in [0, 1].
        eta_s: Expected seconds to the end.
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


def plan_checkpoints(
    *, total_steps: int, num_images: int, batch: int, every_epochs: int
) -> tuple[int, ...]:
    """Steps after which every so many epochs are complete, and the last step.

    Args:
        total_steps: Length of the training.
        num_images: Images in the training set.
        batch: Global batch.
        every_epochs: Distance in epochs.

    Returns:
        Rising steps from 1 on; where a step completes several such distances it occurs once.
    """
    if every_epochs * num_images <= batch:
        return tuple(range(1, total_steps + 1))
    steps = []
    epoch = every_epochs
    while (step := -(-epoch * num_images // batch)) < total_steps:
        steps.append(step)
        epoch += every_epochs
    return (*steps, total_steps)


def run_loop(
    state: TrainingState,
    wrapped: nn.Module,
    batches: Iterable[Batch],
    settings: LoopSettings,
    *,
    world_size: int,
    on_progress: Callable[[Progress], None],
    on_checkpoint: Callable[[bool], bool],
) -> None:
    """Take steps until the batches end or a checkpoint says stop.

    Args:
        state: Where the training stands; changed in place.
        wrapped: `state.model`, possibly wrapped for data parallelism.
        batches: This worker's batches from `state.step` on, on the CPU.
        settings: How to train.
        world_size: Number of workers, for the reported losses.
        on_progress: Called every `log_every` steps.
        on_checkpoint: Called at each checkpoint step with whether it is the last; returns whether
            to stop.

    Raises:
        RetinarayError: If too many steps in a row have no finite gradient.
    """
    device = next(state.model.parameters()).device
    total_steps = settings.checkpoint_steps[-1]
    window = _Window(settings, world_size)
    anchors = None
    recent: list[torch.Tensor] = []
    state.model.train()
    for batch in batches:
        window.note_arrival()
        moved = batch.to(device)
        if anchors is None:
            anchors = state.model.anchors_for(moved.images)
        rate = settings.schedule.rate_at(state.step)
        result = take_step(
            wrapped,
            state.optimizer,
            moved,
            anchors_xyxy=anchors,
            settings=settings.loss,
            learning_rate=rate,
            clip_norm=settings.clip_norm,
            autocast_dtype=settings.autocast_dtype,
        )
        if state.average:
            state.average.update(state.model, state.step)
        state.step += 1
        window.add(result)
        recent = [*recent[1 - MAX_SKIPPED_IN_A_ROW :], result.is_finite]
        if state.step % settings.log_every == 0 or state.step == total_steps:
            _refuse_divergence(recent, state.step, batch)
            on_progress(window.summarise(state.step, rate))
            window = _Window(settings, world_size)
        if state.step in settings.checkpoint_steps:
            should_stop = on_checkpoint(state.step == total_steps)
            state.model.train()
            window.leave_out_pause()
            if should_stop:
                return


def _refuse_divergence(recent: list[torch.Tensor], step: int, batch: Batch) -> None:
    if len(recent) == MAX_SKIPPED_IN_A_ROW and not torch.stack(recent).any():
        raise RetinarayError(
            f"no finite gradient in {MAX_SKIPPED_IN_A_ROW} steps up to step {step} "
            f"(last images: {', '.join(map(str, batch.image_ids[:8]))}): "
            "lower the learning rate (--lr), or look at these images with `retinaray doctor`"
        )


class _Window:
    """Sums over the steps between two reports; reads the device only when it is summarised."""

    def __init__(self, settings: LoopSettings, world_size: int) -> None:
        self._settings = settings
        self._world_size = world_size
        self._results: list[StepResult] = []
        self._start = self._last = time.perf_counter()
        self._waited_s = 0.0

    def note_arrival(self) -> None:
        self._waited_s += time.perf_counter() - self._last

    def add(self, result: StepResult) -> None:
        self._results.append(result)
        self._last = time.perf_counter()

    def leave_out_pause(self) -> None:
        """Take the time since the last step out of the account: a checkpoint is no training."""
        now = time.perf_counter()
        self._start += now - self._last
        self._last = now

    def summarise(self, step: int, rate: float) -> Progress:
        settings, count = self._settings, len(self._results)
        is_finite = torch.stack([result.is_finite for result in self._results])
        means = {
            name: float(torch.stack([getattr(r, name) for r in self._results])[is_finite].mean())
            for name in ("class_loss", "box_loss", "num_foreground", "gradient_norm")
        }
        elapsed_s = max(1e-9, time.perf_counter() - self._start)
        total_steps = settings.checkpoint_steps[-1]
        return Progress(
            step=step,
            total_steps=total_steps,
            epoch=step * settings.batch / settings.num_images,
            class_loss=means["class_loss"] * self._world_size,
            box_loss=means["box_loss"] * self._world_size,
            learning_rate=rate,
            gradient_norm=means["gradient_norm"],
            num_foreground=means["num_foreground"] / settings.batch,
            num_skipped=count - int(is_finite.sum()),
            images_per_s=count * settings.batch / elapsed_s,
            wait_share=min(1.0, self._waited_s / elapsed_s),
            eta_s=(total_steps - step) * elapsed_s / count,
        )
