from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from retinaray.artifact import ModelCard
from retinaray.detector.postprocess import Detections


class ScriptedPredictor:
    """Finds what a function of one canvas [3, H, W] says; remembers the size of its batches."""

    backend = "scripted"

    def __init__(self, card: ModelCard, find: Callable[[Tensor], list[list[float]]]) -> None:
        self.card = card
        self.canvas = card.canvas
        self.find = find
        self.batch_sizes: list[int] = []

    def predict(self, images: Tensor) -> list[Detections]:
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, *self.canvas)
        self.batch_sizes.append(len(images))
        return [self._detect(image) for image in images]

    def _detect(self, image: Tensor) -> Detections:
        """Rows of x1, y1, x2, y2, score, label."""
        rows = torch.tensor(self.find(image), dtype=torch.float32).reshape(-1, 6)
        return Detections(rows[:, :4], rows[:, 4], rows[:, 5].long())


@pytest.fixture
def script_predictor(
    tiny_card: ModelCard,
) -> Callable[..., ScriptedPredictor]:
    """A predictor on the tiny card: script_predictor(lambda canvas: [[x1, y1, x2, y2, s, k]])."""

    def make(
        find: Callable[[Tensor], list[list[float]]] = lambda _: [], card: ModelCard = tiny_card
    ) -> ScriptedPredictor:
        return ScriptedPredictor(card, find)

    return make


@pytest.fixture(scope="session")
def encode_png() -> Callable[..., bytes]:
    """A PNG of one grey: encode_png(height, width, grey)."""

    def encode(height: int, width: int, grey: int = 0) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(np.full((height, width, 3), grey, dtype=np.uint8)).save(stream, "PNG")
        return stream.getvalue()

    return encode
