"""The best IoU that any anchor of a grid has with each box, without making the grid.

Boxes are in network pixels. Letters: M boxes, L levels, B anchors per cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from retinaray.data.coco import CocoDataset
from retinaray.data.transforms import fit_size
from retinaray.detector.anchors import AnchorSpec, Convention, count_cells, make_cell_anchors

# Boxes whose temporaries stay in a core's cache.
_CHUNK = 8192


def place_boxes(dataset: CocoDataset, canvas: tuple[int, int]) -> Float[np.ndarray, "M 4"]:
    """All boxes of a data set, crowds included, where `letterbox` puts them.

    Args:
        dataset: Boxes in original pixels.
        canvas: Network height and width.

    Returns:
        Network pixels, float32, in the order of the data set; the same values as
        `Placement.to_network` gives image by image.
    """
    sizes = np.array([(record.height, record.width) for record in dataset.images], np.int64)
    sizes = sizes.reshape(-1, 2)
    kinds, kind_of_image = np.unique(sizes, axis=0, return_inverse=True)
    contents = np.array(
        [fit_size(height, width, *canvas) for height, width in kinds.tolist()], np.float64
    )
    scale_yx = (contents.reshape(-1, 2) / kinds)[kind_of_image.reshape(-1)]
    scale_of_row = np.repeat(scale_yx[:, [1, 0, 1, 0]], np.diff(dataset.offsets), axis=0)
    return np.asarray(dataset.boxes_xyxy * scale_of_row, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class BoxGrid:
    """How boxes lie in the cells of each level: all that the best IoU of a shape depends on.

    An anchor shape's overlap with a box falls on each axis with the distance of the two centres, so
    its best cell is the one whose centre is nearest on both axes.

    Attributes:
        strides: Pixels per cell of each level.
        convention: Where an anchor lies in its cell.
        sides: Widths and heights of the boxes, float32 [2, M].
        distances: Distance of each box's centre from the nearest anchor centre, by level, in x and
            y, float32 [L, 2, M].
    """

    strides: tuple[int, ...]
    convention: Convention
    sides: NDArray[np.float32]
    distances: NDArray[np.float32]

    @classmethod
    def of(
        cls,
        boxes_xyxy: Float[np.ndarray, "M 4"],
        *,
        strides: Sequence[int],
        convention: Convention,
        canvas: tuple[int, int],
    ) -> BoxGrid:
        """Lay boxes over the cells of a canvas (height, width)."""
        corners = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4).T
        centres = (corners[:2] + corners[2:]) / 2
        distances = np.empty((len(strides), 2, centres.shape[1]), np.float32)
        for level, stride in enumerate(strides):
            # All anchors of a cell share its centre, whatever their shape.
            first = make_cell_anchors(AnchorSpec((1.0,), (1.0,), (stride,), convention), stride)[0]
            offset = float(first[0] + first[2]) / 2
            for axis, size_px in enumerate((canvas[1], canvas[0])):
                position = (centres[axis] - offset) / stride
                nearest = np.clip(np.rint(position), 0, count_cells(size_px, stride) - 1)
                distances[level, axis] = np.abs(position - nearest) * stride
        return cls(tuple(strides), convention, (corners[2:] - corners[:2]).astype("f4"), distances)

    def best_iou(self, scales: Sequence[float], ratios: Sequence[float]) -> Float[np.ndarray, " M"]:
        """Best IoU of each box over all levels, cells, scales and ratios; float32 in [0, 1]."""
        spec = AnchorSpec(tuple(scales), tuple(ratios), self.strides, self.convention)
        cells = [make_cell_anchors(spec, stride).numpy() for stride in self.strides]
        best = np.zeros(self.sides.shape[1], np.float32)
        for start in range(0, len(best), _CHUNK):
            rows = slice(start, start + _CHUNK)
            width, height = self.sides[:, rows]
            for level, cell in enumerate(cells):
                distance_x, distance_y = self.distances[level, :, rows]
                for x1, y1, x2, y2 in cell:
                    overlap = _overlap(x2 - x1, width, distance_x)
                    overlap *= _overlap(y2 - y1, height, distance_y)
                    overlap /= (x2 - x1) * (y2 - y1) + width * height - overlap
                    np.maximum(best[rows], overlap, out=best[rows])
        return best


def _overlap(
    side: float, sides: NDArray[np.float32], distances: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Length that an interval shares with others whose centres are so far away."""
    shared = (sides + side) * np.float32(0.5)
    shared -= distances
    np.minimum(shared, sides, out=shared)
    return np.clip(shared, 0, side, out=shared)


def best_iou_of(
    boxes_xyxy: Float[np.ndarray, "M 4"], spec: AnchorSpec, canvas: tuple[int, int]
) -> Float[np.ndarray, " M"]:
    """The highest IoU that each box has with any anchor of `make_anchors`.

    Args:
        boxes_xyxy: Network pixels; M may be 0. A box without area has 0.
        spec: The anchors.
        canvas: Network height and width, of any size.

    Returns:
        Float32 in [0, 1], exact but for rounding.
    """
    grid = BoxGrid.of(boxes_xyxy, strides=spec.strides, convention=spec.convention, canvas=canvas)
    return grid.best_iou(spec.scales, spec.ratios)
