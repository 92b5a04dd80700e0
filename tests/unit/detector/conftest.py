from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from retinaray.detector.anchors import AnchorSpec, make_anchors


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Inputs here are so small that threads cost more time than they bring, on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def anchors_128x160() -> Tensor:
    """Default anchors over an image of 128x160 pixels: 3942 of them."""
    return make_anchors(AnchorSpec(), 128, 160)


@pytest.fixture
def pad_boxes() -> Callable[..., tuple[Tensor, Tensor]]:
    """Stacks box lists of different lengths: boxes [N, M, 4], and which rows are real [N, M]."""

    def pad(
        images: Sequence[Tensor], *, extra: int = 0, fill: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        count = max((len(boxes) for boxes in images), default=0) + extra
        padded = torch.full((len(images), count, 4), fill)
        is_valid = torch.zeros(len(images), count, dtype=torch.bool)
        for row, boxes in enumerate(images):
            padded[row, : len(boxes)] = boxes
            is_valid[row, : len(boxes)] = True
        return padded, is_valid

    return pad


@pytest.fixture(scope="session")
def randomise() -> Callable[[nn.Module], None]:
    """Sets weights at which all layers answer: at the initial ones many outputs are almost zero."""

    @torch.no_grad()
    def set_weights(network: nn.Module) -> None:
        torch.manual_seed(0)
        for parameter in network.parameters():
            if parameter.ndim == 4:
                nn.init.normal_(parameter, std=math.sqrt(2 / parameter[0].numel()))
            else:
                nn.init.uniform_(parameter, -0.2, 0.2)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.3, 0.7)
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)

    return set_weights
