from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from retinaray.detector.anchors import AnchorSpec, make_anchors


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
