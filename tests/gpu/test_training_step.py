"""A training step never waits for the device: matching, losses, backward under CUDA's own check."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from retinaray.detector.anchors import AnchorSpec, make_anchors
from retinaray.detector.losses import BoxLoss, box_loss_sum, focal_loss_sum
from retinaray.detector.matching import match_anchors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_CLASSES = 5


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Everything that makes the host wait for the device raises RuntimeError."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def make_targets(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes, classes, validity and crowd flags of 3 images with 6 rows, some degenerate."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(3, 6, 2, generator=generator) * 200
    boxes = torch.cat((corners, corners + 5 + torch.rand(3, 6, 2, generator=generator) * 80), -1)
    boxes[0, 0, 2:] = boxes[0, 0, :2]
    boxes[1, 1] = float("nan")
    classes = torch.randint(0, NUM_CLASSES, (3, 6), generator=generator)
    is_valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [False] * 6])
    is_crowd = torch.zeros(3, 6, dtype=torch.bool)
    is_crowd[0, 5] = True
    return boxes.to(device), classes.to(device), is_valid.to(device), is_crowd.to(device)


def train_once(
    anchors: Tensor,
    targets: tuple[Tensor, Tensor, Tensor, Tensor],
    logits: Tensor,
    deltas: Tensor,
    kind: BoxLoss,
) -> tuple[Tensor, Tensor]:
    """Matching, both losses, backward; gives the matches and the loss."""
    boxes, classes, is_valid, is_crowd = targets
    matches = match_anchors(anchors, boxes, is_valid=is_valid, is_crowd=is_crowd)
    rows = matches.clamp(min=0)
    own_boxes = boxes.gather(1, rows[..., None].expand(-1, -1, 4))
    own_classes = torch.where(matches >= 0, classes.gather(1, rows), matches)
    loss = focal_loss_sum(logits, own_classes)
    loss = loss + box_loss_sum(deltas, anchors, own_boxes, matches >= 0, kind=kind)
    loss.backward()
    return matches, loss.detach()


def make_outputs(num_anchors: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, num_anchors, NUM_CLASSES, generator=generator)
    deltas = torch.randn(3, num_anchors, 4, generator=generator) * 0.1
    return logits.to(device).requires_grad_(), deltas.to(device).requires_grad_()


@pytest.mark.parametrize("kind", ["l1", "smooth_l1", "giou"])
def test_matching_losses_and_backward_do_not_wait_for_the_device(
    kind: BoxLoss, request: pytest.FixtureRequest
) -> None:
    anchors = make_anchors(AnchorSpec(), 256, 320).to("cuda")
    targets = make_targets("cuda")
    outputs = make_outputs(len(anchors), "cuda")
    # Once before the check: loading kernels waits.
    train_once(anchors, targets, *outputs, kind)
    request.getfixturevalue("no_waiting")
    train_once(anchors, targets, *outputs, kind)


@pytest.mark.usefixtures("no_waiting")
def test_the_check_sees_a_wait() -> None:
    values = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        values.sum().item()
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        values[values > 0]


@pytest.mark.parametrize("kind", ["l1", "smooth_l1", "giou"])
def test_matching_and_losses_are_the_same_as_on_the_cpu(kind: BoxLoss) -> None:
    anchors = make_anchors(AnchorSpec(), 256, 320)
    results = []
    for device in ("cpu", "cuda"):
        outputs = make_outputs(len(anchors), device)
        matches, loss = train_once(anchors.to(device), make_targets(device), *outputs, kind)
        gradients = [output.grad.cpu() for output in outputs if output.grad is not None]
        results.append((matches.cpu(), loss.cpu(), gradients))
    (cpu_matches, cpu_loss, cpu_grads), (matches, loss, grads) = results
    assert (cpu_matches >= 0).sum() > 20
    assert matches.equal(cpu_matches)
    torch.testing.assert_close(loss, cpu_loss, rtol=1e-5, atol=1e-4)
    assert len(grads) == len(cpu_grads) == 2
    for gradient, expected in zip(grads, cpu_grads, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
