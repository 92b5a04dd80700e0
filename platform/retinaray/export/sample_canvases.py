"""Pictures of rectangles and noise, for a check of an exported file without images."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor


def make_test_canvases(
    canvas: tuple[int, int], count: int = 4, seed: int = 0
) -> list[UInt8[Tensor, "3 H W"]]:
    """Pictures that make a detector answer with something.

    Args:
        canvas: Height and width.
        count: Number of pictures.
        seed: Of their contents.
    """
    height, width = canvas
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        picture = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        picture = picture.repeat(8, 0).repeat(8, 1)[:height, :width]
        for _ in range(12):
            top, left = int(rng.integers(0, height)), int(rng.integers(0, width))
            side = int(rng.integers(8, max(9, min(height, width) // 2)))
            picture[top : top + side, left : left + side] = rng.integers(0, 256, 3)
        pictures.append(torch.from_numpy(picture.copy()).permute(2, 0, 1))
    return pictures
