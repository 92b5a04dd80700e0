"""One optimizer step: its loss, parts of a batch, steps that are skipped, scaled losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchvision.ops import sigmoid_focal_loss

from retinaray.artifact import ModelCard
from retinaray.data.batching import Batch
from retinaray.detector.box_coding import encode_boxes
from retinaray.detector.retinanet import RetinaNet
from retinaray.training import step as step_module
from retinaray.training.step import (
    LossSettings,
    StepResult,
    TrainingStep,
    WeightAverage,
    compute_loss_sums,
    make_optimizer,
    take_step,
)

BOX = torch.tensor([[10.0, 10.0, 34.0, 34.0]])


@pytest.fixture
def model(make_tiny_card: Callable[..., ModelCard], one_thread: None) -> RetinaNet:
    torch.manual_seed(0)
    return make_tiny_card(head_depth=0).build_model().train()


def step_once(
    model: RetinaNet,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    clip_norm: float = 0.0,
    settings: LossSettings | None = None,
) -> Any:
    return take_step(
        model,
        optimizer,
        batch,
        anchors_xyxy=model.anchors_for(batch.images),
        settings=settings or LossSettings(),
        learning_rate=0.01,
        clip_norm=clip_norm,
        autocast_dtype=None,
    )


def test_compute_loss_sums_are_torchvisions_focal_loss_and_l1_when_one_box(
    make_batch: Callable[..., Batch],
) -> None:
    # Three anchors: one that is the box, one with IoU 0.45 (ignored), one far away (background).
    anchors = torch.tensor([[10.0, 10, 34, 34], [10, 10, 34, 20.8], [60, 40, 84, 64]])
    batch = make_batch([BOX])
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 3, generator=generator)
    deltas = torch.randn(1, 3, 4, generator=generator)
    sums = compute_loss_sums(logits, deltas, anchors, batch, LossSettings())
    target = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    expected = sigmoid_focal_loss(logits[0, [0, 2]], target, alpha=0.25, gamma=2, reduction="sum")
    assert sums.class_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    offsets = encode_boxes(BOX[0], anchors[0])
    assert sums.box_sum.item() == pytest.approx((deltas[0, 0] - offsets).abs().sum().item())
    assert sums.num_foreground.item() == 1


def test_take_step_normalises_by_the_foreground_count_and_takes_the_rate(
    model: RetinaNet, make_batch: Callable[..., Batch]
) -> None:
    batch = make_batch([BOX, BOX + 20, torch.zeros(0, 4)])
    with torch.no_grad():
        logits, deltas = model(batch.images)
        sums = compute_loss_sums(
            logits, deltas, model.anchors_for(batch.images), batch, LossSettings()
        )
    optimizer = make_optimizer(model, kind="sgd", learning_rate=1.0, weight_decay=0.0)
    result = step_once(model, optimizer, batch)
    assert sums.num_foreground > 2
    assert result.num_foreground == sums.num_foreground
    assert result.class_loss.item() == pytest.approx(
        (sums.class_sum / sums.num_foreground).item(), rel=1e-5
    )
    assert result.box_loss.item() == pytest.approx(
        (sums.box_sum / sums.num_foreground).item(), rel=1e-5
    )
    assert result.is_finite
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


def test_take_step_moves_weights_against_the_gradient_when_sgd(
    model: RetinaNet, make_batch: Callable[..., Batch]
) -> None:
    bias = model.box_head.output.bias
    before = bias.detach().clone()
    optimizer = make_optimizer(model, kind="sgd", learning_rate=1.0, weight_decay=0.1)
    step_once(model, optimizer, make_batch([BOX]))
    assert bias.grad.abs().max() > 0
    # Rate 0.01, no momentum yet, and biases do not decay.
    torch.testing.assert_close(bias.detach(), before - 0.01 * bias.grad)


def test_take_step_is_finite_when_no_image_has_a_box(
    model: RetinaNet, make_batch: Callable[..., Batch]
) -> None:
    optimizer = make_optimizer(model, kind="adamw", learning_rate=1.0, weight_decay=0.05)
    result = step_once(model, optimizer, make_batch([torch.zeros(0, 4)] * 2))
    assert result.is_finite
    assert result.num_foreground == 0
    assert result.box_loss == 0
    assert result.class_loss > 0


def test_take_step_clips_the_norm_but_reports_it_unclipped(
    model: RetinaNet, make_batch: Callable[..., Batch]
) -> None:
    optimizer = make_optimizer(model, kind="sgd", learning_rate=1.0, weight_decay=0.0)
    result = step_once(model, optimizer, make_batch([BOX]), clip_norm=0.01)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert result.gradient_norm > 0.1
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def take_whole(
    model: RetinaNet, optimizer: torch.optim.Optimizer, batch: Batch, **changes: Any
) -> StepResult:
    settings = {"loss": LossSettings(), "clip_norm": 0.0, "autocast_dtype": None, **changes}
    return TrainingStep(model, optimizer, **settings).take(
        batch, anchors_xyxy=model.anchors_for(batch.images), learning_rate=0.01
    )


def test_take_holds_no_gradient_while_the_network_runs(
    model: RetinaNet, make_batch: Callable[..., Batch]
) -> None:
    optimizer = make_optimizer(model, kind="sgd", learning_rate=1.0, weight_decay=0.0)
    held = []

    def look(*_: Any) -> None:
        held.append(sum(parameter.grad is not None for parameter in model.parameters()))

    model.class_head.register_forward_hook(look)
    for _ in range(2):
        take_whole(model, optimizer, make_batch([BOX]))
        assert all(parameter.grad is not None for parameter in model.parameters())
    assert held == [0, 0]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_take_gives_the_gradient_of_the_whole_batch_when_it_goes_in_parts(
    model: RetinaNet, make_batch: Callable[..., Batch], accumulate: int
) -> None:
    # The first part has all the boxes, the last none: means over parts would differ.
    batch = make_batch([torch.cat((BOX, BOX + 20)), BOX + 9, torch.zeros(0, 4), torch.zeros(0, 4)])
    start = {key: value.clone() for key, value in model.state_dict().items()}
    results, gradients = [], []
    for parts in (1, accumulate):
        model.load_state_dict(start)
        optimizer = make_optimizer(model, kind="sgd", learning_rate=1.0, weight_decay=0.0)
        results.append(take_whole(model, optimizer, batch, accumulate=parts))
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    whole, divided = results
    assert whole.num_foreground == divided.num_foreground > 2
    for name in ("class_loss", "box_loss", "gradient_norm"):
        torch.testing.assert_close(getattr(whole, name), getattr(divided, name))
    assert len(gradients[0]) == len(list(model.parameters()))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert max(gradient.abs().max() for gradient in gradients[0]) > 0.1


def test_take_refuses_parts_that_do_not_divide_the_images(
    model: RetinaNet, make_batch: Callable[..., Batch]
) -> None:
    optimizer = make_optimizer(model, kind="sgd", learning_rate=1.0, weight_decay=0.0)
    with pytest.raises(ValueError, match="3 images do not divide into 2 equal parts"):
        take_whole(model, optimizer, make_batch([BOX] * 3), accumulate=2)


@pytest.fixture
def batch_norm_model(make_tiny_card: Callable[..., ModelCard], one_thread: None) -> RetinaNet:
    torch.manual_seed(0)
    return make_tiny_card(norm="bn", head_depth=0).build_model().train()


@pytest.mark.parametrize("clip_norm", [0.0, 10.0])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_take_changes_nothing_when_the_loss_is_infinite(
    batch_norm_model: RetinaNet, make_batch: Callable[..., Batch], kind: str, clip_norm: float
) -> None:
    model = batch_norm_model
    batch = make_batch([BOX, BOX + 20])
    optimizer = make_optimizer(model, kind=kind, learning_rate=0.01, weight_decay=0.05)

    def copy_all() -> list[Tensor]:
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return [value.clone() for value in (*model.state_dict().values(), *moments)]

    # With momentum, so that a step without gradients would move the weights.
    assert take_whole(model, optimizer, batch, clip_norm=clip_norm).is_finite
    before = copy_all()
    infinite = LossSettings(box_weight=float("inf"))
    result = take_whole(model, optimizer, batch, clip_norm=clip_norm, loss=infinite)
    assert not result.is_finite
    for value, expected in zip(copy_all(), before, strict=True):
        assert torch.equal(value, expected)
    assert take_whole(model, optimizer, batch, clip_norm=clip_norm).is_finite
    after = copy_all()
    assert all(torch.isfinite(value).all() for value in after)
    assert sum(torch.equal(*pair) for pair in zip(after, before, strict=True)) == 0


def test_take_is_the_same_when_the_loss_is_scaled_by_a_power_of_two(
    model: RetinaNet, make_batch: Callable[..., Batch]
) -> None:
    batch = make_batch([BOX, BOX + 20])
    start = {key: value.clone() for key, value in model.state_dict().items()}
    outcomes = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        model.load_state_dict(start)
        optimizer = make_optimizer(model, kind="adamw", learning_rate=0.01, weight_decay=0.05)
        result = take_whole(model, optimizer, batch, clip_norm=0.5, scaler=scaler)
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        outcomes.append((result.class_loss, result.gradient_norm, weights))
    (loss, norm, weights), (scaled_loss, scaled_norm, scaled_weights) = outcomes
    assert scaled_loss == loss
    assert scaled_norm == norm
    assert all(torch.equal(value, scaled_weights[key]) for key, value in weights.items())


def test_take_halves_the_scale_and_changes_no_weight_when_the_scaled_loss_overflows(
    model: RetinaNet, make_batch: Callable[..., Batch]
) -> None:
    batch = make_batch([BOX])
    optimizer = make_optimizer(model, kind="sgd", learning_rate=0.01, weight_decay=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    steep = LossSettings(box_weight=1000.0)
    assert not take_whole(model, optimizer, batch, scaler=scaler, loss=steep).is_finite
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("wants_stop", [False, True])
def test_take_counts_the_votes_to_stop(
    model: RetinaNet, make_batch: Callable[..., Batch], wants_stop: bool
) -> None:
    optimizer = make_optimizer(model, kind="sgd", learning_rate=1.0, weight_decay=0.0)
    step = TrainingStep(model, optimizer, loss=LossSettings(), clip_norm=0.0, autocast_dtype=None)
    batch = make_batch([BOX])
    result = step.take(
        batch,
        anchors_xyxy=model.anchors_for(batch.images),
        learning_rate=0.01,
        wants_stop=wants_stop,
    )
    assert result.num_stop_votes == float(wants_stop)


def test_take_agrees_with_the_plain_network_when_it_is_compiled(
    model: RetinaNet, make_batch: Callable[..., Batch]
) -> None:
    batch = make_batch([BOX, BOX + 20])
    start = {key: value.clone() for key, value in model.state_dict().items()}
    outcomes = []
    calls = []

    def run_as_it_is(graph: Any, _: Any) -> Any:
        calls.append(graph)
        return graph

    for is_compiled in (False, True):
        model.load_state_dict(start)
        if is_compiled:
            model.compile(backend=run_as_it_is, dynamic=False)
        optimizer = make_optimizer(model, kind="sgd", learning_rate=0.01, weight_decay=0.0)
        for _ in range(2):
            result = take_whole(model, optimizer, batch)
        outcomes.append((result.class_loss, result.gradient_norm))
    assert len(calls) == 1  # one graph, made once
    torch.testing.assert_close(outcomes[0], outcomes[1])
    assert model.state_dict().keys() == start.keys()


def test_take_gives_gradients_that_lie_in_memory_as_the_weights_do(
    model: RetinaNet, make_batch: Callable[..., Batch]
) -> None:
    # The fused kernels go through both in the order of their memory.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(model, kind="sgd", learning_rate=1.0, weight_decay=0.0)
    take_whole(model, optimizer, make_batch([BOX, BOX + 20]), accumulate=2)
    assert not model.fpn.p6.weight.is_contiguous()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        flat = ((parameter.numel(),), (1,))
        same_order = torch.empty_like(parameter).copy_(parameter.grad)
        assert torch.equal(parameter.grad.as_strided(*flat), same_order.as_strided(*flat)), name


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_take_reads_nothing_from_the_device(
    make_tiny_card: Callable[..., ModelCard], make_batch: Callable[..., Batch], kind: str
) -> None:
    # Tensors without content: whatever would need a value on the host raises.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = make_tiny_card(norm="bn", head_depth=0).build_model().train()
        optimizer = make_optimizer(model, kind=kind, learning_rate=1.0, weight_decay=0.1)
        average = WeightAverage(model, decay=0.9)
        whole = make_batch([BOX, BOX + 20])
        batch = replace(
            whole,
            images=torch.zeros(whole.images.shape, dtype=torch.uint8),
            boxes_xyxy=torch.zeros(2, 1, 4),
        )
        result = take_whole(
            model,
            optimizer,
            batch,
            accumulate=2,
            clip_norm=1.0,
            autocast_dtype=torch.bfloat16,
            scaler=torch.amp.GradScaler("cpu"),
        )
        average.update(model, 0, is_finite=result.is_finite)
        with pytest.raises(DataDependentOutputException):
            result.is_finite.item()


class FakeParallel(nn.Module):
    """Notes which forward passes ran without an exchange, as DistributedDataParallel offers it."""

    def __init__(self, model: RetinaNet) -> None:
        super().__init__()
        self.model = model
        self.exchanges: list[bool] = []
        self._is_quiet = False

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self._is_quiet = True
        yield
        self._is_quiet = False

    def forward(self, images: Tensor) -> Any:
        self.exchanges.append(not self._is_quiet)
        return self.model(images)


def test_take_exchanges_gradients_once_when_a_batch_goes_in_parts(
    model: RetinaNet, make_batch: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "DistributedDataParallel", FakeParallel)
    wrapped = FakeParallel(model)
    optimizer = make_optimizer(model, kind="sgd", learning_rate=1.0, weight_decay=0.0)
    batch = make_batch([BOX] * 3)
    step = TrainingStep(
        wrapped,
        optimizer,
        loss=LossSettings(),
        clip_norm=0.0,
        autocast_dtype=None,
        accumulate=3,
    )
    step.take(batch, anchors_xyxy=model.anchors_for(batch.images), learning_rate=0.01)
    assert wrapped.exchanges == [False, False, True]
