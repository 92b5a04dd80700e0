from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from retinaray.artifact import Architecture, ModelCard, dump_weights
from retinaray.data.coco import Category, CategoryTable
from retinaray.detector.anchors import AnchorSpec
from retinaray.detector.retinanet import RetinaNet
from retinaray.export.onnx_graph import ExportSettings, InputType, export_onnx

CANVAS = (96, 128)


@dataclass(frozen=True)
class SmallDetector:
    """A network with random weights that answers every picture with scores all over 0..1."""

    card: ModelCard
    model: RetinaNet

    @property
    def weights(self) -> bytes:
        return dump_weights(self.card, self.model.state_dict())

    def export(self, input_type: InputType = "uint8", fixed_batch: int | None = None) -> bytes:
        settings = ExportSettings(canvas=CANVAS, input_type=input_type, fixed_batch=fixed_batch)
        return export_onnx(self.model, self.card, settings)

    def make_images(self, count: int, seed: int = 0) -> torch.Tensor:
        """Coarse noise, so that neighbouring images differ in what is found."""
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand((count, 3, CANVAS[0] // 8, CANVAS[1] // 8), generator=generator)
        return nn.functional.interpolate(coarse * 255, size=CANVAS, mode="bilinear").to(torch.uint8)


@pytest.fixture(scope="session")
def detector() -> SmallDetector:
    """Three classes, on a canvas of 96x128."""
    torch.manual_seed(4)
    card = ModelCard(
        architecture=Architecture(
            backbone="ResNet10FPN", norm="gn", fpn_channels=32, head_depth=1, stride_in_1x1=False
        ),
        anchors=AnchorSpec(scales=(2.0,)),
        categories=CategoryTable(tuple(Category(10 * k + 3, f"class {k}") for k in range(3))),
        canvas=CANVAS,
        score_thresholds=(0.3, 0.4, 0.5),
    )
    model = card.build_model().eval()
    # Fresh heads answer every place with the same low score.
    nn.init.normal_(model.class_head.output.weight, std=1.0)
    nn.init.constant_(model.class_head.output.bias, -5.0)
    nn.init.normal_(model.box_head.output.weight, std=0.1)
    return SmallDetector(card, model)
