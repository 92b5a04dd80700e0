"""The resume law, and files that a training refuses to go on from."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from retinaray.artifact import ModelCard
from retinaray.errors import CheckpointError
from retinaray.training.state import TrainingState
from retinaray.training.step import WeightAverage, make_optimizer

StateFactory = Callable[..., TrainingState]


@pytest.fixture
def make_state(make_tiny_card: Callable[..., ModelCard], one_thread: None) -> StateFactory:
    def make(
        *,
        kind: str = "adamw",
        norm: str = "gn",
        ema: bool = True,
        num_classes: int = 2,
        is_scaled: bool = False,
    ) -> TrainingState:
        torch.manual_seed(0)
        card = make_tiny_card(norm=norm, num_classes=num_classes, head_depth=0)
        model = card.build_model()
        return TrainingState(
            model=model,
            optimizer=make_optimizer(model, kind=kind, learning_rate=1e-3, weight_decay=0.05),
            average=WeightAverage(model, decay=0.9) if ema else None,
            scaler=torch.amp.GradScaler("cpu") if is_scaled else None,
        )

    return make


@pytest.mark.parametrize("is_scaled", [False, True])
def test_load_takes_everything_over(
    make_state: StateFactory,
    everything: Callable[[TrainingState], dict[str, Any]],
    assert_equal_bit_for_bit: Callable[[dict[str, Any], dict[str, Any]], None],
    is_scaled: bool,
) -> None:
    saved = make_state(is_scaled=is_scaled)
    saved.step, saved.best_ap, saved.num_stale, saved.num_skipped_in_a_row = 7, 0.25, 3, 4
    if saved.scaler:
        saved.scaler.load_state_dict({**saved.scaler.state_dict(), "scale": 128.0})
    loaded = make_state(is_scaled=is_scaled)
    with torch.no_grad():
        for value in loaded.model.state_dict().values():
            value.fill_(9)  # nothing of the fresh weights may remain
    loaded.load(saved.dump(), source="training.pth")
    assert_equal_bit_for_bit(everything(loaded), everything(saved))


def test_load_takes_a_file_from_before_losses_were_scaled(make_state: StateFactory) -> None:
    saved = make_state()
    values = torch.load(io.BytesIO(saved.dump()), weights_only=True)
    del values["scaler"]
    stream = io.BytesIO()
    torch.save(values, stream)
    loaded = make_state()
    loaded.load(stream.getvalue(), source="old.pth")
    assert torch.equal(loaded.model.fpn.p6.weight, saved.model.fpn.p6.weight)


def test_load_takes_a_file_from_before_skipped_steps_were_counted_across_checkpoints(
    make_state: StateFactory,
) -> None:
    values = torch.load(io.BytesIO(make_state().dump()), weights_only=True)
    del values["num_skipped_in_a_row"]
    stream = io.BytesIO()
    torch.save(values, stream)
    loaded = make_state()
    loaded.num_skipped_in_a_row = 5
    loaded.load(stream.getvalue(), source="old.pth")
    assert loaded.num_skipped_in_a_row == 0


def test_dump_holds_the_state_at_that_moment(make_state: StateFactory) -> None:
    state = make_state()
    content = state.dump()
    with torch.no_grad():
        state.model.fpn.p6.bias.fill_(9.0)
    other = make_state()
    other.load(content, source="x")
    assert not (other.model.fpn.p6.bias == 9.0).any()


@pytest.mark.parametrize("size", [0, 1, 1000, -1000])
def test_load_refuses_a_truncated_file(make_state: StateFactory, size: int) -> None:
    content = make_state().dump()[:size]
    with pytest.raises(
        CheckpointError, match=rf"run/training.pth: not a readable .*{len(content)} bytes"
    ):
        make_state().load(content, source="run/training.pth")


@pytest.mark.parametrize(
    ("saved", "loading", "text"),
    [
        ({"kind": "sgd"}, {"kind": "adamw"}, "belongs to another network or optimizer"),
        ({"kind": "adamw"}, {"kind": "sgd"}, "belongs to another network or optimizer"),
        ({"num_classes": 3}, {}, "belongs to another network.*class_head.output"),
        ({"norm": "bn"}, {"norm": "gn"}, "belongs to another network"),
        (
            {"ema": False},
            {"ema": True},
            "was saved without averaged weights, .* has optim.ema_decay",
        ),
        (
            {"ema": True},
            {"ema": False},
            "was saved with averaged weights, .* not have optim.ema_decay",
        ),
        ({"is_scaled": True}, {}, "was saved with a scale of the loss, .* not have run.precision"),
        ({}, {"is_scaled": True}, "was saved without a scale of the loss, .* has run.precision"),
    ],
)
def test_load_refuses_the_state_of_another_training(
    make_state: StateFactory, saved: dict[str, Any], loading: dict[str, Any], text: str
) -> None:
    content = make_state(**saved).dump()
    with pytest.raises(CheckpointError, match=f"(?s)^old.pth: {text}"):
        make_state(**loading).load(content, source="old.pth")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": "retinaray-weights-1"}, "expected a training state .*'retinaray-weights-1'"),
        ({"format": None}, "expected a training state .*None"),
        ({"optimizer": None}, "it lacks optimizer"),
        ({"step": None, "best_ap": None}, "it lacks step, best_ap"),
    ],
)
def test_load_refuses_a_foreign_file(
    make_state: StateFactory, change: dict[str, Any], text: str
) -> None:
    state = make_state()
    values = torch.load(io.BytesIO(state.dump()), weights_only=True)
    for key, value in change.items():
        values[key] = value
        if value is None:
            del values[key]
    stream = io.BytesIO()
    torch.save(values, stream)
    with pytest.raises(CheckpointError, match=f"^x.pth: .*{text}"):
        state.load(stream.getvalue(), source="x.pth")


def test_load_refuses_averages_of_another_network(make_state: StateFactory) -> None:
    state = make_state()
    values = torch.load(io.BytesIO(state.dump()), weights_only=True)
    del values["average"]["fpn.p6.bias"]
    stream = io.BytesIO()
    torch.save(values, stream)
    with pytest.raises(CheckpointError, match="its averaged weights have other names"):
        state.load(stream.getvalue(), source="x.pth")


def test_note_validation_keeps_the_best_and_counts_the_others(make_state: StateFactory) -> None:
    state = make_state(ema=False)
    seen = [
        (state.note_validation(ap), state.best_ap, state.num_stale)
        for ap in (None, 0.0, 0.3, 0.3, 0.2, None, 0.4)
    ]
    assert seen == [
        (False, None, 1),
        (True, 0.0, 0),
        (True, 0.3, 0),
        (False, 0.3, 1),
        (False, 0.3, 2),
        (False, 0.3, 3),
        (True, 0.4, 0),
    ]


def test_exported_state_is_the_average_when_there_is_one(make_state: StateFactory) -> None:
    plain, averaged = make_state(ema=False), make_state()
    assert averaged.average is not None
    averaged.average.values["fpn.p6.bias"].fill_(7.0)
    assert (averaged.exported_state()["fpn.p6.bias"] == 7.0).all()
    assert torch.equal(plain.exported_state()["fpn.p6.bias"], plain.model.fpn.p6.bias)
    assert averaged.exported_state().keys() == plain.model.state_dict().keys()
