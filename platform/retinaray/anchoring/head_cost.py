"""What the prediction heads cost: the price of more levels, more anchors per cell, more pixels."""

from __future__ import annotations

from retinaray.detector.anchors import AnchorSpec, count_cells

_KERNEL_AREA = 9
_VALUES_PER_BOX = 4


def count_head_gflops(
    spec: AnchorSpec,
    canvas: tuple[int, int],
    *,
    num_classes: int,
    fpn_channels: int,
    head_depth: int,
) -> float:
    """Arithmetic of both heads over all levels, for one image.

    Args:
        spec: The anchors: their strides say how many cells, scales and ratios how many outputs.
        canvas: Network height and width.
        num_classes: K, background not counted.
        fpn_channels: Width of the heads.
        head_depth: Convolutions before each output layer.

    Returns:
        Convolutions in 1e9 floating-point operations, a multiply-add being two; biases,
        normalisation and activations, below 1 % of it, are left out.
    """
    towers = 2 * head_depth * fpn_channels
    outputs = spec.num_per_cell * (num_classes + _VALUES_PER_BOX)
    num_cells = sum(
        count_cells(canvas[0], stride) * count_cells(canvas[1], stride) for stride in spec.strides
    )
    return 2e-9 * _KERNEL_AREA * fpn_channels * (towers + outputs) * num_cells
