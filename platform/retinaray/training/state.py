"""Everything that changes while a model is trained, as one file: k steps + save + load + rest = all.

The order of the images and their augmentation depend on seed and step alone (`data.batching`), so
the step is their whole state.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch

from retinaray.artifact import load_tensors
from retinaray.detector.retinanet import RetinaNet
from retinaray.errors import CheckpointError
from retinaray.training.step import WeightAverage

STATE_FORMAT = "retinaray-training-1"


@dataclass
class TrainingState:
    """A training between two steps.

    Attributes:
        model: The network, not wrapped.
        optimizer: Holds the network's parameters.
        average: Averaged weights; none when averaging is off.
        step: Steps taken.
        best_ap: Best validation AP so far; none before the first validation.
        num_stale: Validations since the best one.
    """

    model: RetinaNet
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    step: int = 0
    best_ap: float | None = None
    num_stale: int = 0

    def note_validation(self, ap: float | None) -> bool:
        """Take in a validation's AP (none = no ground truth); returns whether it is the best so far."""
        is_best = ap is not None and (self.best_ap is None or ap > self.best_ap)
        self.num_stale = 0 if is_best else self.num_stale + 1
        if is_best:
            self.best_ap = ap
        return is_best

    def exported_state(self) -> dict[str, torch.Tensor]:
        """The weights that are validated and kept: the average where there is one."""
        return dict(self.average.values if self.average else self.model.state_dict())

    def dump(self) -> bytes:
        """The state as a file's content."""
        buffer = io.BytesIO()
        torch.save(
            {
                "format": STATE_FORMAT,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.values if self.average else None,
                "step": self.step,
                "best_ap": self.best_ap,
                "num_stale": self.num_stale,
            },
            buffer,
        )
        return buffer.getvalue()

    def load(self, content: bytes, *, source: str) -> None:
        """Go on from a saved state.

        Raises:
            CheckpointError: If the file is damaged, foreign, or of another network or optimizer.
        """
        values = load_tensors(content, source=source)
        if values.get("format") != STATE_FORMAT:
            raise CheckpointError(
                f"{source}: expected a training state (format {STATE_FORMAT!r}), "
                f"found format {values.get('format')!r}"
            )
        if (values["average"] is None) != (self.average is None):
            raise CheckpointError(f"{source}: was saved with another setting of optim.ema_decay")
        try:
            self.model.load_state_dict(values["model"])
            self.optimizer.load_state_dict(values["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{source}: belongs to another network or optimizer: {error}"
            ) from error
        if self.average:
            self.average.load(values["average"].items())
        self.step = int(values["step"])
        self.best_ap = values["best_ap"]
        self.num_stale = int(values["num_stale"])
