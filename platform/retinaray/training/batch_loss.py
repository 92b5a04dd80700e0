"""Matching and both losses of a batch, as sums for the step to normalise.

Which anchor learns which box depends on the boxes alone: it is known before the network runs.
Letters: N images, A anchors, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retinaray.data.batching import Batch
from retinaray.detector.losses import BoxLoss, box_loss_sum, focal_loss_sum
from retinaray.detector.matching import match_anchors


@dataclass(frozen=True)
class LossSettings:
    """Matching and loss; see `match_anchors`, `focal_loss_sum` and `box_loss_sum`."""

    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    box_loss: BoxLoss = "l1"
    box_beta: float = 0.11
    box_weight: float = 1.0
    background_iou: float = 0.4
    foreground_iou: float = 0.5
    keep_best_anchor: bool = True


@dataclass(frozen=True)
class LossSums:
    """Losses of some images, not yet normalised.

    Attributes:
        class_sum: Focal loss over all counted anchors.
        box_sum: Regression loss over foreground anchors.
        num_foreground: Foreground anchors.
    """

    class_sum: Float[Tensor, ""]
    box_sum: Float[Tensor, ""]
    num_foreground: Float[Tensor, ""]


def match_batch(
    anchors_xyxy: Float[Tensor, "A 4"], batch: Batch, settings: LossSettings
) -> Int[Tensor, "N A"]:
    """The ground truth of each anchor of each image, or BACKGROUND or IGNORED."""
    return match_anchors(
        anchors_xyxy,
        batch.boxes_xyxy,
        is_valid=batch.is_valid,
        is_crowd=batch.is_crowd,
        foreground_iou=settings.foreground_iou,
        background_iou=settings.background_iou,
        keep_best_anchor=settings.keep_best_anchor,
    )


def count_foreground(matches: Int[Tensor, "N A"]) -> Float[Tensor, ""]:
    """Anchors with a ground truth."""
    return (matches >= 0).sum().float()


def sum_losses(
    outputs: tuple[Float[Tensor, "N A K"], Float[Tensor, "N A 4"]],
    anchors_xyxy: Float[Tensor, "A 4"],
    batch: Batch,
    matches: Int[Tensor, "N A"],
    settings: LossSettings,
) -> LossSums:
    """Sum both losses over a batch; no foreground gives a box sum of 0.

    Args:
        outputs: Class logits and box offsets, as `RetinaNet` gives them.
        anchors_xyxy: Anchors of the batch's canvas.
        batch: Ground truth.
        matches: As `match_batch` gives them.
        settings: Loss.
    """
    logits, deltas = outputs
    is_foreground = matches >= 0
    target = matches.clamp(min=0)
    classes = torch.where(is_foreground, batch.class_indices.gather(1, target), matches)
    boxes = batch.boxes_xyxy.gather(1, target[..., None].expand(-1, -1, 4))
    return LossSums(
        class_sum=focal_loss_sum(
            logits, classes, alpha=settings.focal_alpha, gamma=settings.focal_gamma
        ),
        box_sum=box_loss_sum(
            deltas,
            anchors_xyxy,
            boxes,
            is_foreground,
            kind=settings.box_loss,
            beta=settings.box_beta,
        ),
        num_foreground=count_foreground(matches),
    )


def compute_loss_sums(
    logits: Float[Tensor, "N A K"],
    deltas: Float[Tensor, "N A 4"],
    anchors_xyxy: Float[Tensor, "A 4"],
    batch: Batch,
    settings: LossSettings,
) -> LossSums:
    """Match anchors and sum both losses over a batch; no foreground gives a box sum of 0."""
    matches = match_batch(anchors_xyxy, batch, settings)
    return sum_losses((logits, deltas), anchors_xyxy, batch, matches, settings)
