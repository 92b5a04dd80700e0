"""Which anchor learns which ground truth: batched over images, no host synchronisation.

Letters: N images, A anchors, M ground truths per image after padding.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BACKGROUND = -1
IGNORED = -2

# Overlaps in flight at once: 64 MiB of float32 per temporary, whatever the number of boxes in an
# image.
_MAX_OVERLAPS = 1 << 24
# An anchor at least half inside a crowd region cannot be called background.
_CROWD_COVER = 0.5


def match_anchors(
    anchors_xyxy: Float[Tensor, "A 4"],
    boxes_xyxy: Float[Tensor, "N M 4"],
    *,
    is_valid: Bool[Tensor, "N M"],
    is_crowd: Bool[Tensor, "N M"],
    foreground_iou: float = 0.5,
    background_iou: float = 0.4,
    keep_best_anchor: bool = True,
) -> Int[Tensor, "N A"]:
    """Give each anchor of each image a ground truth, or mark it background or ignored.

    Args:
        anchors_xyxy: Anchors in network pixels.
        boxes_xyxy: Ground truth in network pixels, padded to M per image; M may be 0. Rows without
            area or with values that are not finite match nothing.
        is_valid: False for padding.
        is_crowd: Crowd regions: they match nothing, and anchors at least half inside one are
            ignored unless they are foreground.
        foreground_iou: At or above this the anchor is foreground.
        background_iou: Below this it is background; in between, ignored.
        keep_best_anchor: The anchors that overlap a ground truth most are foreground whatever their
            IoU, if it is above 0. As in torchvision they learn the ground truth that they overlap
            most themselves.

    Returns:
        Index in [0, M), or BACKGROUND (-1) or IGNORED (-2). All BACKGROUND when M is 0.

    Raises:
        ValueError: If background_iou > foreground_iou.

    Source: Lin et al. 2017 (arXiv:1708.02002), section 4, and torchvision's Matcher with
    allow_low_quality_matches; deviation: a ground truth that no anchor touches claims none.
    """
    if background_iou > foreground_iou:
        raise ValueError(
            f"background_iou={background_iou} is above foreground_iou={foreground_iou}: swap them"
        )
    num_images, num_boxes = is_valid.shape
    num_anchors = anchors_xyxy.shape[0]
    has_area = (boxes_xyxy[..., 2:] > boxes_xyxy[..., :2]).all(-1)
    is_usable = is_valid & has_area & torch.isfinite(boxes_xyxy).all(-1)
    boxes_xyxy = torch.where(is_usable[..., None], boxes_xyxy, 0.0)
    is_object, is_region = is_usable & ~is_crowd, is_usable & is_crowd

    best_iou = anchors_xyxy.new_zeros(num_images, num_anchors)
    best_index = torch.zeros(num_images, num_anchors, dtype=torch.int64, device=best_iou.device)
    is_best = torch.zeros_like(best_index, dtype=torch.bool)
    is_covered = torch.zeros_like(is_best)
    anchor_area = _area(anchors_xyxy)
    chunk = max(1, _MAX_OVERLAPS // max(1, num_images * num_anchors))
    for start in range(0, num_boxes, chunk):
        rows = slice(start, start + chunk)
        intersection, iou = _overlap(anchors_xyxy, anchor_area, boxes_xyxy[:, rows])
        region = intersection.mul_(is_region[:, rows, None].to(iou.dtype)).amax(dim=1)
        is_covered |= region >= _CROWD_COVER * anchor_area
        iou.mul_(is_object[:, rows, None].to(iou.dtype))
        chunk_iou, chunk_index = iou.max(dim=1)
        is_better = chunk_iou > best_iou
        best_iou = torch.where(is_better, chunk_iou, best_iou)
        best_index = torch.where(is_better, chunk_index + start, best_index)
        if keep_best_anchor:
            highest = iou.amax(dim=2, keepdim=True)
            # No overlap is as high as infinity: a ground truth that no anchor touches claims none.
            is_best |= (iou == torch.where(highest > 0, highest, torch.inf)).any(dim=1)

    is_foreground = (best_iou >= foreground_iou) | is_best
    is_ignored = (best_iou >= background_iou) | is_covered
    unmatched = torch.where(is_ignored, IGNORED, BACKGROUND)
    return torch.where(is_foreground, best_index, unmatched)


def _overlap(
    anchors_xyxy: Float[Tensor, "A 4"],
    anchor_area: Float[Tensor, " A"],
    boxes_xyxy: Float[Tensor, "N M 4"],
) -> tuple[Float[Tensor, "N M A"], Float[Tensor, "N M A"]]:
    """Intersection and IoU of each pair; in place, since what takes the time is memory."""
    ax1, ay1, ax2, ay2 = anchors_xyxy.unbind(-1)
    bx1, by1, bx2, by2 = boxes_xyxy[..., None].unbind(-2)
    width = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_(min=0)
    height = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).clamp_(min=0)
    intersection = width.mul_(height)
    union = torch.add(anchor_area, _area(boxes_xyxy)[..., None], out=height).sub_(intersection)
    return intersection, torch.div(intersection, union, out=union)


def _area(boxes_xyxy: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
    return (x2 - x1) * (y2 - y1)
