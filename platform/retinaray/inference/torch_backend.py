"""A weights file run by torch itself: the reference that every export is compared with."""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor

from retinaray.artifact import ModelCard, read_weights
from retinaray.detector.postprocess import Detections, select_candidates
from retinaray.detector.retinanet import RetinaNet
from retinaray.inference.predictor import PredictorSettings, Suppressor

# As many candidates as an exported file gives by default, so that both see the same.
TOP_K = 1000


class TorchPredictor:
    """Runs a network in evaluation mode.

    Args:
        model: The network; moved to the GPU when there is one and it is not there yet.
        card: What it is.
        settings: How to run it.
        autocast_dtype: Type of the convolutions; none = float32.
        top_k: Candidates per image before suppression.
    """

    backend = "torch"

    def __init__(
        self,
        model: RetinaNet,
        *,
        card: ModelCard,
        settings: PredictorSettings,
        autocast_dtype: torch.dtype | None = None,
        top_k: int = TOP_K,
    ) -> None:
        self.card = card
        self.canvas = settings.canvas or card.canvas
        self._model = model
        self._device = next(model.parameters()).device
        self._autocast_dtype = autocast_dtype
        self._top_k = top_k
        self._suppress = Suppressor(card, settings)

    @torch.inference_mode()
    def predict(self, images: UInt8[Tensor, "N 3 H W"]) -> list[Detections]:
        """Detections of each image in network pixels, on the CPU."""
        images = images.to(self._device).contiguous(memory_format=torch.channels_last)
        enabled = self._autocast_dtype is not None
        was_training = self._model.training
        self._model.eval()
        with torch.autocast(self._device.type, dtype=self._autocast_dtype, enabled=enabled):
            logits, deltas = self._model(images)
        self._model.train(was_training)
        boxes, scores, labels = select_candidates(
            logits,
            deltas,
            self._model.anchors_for(images),
            height=images.shape[-2],
            width=images.shape[-1],
            top_k=self._top_k,
        )
        return self._suppress(boxes, scores, labels)


def load_torch_predictor(
    content: bytes, *, uri: str, settings: PredictorSettings
) -> TorchPredictor:
    """A predictor from a weights file, on the GPU when there is one; float32 either way.

    Raises:
        CheckpointError: If the file is damaged or foreign.
    """
    card, model = read_weights(content, source=uri)
    torch.set_num_threads(settings.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TorchPredictor(model, card=card, settings=settings)
