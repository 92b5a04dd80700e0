"""The loop over steps of one process; what happens at a checkpoint is handed in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retinaray.data.batching import Batch
from retinaray.detector.retinanet import RetinaNet
from retinaray.training.batch_loss import LossSettings
from retinaray.training.progress import Progress, ProgressWindow
from retinaray.training.schedule import Schedule
from retinaray.training.signals import StepSignals
from retinaray.training.state import TrainingState
from retinaray.training.step import TrainingStep

__all__ = [
    "CheckpointKind",
    "LoopEnd",
    "LoopSettings",
    "Progress",
    "never",
    "plan_checkpoints",
    "plan_kept",
    "run_loop",
]

CheckpointKind = Literal["planned", "last", "stop"]
"""Why a checkpoint is made: its step was planned, the training is over, or somebody stops it."""

LoopEnd = Literal["finished", "early", "stopped"]
"""Why a loop ended: no step is left, a planned checkpoint said so, or a worker was asked to."""


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
        accumulate: Parts in which a worker's share of a batch goes through the network.
        max_skipped_steps: Steps in a row without a finite gradient that end the training.
    """

    batch: int
    num_images: int
    checkpoint_steps: tuple[int, ...]
    log_every: int
    loss: LossSettings
    schedule: Schedule
    clip_norm: float
    autocast_dtype: torch.dtype | None
    accumulate: int = 1
    max_skipped_steps: int = 20

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return self.checkpoint_steps[-1]


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


def plan_kept(
    checkpoint_steps: tuple[int, ...], *, num_images: int, batch: int, every_epochs: int
) -> frozenset[int]:
    """Which checkpoints' weights are kept for good.

    Args:
        checkpoint_steps: As `plan_checkpoints` gives them.
        num_images: Images in the training set.
        batch: Global batch.
        every_epochs: Distance in epochs; 0 = none are kept.

    Returns:
        The first checkpoint at or after every so many epochs; those epochs need not be ones after
        which a checkpoint is made.
    """
    if every_epochs == 0:
        return frozenset()
    kept, num_before = set(), 0
    for step in checkpoint_steps:
        num_done = step * batch // (num_images * every_epochs)
        if num_done > num_before:
            kept.add(step)
        num_before = num_done
    return frozenset(kept)


def never() -> bool:
    """Nobody wants to stop."""
    return False


def run_loop(
    state: TrainingState,
    wrapped: nn.Module,
    batches: Iterable[Batch],
    settings: LoopSettings,
    *,
    world_size: int,
    on_progress: Callable[[Progress], None],
    on_checkpoint: Callable[[CheckpointKind], bool],
    wants_stop: Callable[[], bool] = never,
) -> LoopEnd:
    """Take steps until the batches end, a checkpoint says stop, or a worker is asked to stop.

    Args:
        state: Where the training stands; changed in place.
        wrapped: `state.model`, possibly wrapped for data parallelism.
        batches: This worker's batches from `state.step` on, on the CPU.
        settings: How to train.
        world_size: Number of workers, for the reported losses.
        on_progress: Called every `log_every` steps, before a divergence is raised, and for what is
            left where the training does not go to its end.
        on_checkpoint: Called at each checkpoint step as `planned`, after the final one as `last`,
            and as `stop` where a worker's wish comes between them; returns whether to end the
            training early, which counts at planned ones.
        wants_stop: Asked after each step. Where one worker says yes, all stop after the same step:
            votes travel with the next step's foreground count, and are read when the device is
            done with them, at a planned checkpoint or two steps later.

    Returns:
        Why it ended.

    Raises:
        DivergenceError: If too many steps in a row have no finite gradient.
    """
    step = _make_step(state, wrapped, settings)
    anchors = _AnchorsBySize(state.model)
    signals = StepSignals(
        max_skipped_steps=settings.max_skipped_steps,
        num_skipped_in_a_row=state.num_skipped_in_a_row,
    )
    window = ProgressWindow(
        batch=settings.batch,
        num_images=settings.num_images,
        total_steps=settings.total_steps,
        world_size=world_size,
    )
    is_asked = False
    state.model.train()
    device = next(state.model.parameters()).device
    for batch in batches:
        window.note_arrival(batch.cost)
        moved = batch.to(device)
        rate = settings.schedule.rate_at(state.step)
        result = step.take(
            moved,
            anchors_xyxy=anchors.over(moved.images),
            learning_rate=rate,
            wants_stop=is_asked,
        )
        if state.average:
            state.average.update(state.model, state.step, is_finite=result.is_finite)
        state.step += 1
        window.add(result, batch.image_ids)
        signals.send(result, state.step, batch.image_ids)
        signals.receive()
        kind = _choose_checkpoint(state.step, settings, must_stop=signals.must_stop)
        if kind is not None:
            # What is kept knows of every step before it, and serves each vote up to it.
            signals.receive(num_behind=0)
        state.num_skipped_in_a_row = signals.num_skipped_in_a_row
        if signals.has_diverged or _is_report_due(state.step, settings):
            on_progress(window.summarise(state.step, rate))
        if signals.has_diverged:
            raise signals.describe_divergence()
        if kind is not None:
            is_enough = on_checkpoint(kind)
            state.model.train()
            window.leave_out_pause()
            end = _choose_end(kind, is_enough=is_enough, must_stop=signals.must_stop)
            if end is not None:
                if window.has_steps:
                    on_progress(window.summarise(state.step, rate))
                return end
        is_asked = wants_stop()
    return "finished"


def _make_step(state: TrainingState, wrapped: nn.Module, settings: LoopSettings) -> TrainingStep:
    return TrainingStep(
        wrapped,
        state.optimizer,
        loss=settings.loss,
        clip_norm=settings.clip_norm,
        autocast_dtype=settings.autocast_dtype,
        accumulate=settings.accumulate,
        scaler=state.scaler,
    )


def _is_report_due(step: int, settings: LoopSettings) -> bool:
    return step % settings.log_every == 0 or step == settings.total_steps


def _choose_checkpoint(
    step: int, settings: LoopSettings, *, must_stop: bool
) -> CheckpointKind | None:
    """The checkpoint that is due after a step.

    A planned one stays planned where a stop meets it: a resumed training would not make up for its
    validation.
    """
    if step == settings.total_steps:
        return "last"
    if step in settings.checkpoint_steps:
        return "planned"
    return "stop" if must_stop else None


def _choose_end(kind: CheckpointKind, *, is_enough: bool, must_stop: bool) -> LoopEnd | None:
    """How the training ends with a checkpoint before the last one; none = it goes on."""
    if kind == "last":
        return None
    if kind == "planned" and is_enough:
        return "early"
    return "stopped" if must_stop else None


class _AnchorsBySize:
    """The anchors of each canvas that occurs, made once."""

    def __init__(self, model: RetinaNet) -> None:
        self._model = model
        self._made: dict[tuple[int, ...], Float[Tensor, "A 4"]] = {}

    def over(self, images: Tensor) -> Float[Tensor, "A 4"]:
        size = tuple(images.shape[-2:])
        if size not in self._made:
            self._made[size] = self._model.anchors_for(images)
        return self._made[size]
