"""The loop: when checkpoints fall due, what it reports, when it gives up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from retinaray.artifact import ModelCard
from retinaray.data.batching import Batch
from retinaray.errors import DivergenceError
from retinaray.training import progress
from retinaray.training.loop import (
    CheckpointKind,
    LoopEnd,
    LoopSettings,
    Progress,
    never,
    plan_checkpoints,
    plan_kept,
    run_loop,
)
from retinaray.training.state import TrainingState
from retinaray.training.step import (
    LossSettings,
    StepResult,
    TrainingStep,
    WeightAverage,
    make_optimizer,
)

BOX = torch.tensor([[10.0, 10.0, 34.0, 34.0]])


@pytest.fixture
def state(make_tiny_card: Callable[..., ModelCard], one_thread: None) -> TrainingState:
    torch.manual_seed(0)
    model = make_tiny_card(head_depth=0).build_model()
    optimizer = make_optimizer(model, kind="adamw", learning_rate=1e-3, weight_decay=0.05)
    return TrainingState(model=model, optimizer=optimizer, average=None)


@pytest.fixture
def scripted_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Replaces the step by results with these class losses; one that is NaN was skipped."""

    def script(losses: list[float]) -> None:
        remaining = iter(losses)

        def take(*_: Any, wants_stop: bool, **__: Any) -> StepResult:
            loss = torch.tensor(next(remaining))
            return StepResult(
                class_loss=loss,
                box_loss=2 * loss,
                num_foreground=torch.tensor(8.0),
                gradient_norm=3 * loss,
                is_finite=torch.isfinite(loss),
                num_stop_votes=torch.tensor(float(wants_stop)),
            )

        monkeypatch.setattr(TrainingStep, "take", take)

    return script


def run(
    state: TrainingState,
    batches: list[Batch],
    settings: LoopSettings,
    *,
    world_size: int = 1,
    on_checkpoint: Callable[[CheckpointKind], bool] = lambda _: False,
) -> list[Progress]:
    reports: list[Progress] = []
    run_loop(
        state,
        state.model,
        batches,
        settings,
        world_size=world_size,
        on_progress=reports.append,
        on_checkpoint=on_checkpoint,
    )
    return reports


def run_to_its_end(
    state: TrainingState,
    batch: Batch,
    settings: LoopSettings,
    *,
    end_early_at: int = 0,
    stop_at: int = 0,
) -> tuple[LoopEnd, list[tuple[int, CheckpointKind]]]:
    """How a loop ended, and its checkpoints; somebody wants to stop after step `stop_at`."""
    kept: list[tuple[int, CheckpointKind]] = []

    def keep(kind: CheckpointKind) -> bool:
        kept.append((state.step, kind))
        return state.step == end_early_at

    end = run_loop(
        state,
        state.model,
        [batch] * settings.total_steps,
        settings,
        world_size=1,
        on_progress=lambda _: None,
        on_checkpoint=keep,
        wants_stop=lambda: state.step == stop_at,
    )
    return end, kept


@pytest.mark.parametrize(
    ("total", "images", "batch", "every", "steps"),
    [
        # 10 images by 4: epochs end after 2.5, 5, 7.5 and 10 steps.
        (10, 10, 4, 1, (3, 5, 8, 10)),
        (9, 10, 4, 1, (3, 5, 8, 9)),
        (8, 10, 4, 1, (3, 5, 8)),
        (10, 10, 4, 2, (5, 10)),
        (10, 10, 4, 3, (8, 10)),
        (10, 10, 4, 9, (10,)),
        (7, 7, 1, 1, (7,)),
        # Two images in batches of 8: each step completes four epochs.
        (3, 2, 8, 1, (1, 2, 3)),
        (3, 2, 8, 4, (1, 2, 3)),
        (5, 2, 8, 6, (2, 3, 5)),  # 12 images: after 1.5, 3 and 4.5 steps
        (1, 10, 4, 1, (1,)),
    ],
)
def test_plan_checkpoints_ends_whole_epochs_and_the_training(
    total: int, images: int, batch: int, every: int, steps: tuple[int, ...]
) -> None:
    planned = plan_checkpoints(
        total_steps=total, num_images=images, batch=batch, every_epochs=every
    )
    assert planned == steps


def test_plan_checkpoints_is_quick_when_a_batch_holds_a_million_epochs() -> None:
    planned = plan_checkpoints(total_steps=1000, num_images=1, batch=10**6, every_epochs=1)
    assert planned == tuple(range(1, 1001))


@pytest.mark.parametrize(
    ("planned", "every", "kept"),
    [
        # 10 images by 4: epochs end after 2.5, 5, 7.5 and 10 steps.
        ((3, 5, 8, 10), 1, {3, 5, 8, 10}),
        ((3, 5, 8, 10), 2, {5, 10}),
        ((3, 5, 8, 10), 5, set()),
        # A checkpoint each third epoch: the second and the fourth are in the next ones.
        ((8, 15, 20), 2, {8, 15, 20}),
        ((8, 15, 20), 4, {15, 20}),
        ((3, 5), 0, set()),
    ],
)
def test_plan_kept_takes_the_first_checkpoint_at_or_after_every_so_many_epochs(
    planned: tuple[int, ...], every: int, kept: set[int]
) -> None:
    assert plan_kept(planned, num_images=10, batch=4, every_epochs=every) == kept


def test_run_loop_reports_means_over_the_steps_since_the_last_report(
    state: TrainingState,
    make_batch: Callable[..., Batch],
    make_loop_settings: Callable[..., LoopSettings],
    scripted_steps: Callable[[list[float]], None],
) -> None:
    scripted_steps([1.0, 3.0, 5.0, 8.0, 9.0])
    settings = make_loop_settings(checkpoint_steps=(5,), log_every=2, batch=4, num_images=8)
    reports = run(state, [make_batch([BOX])] * 5, settings, world_size=2)
    assert [report.step for report in reports] == [2, 4, 5]
    # One worker's share times two workers.
    assert [report.class_loss for report in reports] == [4.0, 13.0, 18.0]
    assert [report.box_loss for report in reports] == [8.0, 26.0, 36.0]
    assert [report.gradient_norm for report in reports] == [6.0, 19.5, 27.0]
    assert [report.epoch for report in reports] == [1.0, 2.0, 2.5]
    assert [report.num_foreground for report in reports] == [2.0, 2.0, 2.0]
    assert [report.total_steps for report in reports] == [5, 5, 5]
    assert reports[-1].eta_s == 0
    assert all(0 <= report.wait_share <= 1 and report.images_per_s > 0 for report in reports)
    expected = [settings.schedule.rate_at(step) for step in (1, 3, 4)]
    assert [report.learning_rate for report in reports] == expected


def test_run_loop_leaves_skipped_steps_out_of_the_means_and_counts_them(
    state: TrainingState,
    make_batch: Callable[..., Batch],
    make_loop_settings: Callable[..., LoopSettings],
    scripted_steps: Callable[[list[float]], None],
) -> None:
    scripted_steps([1.0, float("nan"), 3.0, float("inf")])
    settings = make_loop_settings(checkpoint_steps=(4,), log_every=4)
    pairs, singles = make_batch([BOX, BOX]), make_batch([BOX])
    (report,) = run(state, [pairs, pairs, singles, singles], settings)
    assert report.num_skipped == 2
    assert report.skipped_image_ids == ("image-0", "image-1", "image-0")
    assert report.class_loss == 2.0
    assert report.gradient_norm == 6.0


def test_run_loop_counts_steps_before_a_checkpoint_in_the_next_report(
    state: TrainingState,
    make_batch: Callable[..., Batch],
    make_loop_settings: Callable[..., LoopSettings],
    scripted_steps: Callable[[list[float]], None],
) -> None:
    scripted_steps([1.0, float("nan"), 3.0, 5.0])
    settings = make_loop_settings(checkpoint_steps=(3, 4), log_every=4)
    (report,) = run(state, [make_batch([BOX])] * 4, settings)
    assert report.num_skipped == 1
    assert report.class_loss == 3.0


def test_run_loop_leaves_the_time_of_checkpoints_out(
    state: TrainingState,
    make_batch: Callable[..., Batch],
    make_loop_settings: Callable[..., LoopSettings],
    scripted_steps: Callable[[list[float]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    scripted_steps([1.0] * 4)

    def batches() -> Any:
        for _ in range(4):
            now[0] += 0.25  # waiting
            yield make_batch([BOX])

    def spend_an_hour(_: CheckpointKind) -> bool:
        now[0] += 3600
        return False

    settings = make_loop_settings(checkpoint_steps=(1, 4), log_every=4, batch=4)
    (report,) = run(state, batches(), settings, on_checkpoint=spend_an_hour)
    assert report.images_per_s == pytest.approx(4 * 4 / 1.0)
    assert report.wait_share == pytest.approx(1.0)


def test_run_loop_calls_checkpoints_in_training_mode_and_says_of_which_kind(
    state: TrainingState,
    make_batch: Callable[..., Batch],
    make_loop_settings: Callable[..., LoopSettings],
) -> None:
    calls = []

    def keep(kind: CheckpointKind) -> bool:
        calls.append((state.step, kind, state.model.training))
        state.model.eval()
        return False

    settings = make_loop_settings(checkpoint_steps=(1, 3))
    run(state, [make_batch([BOX])] * 3, settings, on_checkpoint=keep)
    assert calls == [(1, "planned", True), (3, "last", True)]


def test_run_loop_averages_the_weights_after_each_step(
    state: TrainingState,
    make_batch: Callable[..., Batch],
    make_loop_settings: Callable[..., LoopSettings],
) -> None:
    state.average = WeightAverage(state.model, decay=0.999)
    bias = state.model.class_head.output.bias
    seen = [bias.detach().clone()]

    def look(_: CheckpointKind) -> bool:
        seen.append(bias.detach().clone())
        return False

    settings = make_loop_settings(checkpoint_steps=(1, 2))
    run(state, [make_batch([BOX])] * 2, settings, on_checkpoint=look)
    # Of the old average stay 1/10 after the first step and 2/11 after the second.
    expected = 2 / 11 * (0.1 * seen[0] + 0.9 * seen[1]) + 9 / 11 * seen[2]
    torch.testing.assert_close(
        state.average.values["class_head.output.bias"], expected, rtol=1e-6, atol=1e-7
    )
    assert (seen[2] - seen[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("end_early_at", "stop_at", "end", "checkpoints"),
    [
        (0, 0, "finished", [(4, "planned"), (8, "last")]),
        (4, 0, "early", [(4, "planned")]),
        (8, 0, "finished", [(4, "planned"), (8, "last")]),
        # Asked after step 2: the vote travels with step 3, and would be read when step 5 is sent.
        (0, 2, "stopped", [(4, "planned")]),
        (0, 3, "stopped", [(4, "planned")]),
        # The vote travels with step 5, and is read when step 7 is sent.
        (0, 4, "stopped", [(4, "planned"), (7, "stop")]),
        # A planned checkpoint is not followed by another of the same step.
        (0, 1, "stopped", [(4, "planned")]),
        (4, 1, "early", [(4, "planned")]),
        # Too late: what is left is taken.
        (0, 5, "finished", [(4, "planned"), (8, "last")]),
        (0, 8, "finished", [(4, "planned"), (8, "last")]),
    ],
)
def test_run_loop_ends_when_it_is_told(
    state: TrainingState,
    make_batch: Callable[..., Batch],
    make_loop_settings: Callable[..., LoopSettings],
    scripted_steps: Callable[[list[float]], None],
    end_early_at: int,
    stop_at: int,
    end: LoopEnd,
    checkpoints: list[tuple[int, CheckpointKind]],
) -> None:
    scripted_steps([1.0] * 8)
    outcome = run_to_its_end(
        state,
        make_batch([BOX]),
        make_loop_settings(checkpoint_steps=(4, 8)),
        end_early_at=end_early_at,
        stop_at=stop_at,
    )
    assert outcome == (end, checkpoints)
    assert state.step == checkpoints[-1][0]


def test_never_wants_nothing() -> None:
    assert not never()


def test_run_loop_gives_up_at_once_and_names_all_images_when_steps_are_skipped(
    state: TrainingState,
    make_batch: Callable[..., Batch],
    make_loop_settings: Callable[..., LoopSettings],
    scripted_steps: Callable[[list[float]], None],
) -> None:
    scripted_steps([1.0, *[float("nan")] * 99])
    settings = make_loop_settings(checkpoint_steps=(100,), log_every=10, max_skipped_steps=12)
    reports: list[Progress] = []
    kept: list[CheckpointKind] = []
    with pytest.raises(DivergenceError, match=r"12 steps up to step 13 .*image-0, image-1.*--lr"):
        run_loop(
            state,
            state.model,
            [make_batch([BOX, BOX])] * 100,
            settings,
            world_size=1,
            on_progress=reports.append,
            on_checkpoint=lambda kind: kept.append(kind) is None,
        )
    # Flags are read two steps late.
    assert state.step == 15
    assert [(report.step, report.num_skipped) for report in reports] == [(10, 9), (15, 5)]
    assert reports[-1].skipped_image_ids == ("image-0", "image-1") * 5
    assert kept == []


def test_run_loop_gives_up_before_the_last_checkpoint_when_the_final_steps_are_skipped(
    state: TrainingState,
    make_batch: Callable[..., Batch],
    make_loop_settings: Callable[..., LoopSettings],
    scripted_steps: Callable[[list[float]], None],
) -> None:
    scripted_steps([1.0, *[float("nan")] * 4])
    settings = make_loop_settings(checkpoint_steps=(5,), max_skipped_steps=4)
    with pytest.raises(DivergenceError, match="4 steps up to step 5"):
        run(state, [make_batch([BOX])] * 5, settings)


@pytest.mark.parametrize("is_resumed", [False, True], ids=["same process", "from a checkpoint"])
def test_run_loop_counts_skipped_steps_on_and_reports_them_when_it_is_interrupted(
    state: TrainingState,
    make_batch: Callable[..., Batch],
    make_loop_settings: Callable[..., LoopSettings],
    scripted_steps: Callable[[list[float]], None],
    is_resumed: bool,
) -> None:
    scripted_steps([1.0, *[float("nan")] * 99])
    settings = make_loop_settings(checkpoint_steps=(100,), log_every=100, max_skipped_steps=9)
    reports: list[Progress] = []
    saved: list[bytes] = []

    def go_on() -> LoopEnd:
        return run_loop(
            state,
            state.model,
            [make_batch([BOX])] * 99,
            settings,
            world_size=1,
            on_progress=reports.append,
            on_checkpoint=lambda _: saved.append(state.dump()) is not None,
            wants_stop=lambda: True,
        )

    # A vote of step 2 is read when step 4 is sent, and so on.
    for step in (4, 8):
        assert go_on() == "stopped"
        assert (state.step, state.num_skipped_in_a_row) == (step, step - 1)
        if is_resumed:
            state.num_skipped_in_a_row = 0
            state.load(saved[-1], source="training.pth")
    # The ninth and the tenth: what interrupts the third time finds it before it keeps anything.
    with pytest.raises(DivergenceError, match="no finite gradient in 9 steps up to step 10 "):
        go_on()
    assert [(report.step, report.num_skipped) for report in reports] == [(4, 3), (8, 4), (12, 4)]
    assert reports[0].skipped_image_ids == ("image-0",) * 3
    assert len(saved) == 2


def test_run_loop_reports_what_is_left_when_a_planned_checkpoint_is_enough(
    state: TrainingState,
    make_batch: Callable[..., Batch],
    make_loop_settings: Callable[..., LoopSettings],
    scripted_steps: Callable[[list[float]], None],
) -> None:
    scripted_steps([1.0, 2.0, float("nan")])
    settings = make_loop_settings(checkpoint_steps=(3, 9), log_every=2)
    reports = run(state, [make_batch([BOX])] * 9, settings, on_checkpoint=lambda _: True)
    assert [(report.step, report.num_skipped) for report in reports] == [(2, 0), (3, 1)]
    assert state.num_skipped_in_a_row == 1


def test_run_loop_goes_on_when_one_of_twenty_steps_was_finite(
    state: TrainingState,
    make_batch: Callable[..., Batch],
    make_loop_settings: Callable[..., LoopSettings],
    scripted_steps: Callable[[list[float]], None],
) -> None:
    scripted_steps([1.0, *[float("nan")] * 19, 2.0, *[float("nan")] * 19])
    settings = make_loop_settings(checkpoint_steps=(40,), log_every=20)
    reports = run(state, [make_batch([BOX])] * 40, settings)
    assert [report.num_skipped for report in reports] == [19, 19]
    assert [report.class_loss for report in reports] == [1.0, 2.0]


def test_run_loop_leaves_no_trace_of_a_real_step_that_is_skipped(
    state: TrainingState,
    make_batch: Callable[..., Batch],
    make_loop_settings: Callable[..., LoopSettings],
    everything: Callable[[TrainingState], dict[str, Any]],
    assert_equal_bit_for_bit: Callable[[dict[str, Any], dict[str, Any]], None],
) -> None:
    state.average = WeightAverage(state.model, decay=0.9)
    run(state, [make_batch([BOX])], make_loop_settings(checkpoint_steps=(1,)))

    def gather() -> dict[str, Any]:
        # Numbers of steps and the learning rate are no result of one.
        parts = everything(state)
        own = ("/rest/0", "/rest/3")
        return {k: v for k, v in parts.items() if k not in own and not k.endswith("/lr")}

    before = gather()
    infinite = make_loop_settings(checkpoint_steps=(3,), loss=LossSettings(box_weight=float("inf")))
    reports = run(state, [make_batch([BOX])] * 2, infinite)
    assert sum(report.num_skipped for report in reports) == 2
    assert_equal_bit_for_bit(gather(), before)
