from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from retinaray.artifact import Architecture, ModelCard, dump_weights
from retinaray.data.coco import Category, CategoryTable
from retinaray.detector.anchors import AnchorSpec
from retinaray.detector.retinanet import RetinaNet
from retinaray.export.onnx_graph import ExportSettings, export_onnx

TINY_CANVAS = (64, 96)


class Intruder:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture(scope="session")
def make_intruder() -> Callable[[Path], object]:
    """What makes a folder when it is unpickled: make_intruder(folder)."""
    return Intruder


@dataclass(frozen=True)
class ImageSet:
    """A small COCO data set on disk: folder of PNGs, annotation file, and its content."""

    folder: Path
    annotations: Path
    coco: dict[str, list[dict[str, object]]]

    def read(self, uri: str) -> bytes:
        return Path(uri).read_bytes()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Bit-for-bit sums, and no more of the machine than one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_tiny_card() -> Callable[..., ModelCard]:
    """Cards of networks that run in milliseconds: make_tiny_card(num_classes=3, norm="gn", ...)."""

    def make(
        *,
        num_classes: int = 3,
        backbone: str = "ResNet10FPN",
        norm: str = "gn",
        head_depth: int = 1,
        has_head_norm: bool = False,
        canvas: tuple[int, int] = TINY_CANVAS,
        anchors: AnchorSpec | None = None,
    ) -> ModelCard:
        return ModelCard(
            architecture=Architecture(
                backbone=backbone,
                norm=norm,
                fpn_channels=16,
                head_depth=head_depth,
                stride_in_1x1=False,
                has_head_norm=has_head_norm,
            ),
            anchors=anchors or AnchorSpec(scales=(1.5, 2.5)),
            # Ids with gaps, so that an index taken for an id shows.
            categories=CategoryTable(
                tuple(Category(10 * index + 7, f"class {index}") for index in range(num_classes))
            ),
            canvas=canvas,
            score_thresholds=(0.3,) * num_classes,
            run_id="20260101T000000Z-abc",
            versions={"retinaray": "0.1.0"},
            training={"run": {"batch": 2}},
        )

    return make


@pytest.fixture(scope="session")
def make_lively_model() -> Callable[[ModelCard], RetinaNet]:
    """Networks whose random weights answer every image with scores all over 0..1."""

    def make(card: ModelCard) -> RetinaNet:
        torch.manual_seed(1)
        model = card.build_model().eval()
        for layer in [*model.class_head.tower, *model.box_head.tower]:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
        noise = torch.randint(0, 256, (2, 3, *card.canvas), dtype=torch.uint8)
        with torch.no_grad():
            outputs = model(noise)
            heads = (model.class_head, model.box_head)
            for head, values, spread, bias in zip(
                heads, outputs, (2.0, 0.3), (-6.0, 0.02), strict=True
            ):
                head.output.weight.mul_(spread / values.std())
                head.output.bias.fill_(bias)
        return model

    return make


@pytest.fixture(scope="session")
def tiny_card(make_tiny_card: Callable[..., ModelCard]) -> ModelCard:
    """Three classes on a canvas of 64x96."""
    return make_tiny_card()


@pytest.fixture(scope="session")
def tiny_model(
    tiny_card: ModelCard, make_lively_model: Callable[[ModelCard], RetinaNet]
) -> RetinaNet:
    """The network of `tiny_card`, in evaluation mode; tests leave it as it is."""
    return make_lively_model(tiny_card)


@pytest.fixture(scope="session")
def tiny_weights(tiny_card: ModelCard, tiny_model: RetinaNet) -> bytes:
    """`tiny_model` as a weights file."""
    return dump_weights(tiny_card, tiny_model.state_dict())


@pytest.fixture(scope="session")
def tiny_onnx(tiny_card: ModelCard, tiny_model: RetinaNet) -> bytes:
    """`tiny_model` as an exported file with uint8 input; one export for the whole session."""
    return export_onnx(tiny_model, tiny_card, ExportSettings(canvas=TINY_CANVAS))


@pytest.fixture(scope="session")
def image_set(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Six pictures of all shapes: a red square (class 0) and a green one (class 1) on noise."""
    folder = tmp_path_factory.mktemp("image_set")
    rng = np.random.default_rng(0)
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for number, (height, width) in enumerate([(64, 96), (80, 60), (96, 144)] * 2, start=1):
        pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        for category, colour, start in ((7, (250, 40, 40), 0), (17, (40, 250, 40), width // 2)):
            side = int(rng.integers(18, 30))
            left = start + int(rng.integers(0, width // 2 - side + 1))
            top = int(rng.integers(0, height - side))
            pixels[top : top + side, left : left + side] = colour
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category,
                    "bbox": [left, top, side, side],
                    "area": side * side,
                    "iscrowd": 0,
                }
            )
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        (folder / f"{number}.png").write_bytes(stream.getvalue())
        images.append(
            {"id": number, "file_name": f"{number}.png", "height": height, "width": width}
        )
    coco = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 7, "name": "class 0"}, {"id": 17, "name": "class 1"}],
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps(coco))
    return ImageSet(folder=folder, annotations=path, coco=coco)
