"""The heads' arithmetic, against PyTorch's own count."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from retinaray.anchoring.head_cost import count_head_gflops
from retinaray.detector.anchors import AnchorSpec, count_cells
from retinaray.detector.retinanet import RetinaNet


@pytest.mark.parametrize(
    "spec",
    [AnchorSpec(), AnchorSpec(scales=(2.0,), strides=(4, 8, 16, 32, 64, 128))],
    ids=["P3", "P2"],
)
@pytest.mark.parametrize("head_depth", [0, 2])
def test_count_head_gflops_equals_what_pytorch_counts(spec: AnchorSpec, head_depth: int) -> None:
    model = RetinaNet(
        backbone="ResNet10FPN",
        num_classes=3,
        anchors=spec,
        norm="gn",
        fpn_channels=16,
        head_depth=head_depth,
    )
    levels = [
        torch.zeros(1, 16, count_cells(70, stride), count_cells(100, stride))
        for stride in spec.strides
    ]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.class_head(levels)
        model.box_head(levels)
    gflops = count_head_gflops(
        spec, (70, 100), num_classes=3, fpn_channels=16, head_depth=head_depth
    )
    assert gflops == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-12)


def test_count_head_gflops_gives_the_hand_computed_cost_of_one_cell() -> None:
    # One cell: two towers of one 3x3 convolution 2 -> 2, and outputs 2 -> 1 * (3 + 4) channels:
    # 9 * 2 * (2 * 2 + 7) multiply-adds, twice as many operations.
    spec = AnchorSpec(scales=(4.0,), ratios=(1.0,), strides=(8,))
    gflops = count_head_gflops(spec, (8, 8), num_classes=3, fpn_channels=2, head_depth=1)
    assert gflops == pytest.approx(2 * 9 * 2 * 11 / 1e9)
