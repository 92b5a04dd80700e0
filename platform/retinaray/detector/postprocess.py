"""From raw outputs to detections: candidates by score, then suppression of overlaps.

`select_candidates` is also the tail of the exported graph, so it uses fixed shapes only. Letters: N
images, A anchors, K classes, D candidates or detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retinaray.detector.box_coding import clip_boxes, decode_boxes
from retinaray.detector.box_operators import nms

NmsKind = Literal["class", "agnostic", "none"]
"""Which boxes compete: those of one class, those of all classes, or none with any other."""
NMS_KINDS: tuple[NmsKind, ...] = ("class", "agnostic", "none")

# Classes are kept apart by shifting their boxes by more than any canvas is wide. A fixed power of
# two, so that the rounding of one box does not depend on which others are there: what is kept above
# a score is then the same whether or not lower scores were among the candidates.
_CLASS_STRIDE_PX = 2.0**15


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first.

    Attributes:
        boxes_xyxy: Corners in pixels of the image that the detector saw, unless said otherwise; may
            be empty.
        scores: In [0, 1], falling.
        labels: Class index in [0, K).
    """

    boxes_xyxy: Float[Tensor, "D 4"]
    scores: Float[Tensor, " D"]
    labels: Int[Tensor, " D"]

    def __len__(self) -> int:
        return self.scores.shape[0]


def select_candidates(
    logits: Float[Tensor, "N A K"],
    deltas: Float[Tensor, "N A 4"],
    anchors_xyxy: Float[Tensor, "A 4"],
    *,
    height: int,
    width: int,
    top_k: int = 1000,
    level_sizes: Sequence[int] | None = None,
) -> tuple[Float[Tensor, "N D 4"], Float[Tensor, "N D"], Int[Tensor, "N D"]]:
    """The best (anchor, class) pairs of each image as clipped boxes.

    Args:
        logits: Raw class scores.
        deltas: Raw box offsets.
        anchors_xyxy: Anchors in network pixels.
        height: Network height, to clip.
        width: Network width, to clip.
        top_k: Pairs to keep, at most A times K.
        level_sizes: Anchors of each level: keep `top_k` of every level (ODTK's and torchvision's
            rule); none = of all levels together.

    Returns:
        Boxes xyxy in network pixels, scores in [0, 1], class indices (int32). Sorted by falling
        score without `level_sizes`; level by level with it.
    """
    sizes = [anchors_xyxy.shape[0]] if level_sizes is None else list(level_sizes)
    parts = [
        _best_pairs(level_logits, level_deltas, level_anchors, min(top_k, level_logits[0].numel()))
        for level_logits, level_deltas, level_anchors in zip(
            torch.split(logits, sizes, dim=1),
            torch.split(deltas, sizes, dim=1),
            torch.split(anchors_xyxy, sizes),
            strict=True,
        )
    ]
    boxes, best, labels = (
        parts[0] if len(parts) == 1 else (torch.cat(p, dim=1) for p in zip(*parts, strict=True))
    )
    return clip_boxes(boxes, height, width), torch.sigmoid(best), labels


def _best_pairs(
    logits: Float[Tensor, "N A K"],
    deltas: Float[Tensor, "N A 4"],
    anchors_xyxy: Float[Tensor, "A 4"],
    count: int,
) -> tuple[Float[Tensor, "N D 4"], Float[Tensor, "N D"], Int[Tensor, "N D"]]:
    """Decoded boxes, float32 logits and labels of the `count` best pairs."""
    logits, deltas = logits.float(), deltas.float()
    num_anchors, num_classes = logits.shape[1:]
    # The best pairs lie among the anchors whose best class is best: sorting A values, not A times
    # K.
    num_rows = min(count, num_anchors)
    rows = logits.amax(dim=2).topk(num_rows, dim=1).indices
    row_logits = logits.gather(1, rows[..., None].expand(-1, -1, num_classes))
    best, pair = row_logits.flatten(1).topk(count, dim=1)
    # Truncating division exports as one operator; floor division brings sign handling along.
    row = torch.div(pair, num_classes, rounding_mode="trunc")
    anchor_index = rows.gather(1, row)
    picked_deltas = deltas.gather(1, anchor_index[..., None].expand(-1, -1, 4))
    boxes = decode_boxes(picked_deltas, anchors_xyxy[anchor_index])
    return boxes, best, (pair - row * num_classes).to(torch.int32)


def suppress_overlaps(
    boxes_xyxy: Float[Tensor, "N D 4"],
    scores: Float[Tensor, "N D"],
    labels: Int[Tensor, "N D"],
    *,
    score_thresholds: Float[Tensor, " K"],
    nms_iou: float = 0.5,
    max_detections: int = 100,
    nms_kind: NmsKind = "class",
) -> list[Detections]:
    """Keep the best box of each heap, image by image.

    Args:
        boxes_xyxy: Candidates of each image, on a canvas of at most 32768 pixels a side.
        scores: Their scores.
        labels: Their class indices.
        score_thresholds: A candidate must score above its class's threshold.
        nms_iou: Of two boxes that compete and have a larger IoU the better stays.
        max_detections: Detections to keep per image.
        nms_kind: `class`: boxes of one class compete; `agnostic`: all do; `none`: thresholds and
            `max_detections` only.

    Returns:
        Detections of each image by falling score, equal scores in the order of the candidates;
        empty where nothing passes.

    Raises:
        ValueError: If nms_kind is another word.
    """
    if nms_kind not in NMS_KINDS:
        raise ValueError(f"nms_kind: expected one of {', '.join(NMS_KINDS)}, got {nms_kind!r}")
    return [
        _suppress_image(
            *candidates,
            score_thresholds=score_thresholds,
            nms_iou=nms_iou,
            max_detections=max_detections,
            nms_kind=nms_kind,
        )
        for candidates in zip(boxes_xyxy, scores, labels, strict=True)
    ]


def _suppress_image(
    boxes_xyxy: Float[Tensor, "D 4"],
    scores: Float[Tensor, " D"],
    labels: Int[Tensor, " D"],
    *,
    score_thresholds: Float[Tensor, " K"],
    nms_iou: float,
    max_detections: int,
    nms_kind: NmsKind,
) -> Detections:
    labels = labels.long()
    has_area = (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(-1)
    passing = (scores > score_thresholds[labels]) & has_area
    boxes_xyxy, scores, labels = boxes_xyxy[passing], scores[passing], labels[passing]
    if nms_kind == "none":
        kept = scores.argsort(descending=True, stable=True)
    else:
        # float32 would round a box that was shifted by many classes to hundredths of a pixel.
        apart = boxes_xyxy.double()
        if nms_kind == "class":
            apart = apart + (labels * _CLASS_STRIDE_PX)[:, None]
        kept = nms(apart, scores.double(), nms_iou)
    kept = kept[:max_detections]
    return Detections(boxes_xyxy=boxes_xyxy[kept], scores=scores[kept], labels=labels[kept])
