"""A weights file run by torch itself: the reference that every export is compared with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.backends import cudnn

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
        settings: How to run it. Its precision `fp32` also keeps a GPU from rounding convolutions to
            TF32, which torch otherwise allows.
        autocast_dtype: Type of the convolutions; none = as the precision of the settings says:
            bf16, else float32.
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
        if autocast_dtype is None and settings.precision == "bf16":
            autocast_dtype = torch.bfloat16
        self._autocast_dtype = autocast_dtype
        self._is_exact = settings.precision == "fp32"
        self._top_k = top_k
        self._suppress = Suppressor(card, settings)

    @torch.inference_mode()
    def predict(self, images: UInt8[Tensor, "N 3 H W"]) -> list[Detections]:
        """Detections of each image in network pixels, on the CPU."""
        images = images.to(self._device).contiguous(memory_format=torch.channels_last)
        enabled = self._autocast_dtype is not None
        was_training = self._model.training
        self._model.eval()
        with (
            torch.autocast(self._device.type, dtype=self._autocast_dtype, enabled=enabled),
            _without_tf32() if self._is_exact else nullcontext(),
        ):
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


def _without_tf32() -> AbstractContextManager[None]:
    # The defaults of `flags` would change the other switches.
    return cudnn.flags(
        enabled=cudnn.enabled,
        benchmark=cudnn.benchmark,
        benchmark_limit=cudnn.benchmark_limit,
        deterministic=cudnn.deterministic,
        allow_tf32=False,
    )


def load_torch_predictor(
    content: bytes, *, uri: str, settings: PredictorSettings, top_k: int = TOP_K
) -> TorchPredictor:
    """A predictor from a weights file, on the GPU when there is one.

    Args:
        content: The file.
        uri: Its name, for messages.
        settings: How to run it.
        top_k: Candidates per image before suppression.

    Raises:
        CheckpointError: If the file is damaged or foreign.
    """
    card, model = read_weights(content, source=uri)
    torch.set_num_threads(settings.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TorchPredictor(model, card=card, settings=settings, top_k=top_k)
