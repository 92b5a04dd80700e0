"""Losses against torchvision's and PyTorch's own, computed on the counted anchors only."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from retinaray.detector import losses
from retinaray.detector.losses import BoxLoss, box_loss_sum, focal_loss_sum
from retinaray.detector.matching import BACKGROUND, IGNORED, match_anchors

NAN, INF = float("nan"), float("inf")
KINDS: list[BoxLoss] = ["l1", "smooth_l1", "giou"]


def random_logits(seed: int, spread: float, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 60, 5, generator=generator) * spread).to(dtype)


def random_classes(seed: int) -> Tensor:
    """Of five classes, background and ignored, each about equally often."""
    return torch.randint(-2, 5, (2, 60), generator=torch.Generator().manual_seed(seed))


def torchvision_focal(logits: Tensor, classes: Tensor, alpha: float, gamma: float) -> Tensor:
    one_hot = functional.one_hot(classes.clamp(min=0), 5) * (classes >= 0)[..., None]
    counted = classes != IGNORED
    return sigmoid_focal_loss(
        logits[counted],
        one_hot[counted].to(logits.dtype),
        alpha=alpha,
        gamma=gamma,
        reduction="sum",
    )


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (0.75, 1.5), (0.1, 5.0)])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_focal_loss_sum_equals_torchvision_in_value_and_gradient(
    alpha: float, gamma: float, spread: float
) -> None:
    logits, classes = random_logits(0, spread), random_classes(1)
    ours_in = logits.clone().requires_grad_()
    theirs_in = logits.double().requires_grad_()
    ours = focal_loss_sum(ours_in, classes, alpha=alpha, gamma=gamma)
    theirs = torchvision_focal(theirs_in, classes, alpha, gamma)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    assert ours_in.grad is not None
    assert theirs_in.grad is not None
    torch.testing.assert_close(ours_in.grad.double(), theirs_in.grad, rtol=1e-4, atol=1e-6)


def test_focal_loss_sum_gives_hand_computed_value() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0], [5.0, 5.0]]])
    classes = torch.tensor([[1, BACKGROUND, IGNORED]])
    # Anchor 0, class 0, background, p = 0.5: 0.75 * 0.5^2 * -ln 0.5 = 0.129965
    # Anchor 0, class 1, foreground, p = 0.75: 0.25 * 0.25^2 * -ln 0.75 = 0.004495
    # Anchor 1, two background logits of p = 0.5: 2 * 0.129965 = 0.259930
    loss = focal_loss_sum(logits, classes)
    torch.testing.assert_close(loss, torch.tensor(0.129965 + 0.004495 + 0.259930))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("label", [0, BACKGROUND, IGNORED])
def test_focal_loss_sum_is_exact_and_finite_when_logits_are_extreme(
    label: int, gamma: float
) -> None:
    values = [-1000.0, -200.0, -100.0, 100.0, 200.0, 1000.0]
    logits = torch.tensor(values).reshape(6, 1, 1).requires_grad_()
    classes = torch.full((6, 1), label)
    loss = focal_loss_sum(logits, classes, gamma=gamma)
    # The wrong side loses |x| * alpha, as p is 0 or 1 there; the right side loses nothing.
    expected = {0: 0.25 * 1300, BACKGROUND: 0.75 * 1300, IGNORED: 0.0}[label]
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-5, atol=1e-4)
    loss.backward()
    assert logits.grad is not None
    wrong = {0: [-0.25] * 3 + [0.0] * 3, BACKGROUND: [0.0] * 3 + [0.75] * 3, IGNORED: [0.0] * 6}
    torch.testing.assert_close(
        logits.grad.flatten(), torch.tensor(wrong[label]), rtol=1e-5, atol=1e-6
    )


def test_focal_loss_sum_computes_in_float32_when_logits_are_bfloat16() -> None:
    logits, classes = random_logits(2, 3.0, torch.bfloat16), random_classes(3)
    ours_in = logits.clone().requires_grad_()
    theirs_in = logits.double().requires_grad_()
    ours = focal_loss_sum(ours_in, classes)
    theirs = torchvision_focal(theirs_in, classes, 0.25, 2.0)
    ours.backward()
    theirs.backward()
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    assert ours_in.grad is not None
    assert theirs_in.grad is not None
    # The gradient is handed back in bfloat16, which has eight significant bits.
    torch.testing.assert_close(ours_in.grad.double(), theirs_in.grad, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_focal_loss_sum_knows_every_finite_value_of_16_bits(
    dtype: torch.dtype, gamma: float
) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    values = values[values.isfinite()]
    values = torch.cat((values, values[: -len(values) % 5])).reshape(1, -1, 5)
    classes = torch.full(values.shape[:2], BACKGROUND)
    looked_up = values.clone().requires_grad_()
    computed = values.double().requires_grad_()
    focal_loss_sum(looked_up, classes, gamma=gamma).backward()
    torchvision_focal(computed, classes, 0.25, gamma).backward()
    assert looked_up.grad is not None
    assert computed.grad is not None
    torch.testing.assert_close(
        looked_up.grad.double(),
        computed.grad,
        rtol=2**-8 if dtype == torch.bfloat16 else 2**-10,
        atol=1e-6,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_focal_loss_sum_is_not_finite_when_a_logit_of_16_bits_is_not(
    dtype: torch.dtype, value: float
) -> None:
    logits = random_logits(9, 1.0, dtype)
    logits[0, 0, 0] = value
    classes = torch.full((2, 60), BACKGROUND)
    assert not focal_loss_sum(logits, classes).isfinite()
    # An ignored anchor says nothing, whatever it holds.
    classes[0, 0] = IGNORED
    assert focal_loss_sum(logits, classes).isfinite()


def test_focal_loss_sum_is_zero_when_all_anchors_are_ignored() -> None:
    logits = random_logits(4, 10.0).requires_grad_()
    loss = focal_loss_sum(logits, torch.full((2, 60), IGNORED))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_focal_loss_sum_adds_up_over_images() -> None:
    logits, classes = random_logits(5, 2.0), random_classes(6)
    each = [focal_loss_sum(logits[row, None], classes[row, None]) for row in range(2)]
    torch.testing.assert_close(focal_loss_sum(logits, classes), each[0] + each[1])


def random_boxes(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(*shape, 2, generator=generator) * 100
    return torch.cat((corners, corners + 5 + torch.rand(*shape, 2, generator=generator) * 60), -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.11, 1.0])
def test_box_loss_sum_equals_the_reference_on_foreground_in_value_and_gradient(
    kind: BoxLoss, beta: float
) -> None:
    anchors, targets = random_boxes(0, 40), random_boxes(1, 3, 40)
    deltas = torch.randn(3, 40, 4, generator=torch.Generator().manual_seed(2)) * 0.5
    is_foreground = torch.rand(3, 40, generator=torch.Generator().manual_seed(3)) < 0.4
    ours_in, theirs_in = deltas.clone().requires_grad_(), deltas.clone().requires_grad_()
    ours = box_loss_sum(ours_in, anchors, targets, is_foreground, kind=kind, beta=beta)

    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    picked = theirs_in[is_foreground]
    picked_anchors = anchors.expand(3, 40, 4)[is_foreground]
    picked_targets = targets[is_foreground]
    offsets = coder.encode_single(picked_targets, picked_anchors)
    theirs = {
        "l1": lambda: functional.l1_loss(picked, offsets, reduction="sum"),
        "smooth_l1": lambda: functional.smooth_l1_loss(picked, offsets, beta=beta, reduction="sum"),
        "giou": lambda: generalized_box_iou_loss(
            coder.decode_single(picked, picked_anchors), picked_targets, reduction="sum"
        ),
    }[kind]()
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Offsets of the target: (0.5, 0, log 2, 0); predicted zeros.
        ("l1", 0.5 + math.log(2)),
        # Both above beta = 0.11: |x| - beta / 2 each.
        ("smooth_l1", 0.5 + math.log(2) - 0.11),
        # Anchor 10x10 inside the target 20x10: IoU 0.5, enclosed by the target itself: 1 - 0.5.
        ("giou", 0.5),
    ],
)
def test_box_loss_sum_gives_hand_computed_value(kind: BoxLoss, expected: float) -> None:
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    targets = torch.tensor([[[0.0, 0.0, 20.0, 10.0]]])
    loss = box_loss_sum(torch.zeros(1, 1, 4), anchors, targets, torch.tensor([[True]]), kind=kind)
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "degenerate",
    [[5.0, 5.0, 5.0, 9.0], [9.0, 9.0, 5.0, 5.0], [NAN] * 4, [-INF, 0.0, INF, 5.0]],
    ids=["no width", "turned round", "NaN", "infinite"],
)
def test_box_loss_sum_stays_finite_when_targets_that_do_not_count_are_degenerate(
    kind: BoxLoss, degenerate: list[float]
) -> None:
    anchors, targets = random_boxes(4, 6), random_boxes(5, 1, 6)
    is_foreground = torch.tensor([[True, False, True, False, False, True]])
    deltas = torch.zeros(1, 6, 4, requires_grad=True)
    clean = box_loss_sum(deltas, anchors, targets, is_foreground, kind=kind)
    targets[~is_foreground] = torch.tensor(degenerate)
    loss = box_loss_sum(deltas, anchors, targets, is_foreground, kind=kind)
    loss.backward()
    assert loss.equal(clean)
    assert deltas.grad is not None
    assert torch.isfinite(deltas.grad).all()
    assert (deltas.grad[~is_foreground] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_box_loss_sum_is_zero_when_there_is_no_foreground(kind: BoxLoss) -> None:
    deltas = torch.randn(2, 6, 4, requires_grad=True)
    loss = box_loss_sum(
        deltas,
        random_boxes(6, 6),
        torch.full((2, 6, 4), NAN),
        torch.zeros(2, 6, dtype=torch.bool),
        kind=kind,
    )
    loss.backward()
    assert loss.item() == 0.0
    assert deltas.grad is not None
    assert (deltas.grad == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_box_loss_sum_computes_in_float32_when_offsets_are_bfloat16(kind: BoxLoss) -> None:
    anchors, targets = random_boxes(7, 6), random_boxes(8, 2, 6)
    deltas = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(9)).bfloat16()
    everywhere = torch.ones(2, 6, dtype=torch.bool)
    loss = box_loss_sum(deltas, anchors, targets, everywhere, kind=kind)
    assert loss.dtype == torch.float32
    assert loss.equal(box_loss_sum(deltas.float(), anchors, targets, everywhere, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "bad",
    [
        [50, 50, 50, 80],
        [50, 50, 80, 50],
        [NAN, 50, 80, 80],
        [50, 50, INF, 80],
        [-900, -900, -850, -850],
        [-30, -30, -5, -5],
        [0, 0, 3e38, 3e38],
        [77, 33, 78, 34],
        [50, 50, 50 + 1e-5, 50 + 1e-5],
    ],
    ids=str,
)
def test_losses_stay_finite_when_a_box_is_degenerate(
    anchors_128x160: Tensor, kind: BoxLoss, bad: list[float]
) -> None:
    # First in the list, as in the predecessor's NaN case.
    boxes = torch.tensor([[bad, [20, 20, 70, 60]]], dtype=torch.float32)
    matches = match_anchors(
        anchors_128x160,
        boxes,
        is_valid=torch.ones(1, 2, dtype=torch.bool),
        is_crowd=torch.zeros(1, 2, dtype=torch.bool),
    )
    deltas = torch.zeros(1, len(anchors_128x160), 4, requires_grad=True)
    logits = torch.zeros(1, len(anchors_128x160), 1, requires_grad=True)
    targets = boxes[0][matches.clamp(min=0)]
    loss = box_loss_sum(deltas, anchors_128x160, targets, matches >= 0, kind=kind)
    loss = loss + focal_loss_sum(logits, matches.clamp(max=0))
    loss.backward()
    assert torch.isfinite(loss)
    for gradient in (deltas.grad, logits.grad):
        assert gradient is not None
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_focal_loss_sum_is_the_same_in_pieces_of_any_size(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    found = []
    for piece in (1, 100, 1 << 18):
        monkeypatch.setattr(losses, "_PIECE", piece)
        logits = random_logits(5, 3.0, dtype).requires_grad_()
        loss = focal_loss_sum(logits, random_classes(6))
        loss.backward()
        found.append((loss.detach(), logits.grad))
    for loss, gradient in found[:2]:
        torch.testing.assert_close(loss, found[2][0])
        torch.testing.assert_close(gradient, found[2][1])


def test_focal_loss_sum_refuses_a_second_derivation() -> None:
    loss = focal_loss_sum(random_logits(7, 1.0).requires_grad_(), random_classes(8))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated already"):
        loss.backward()


def test_focal_loss_sum_is_nan_when_a_logit_is() -> None:
    logits = random_logits(9, 1.0)
    logits[0, 0, 0] = math.nan
    assert focal_loss_sum(logits, torch.full((2, 60), BACKGROUND)).isnan()
