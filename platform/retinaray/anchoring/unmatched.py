"""Ground truth that ends without any anchor of its own, although anchors touch it.

The best anchor of a ground truth learns whatever box that anchor overlaps most. A small box inside
a bigger one can so lose its best anchor to the bigger one, and with it everything. Letters: M boxes
of one image, B anchors per cell.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from retinaray.anchoring.best_iou import best_iou_of, place_boxes
from retinaray.data.coco import CocoDataset
from retinaray.detector.anchors import AnchorSpec, count_cells, make_cell_anchors
from retinaray.detector.matching import match_anchors

# Far more than float32 rounding: an anchor too many does no harm, one too few would.
_MARGIN = 1e-3


def count_unmatched(
    dataset: CocoDataset,
    spec: AnchorSpec,
    canvas: tuple[int, int],
    *,
    foreground_iou: float = 0.5,
    background_iou: float = 0.4,
) -> int:
    """Ground truths (crowds left out) that own no foreground anchor, best-anchor rule included.

    The matching is `match_anchors` itself, over those anchors of each image that can be foreground:
    the best ones of each box, and all that reach the foreground IoU. It takes a few milliseconds
    per image with several boxes.

    Args:
        dataset: Boxes in original pixels.
        spec: The anchors.
        canvas: Network height and width.
        foreground_iou: As in `match_anchors`.
        background_iou: As in `match_anchors`.
    """
    boxes_xyxy = place_boxes(dataset, canvas)
    best_iou = best_iou_of(boxes_xyxy, spec, canvas)
    num_unmatched = 0
    for start, end in zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True):
        rows = start + np.flatnonzero(~dataset.is_crowd[start:end])
        reachable = rows[best_iou[rows] > 0]
        num_unmatched += len(rows) - len(reachable)
        # A box that is alone keeps its best anchor.
        if len(reachable) < 2:
            continue
        wanted_iou = np.minimum(best_iou[reachable], foreground_iou) - _MARGIN
        anchors = _select_anchors(boxes_xyxy[reachable], wanted_iou, spec, canvas)
        matched = match_anchors(
            torch.from_numpy(anchors),
            torch.from_numpy(boxes_xyxy[reachable])[None],
            is_valid=torch.ones(1, len(reachable), dtype=torch.bool),
            is_crowd=torch.zeros(1, len(reachable), dtype=torch.bool),
            foreground_iou=foreground_iou,
            background_iou=background_iou,
        )
        num_unmatched += len(reachable) - len(np.unique(matched[matched >= 0].numpy()))
    return num_unmatched


def _select_anchors(
    boxes_xyxy: Float[np.ndarray, "M 4"],
    wanted_iou: Float[np.ndarray, " M"],
    spec: AnchorSpec,
    canvas: tuple[int, int],
) -> Float[np.ndarray, "S 4"]:
    """All anchors of the canvas that overlap some box as much as that box wants."""
    selected = []
    # IoU >= t is intersection >= t / (1 + t) of the sum of both areas.
    share = wanted_iou / (1 + wanted_iou)
    areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)
    for stride in spec.strides:
        cell = make_cell_anchors(spec, stride).numpy()
        wanted = share[:, None] * (areas[:, None] + (cell[:, 2:] - cell[:, :2]).prod(axis=1))
        rows = count_cells(canvas[0], stride)
        columns = count_cells(canvas[1], stride)
        overlap_x = _overlap(boxes_xyxy[:, 0::2], cell[:, 0::2], columns, stride)
        overlap_y = _overlap(boxes_xyxy[:, 1::2], cell[:, 1::2], rows, stride)
        chosen = _choose_cells(overlap_x, overlap_y, wanted)
        row, column, shape = np.nonzero(chosen)
        corner = np.stack([column, row, column, row], axis=1).astype(np.float32) * stride
        selected.append(corner + cell[shape])
    return np.concatenate(selected).astype(np.float32)


def _overlap(
    spans: Float[np.ndarray, "M 2"], cell_spans: Float[np.ndarray, "B 2"], count: int, stride: int
) -> Float[np.ndarray, "M B cells"]:
    """Length that each box shares on one axis with each anchor of a line of cells."""
    shift = np.arange(count, dtype=np.float32) * stride
    low = np.maximum(spans[:, None, None, 0], cell_spans[:, None, 0] + shift)
    high = np.minimum(spans[:, None, None, 1], cell_spans[:, None, 1] + shift)
    return np.asarray(np.maximum(high - low, 0))


def _choose_cells(
    overlap_x: NDArray[np.float32], overlap_y: NDArray[np.float32], wanted: NDArray[np.float32]
) -> Bool[np.ndarray, "rows columns B"]:
    """Which anchors of a level share the wanted area with some box."""
    num_shapes = wanted.shape[1]
    chosen = np.zeros((overlap_y.shape[2], overlap_x.shape[2], num_shapes), np.bool_)
    boxes, shapes = np.nonzero(overlap_x.max(axis=2) * overlap_y.max(axis=2) >= wanted)
    for box, shape in zip(boxes.tolist(), shapes.tolist(), strict=True):
        along_x, along_y = overlap_x[box, shape], overlap_y[box, shape]
        area = wanted[box, shape]
        # Only a few cells of each line can reach the area: the product is formed of those.
        column = np.flatnonzero(along_x * along_y.max() >= area)
        row = np.flatnonzero(along_y * along_x.max() >= area)
        is_enough = along_y[row, None] * along_x[column] >= area
        chosen[row[0] : row[-1] + 1, column[0] : column[-1] + 1, shape] |= is_enough
    return chosen
