from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18, resnet50

from retinaray.artifact import ModelCard
from retinaray.detector.retinanet import RetinaNet
from retinaray.migration.odtk_categories import make_class_numbers
from retinaray.migration.odtk_weights import load_odtk_state, read_odtk_checkpoint

# Constructor, and channels of C3, C4 and C5.
RESNETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "ResNet18FPN": (resnet18, (128, 256, 512)),
    "ResNet50FPN": (resnet50, (512, 1024, 2048)),
}


class OdtkBackbone(nn.Module):
    """A whole classifier with ODTK's pyramid around it, by ODTK's names."""

    def __init__(self, features: nn.Module, widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.features: Any = features
        for level, width in zip((3, 4, 5), widths, strict=True):
            self.add_module(f"lateral{level}", nn.Conv2d(width, 256, 1))
            self.add_module(f"smooth{level}", nn.Conv2d(256, 256, 3, padding=1))
        self.add_module("pyramid6", nn.Conv2d(widths[2], 256, 3, stride=2, padding=1))
        self.add_module("pyramid7", nn.Conv2d(256, 256, 3, stride=2, padding=1))

    def forward(self, images: Tensor) -> list[Tensor]:
        net, own = self.features, dict(self.named_children())
        c2 = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(images)))))
        c3 = net.layer2(c2)
        c4 = net.layer3(c3)
        c5 = net.layer4(c4)
        p5 = own["lateral5"](c5)
        p4 = own["lateral4"](c4) + functional.interpolate(p5, scale_factor=2)
        p3 = own["lateral3"](c3) + functional.interpolate(p4, scale_factor=2)
        p6 = own["pyramid6"](c5)
        p7 = own["pyramid7"](torch.relu(p6))
        return [own["smooth3"](p3), own["smooth4"](p4), own["smooth5"](p5), p6, p7]


class OdtkNet(nn.Module):
    """ODTK's network with nine anchors per cell, written from its description."""

    def __init__(self, name: str, num_classes: int) -> None:
        super().__init__()
        constructor, widths = RESNETS[name]
        self.name, self.num_classes = name, num_classes
        self.backbones = nn.ModuleDict({name: OdtkBackbone(constructor(), widths)})
        self.cls_head = self._make_head(9 * num_classes)
        self.box_head = self._make_head(9 * 4)

    @staticmethod
    def _make_head(num_outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for _ in range(4):
            layers += [nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.Conv2d(256, num_outputs, 3, padding=1))

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        levels = self.backbones[self.name](images)
        return [self.cls_head(x) for x in levels], [self.box_head(x) for x in levels]

    def to_values(self, **others: object) -> dict[str, Any]:
        """What ODTK writes: no counts of batches, the classifier's last layer left in."""
        state = {k: v for k, v in self.state_dict().items() if "num_batches_tracked" not in k}
        values = {"backbone": [self.name], "classes": self.num_classes, "state_dict": state}
        return {**values, "iteration": 90_000, **others}


@pytest.fixture(scope="session")
def make_odtk_net() -> Callable[..., OdtkNet]:
    """Networks with random weights: make_odtk_net("ResNet18FPN", 3)."""

    def make(name: str, num_classes: int) -> OdtkNet:
        torch.manual_seed(7)
        net = OdtkNet(name, num_classes).eval()
        with torch.no_grad():
            for layer in net.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    # Statistics as training leaves them, not the 0 and 1 of a fresh layer.
                    layer.running_mean.normal_(std=0.2)
                    layer.running_var.uniform_(0.5, 2.0)
                    layer.weight.uniform_(0.5, 1.2)
                    layer.bias.normal_(std=0.1)
            noise = torch.randn(1, 3, 128, 128)
            for head, spread, bias in ((net.cls_head, 1.0, -4.0), (net.box_head, 0.2, 0.0)):
                for layer in head:
                    if isinstance(layer, nn.Conv2d):
                        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                last = head[8]
                outputs = head(net.backbones[name](noise)[0])
                last.weight.mul_(spread / outputs.std())
                last.bias.fill_(bias)
        return net

    return make


@pytest.fixture(scope="session")
def odtk_net(make_odtk_net: Callable[..., OdtkNet]) -> OdtkNet:
    """A ResNet-18 with three classes; tests leave it as it is."""
    return make_odtk_net("ResNet18FPN", 3)


@pytest.fixture(scope="session")
def save() -> Callable[..., bytes]:
    """A file's content: save(values, is_old=True) is torch's format before its zips."""

    def write(values: object, *, is_old: bool = False) -> bytes:
        stream = io.BytesIO()
        torch.save(values, stream, _use_new_zipfile_serialization=not is_old)
        return stream.getvalue()

    return write


@pytest.fixture(scope="session")
def import_net(save: Callable[..., bytes]) -> Callable[[OdtkNet], tuple[ModelCard, RetinaNet]]:
    """The card and the network that come of an older file of a network."""

    def make(net: OdtkNet) -> tuple[ModelCard, RetinaNet]:
        found = read_odtk_checkpoint(save(net.to_values()), source="old.pth")
        card = ModelCard(
            architecture=found.architecture,
            anchors=found.anchors,
            categories=make_class_numbers(found.num_classes),
            canvas=(128, 128),
            score_thresholds=(0.05,) * found.num_classes,
        )
        model = card.build_model().eval()
        load_odtk_state(model, found.state, source="old.pth")
        return card, model

    return make


@pytest.fixture(scope="session")
def imported(
    odtk_net: OdtkNet, import_net: Callable[[OdtkNet], tuple[ModelCard, RetinaNet]]
) -> tuple[ModelCard, RetinaNet]:
    """Card and network of `odtk_net`; tests leave them as they are."""
    return import_net(odtk_net)
