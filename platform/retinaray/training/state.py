"""Everything that changes in a training, as one file: k steps + save + load + rest = all.

The order of the images and their augmentation depend on seed and step alone (`data.batching`), so
the step is their whole state.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from retinaray.artifact import load_tensors
from retinaray.detector.retinanet import RetinaNet
from retinaray.errors import CheckpointError
from retinaray.training.optimizer import load_optimizer_state
from retinaray.training.weight_average import WeightAverage

STATE_FORMAT = "retinaray-training-1"
# A checkpoint folder holds the state to go on from, and the weights to use.
STATE_FILE = "training.pth"
WEIGHTS_FILE = "weights.pth"
# A trial's checkpoint also holds what its validation saw before suppression.
CANDIDATES_FILE = "candidates.npz"
_KEYS = ("model", "optimizer", "average", "step", "best_ap", "num_stale")


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
        num_skipped_in_a_row: Steps without a finite gradient up to this one.
        scaler: Scale of the loss, for float16; none for other types.
    """

    model: RetinaNet
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    step: int = 0
    best_ap: float | None = None
    num_stale: int = 0
    num_skipped_in_a_row: int = 0
    scaler: torch.amp.GradScaler | None = None

    def note_validation(self, ap: float | None) -> bool:
        """Take in a validation's AP (none = no ground truth); returns whether it is the best."""
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
                "num_skipped_in_a_row": self.num_skipped_in_a_row,
                "scaler": self.scaler.state_dict() if self.scaler else None,
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
        missing = [key for key in _KEYS if key not in values]
        if missing:
            raise CheckpointError(f"{source}: is damaged: it lacks {', '.join(missing)}")
        self._refuse_other_parts(values, source)
        try:
            # Neither is noticed by the objects themselves.
            if _group_settings(values["optimizer"]) != _group_settings(self.optimizer.state_dict()):
                raise ValueError("the settings of its optimizer have other names")
            if self.average and values["average"].keys() != self.average.values.keys():
                raise ValueError("its averaged weights have other names")
            self.model.load_state_dict(values["model"])
            load_optimizer_state(self.optimizer, values["optimizer"])
            if self.average:
                self.average.load(values["average"].items())
            if self.scaler:
                self.scaler.load_state_dict(values["scaler"])
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{source}: belongs to another network or optimizer: {error}; "
                "resume with the settings it was started with, or start over (--override)"
            ) from error
        self.step = int(values["step"])
        self.best_ap = values["best_ap"]
        self.num_stale = int(values["num_stale"])
        # Files that were written before a run was counted across checkpoints lack it.
        self.num_skipped_in_a_row = int(values.get("num_skipped_in_a_row", 0))

    def _refuse_other_parts(self, values: Mapping[str, Any], source: str) -> None:
        """Both have averaged weights or neither, and likewise a scale of the loss."""
        parts = (
            ("average", self.average, "averaged weights", "optim.ema_decay above 0"),
            # Files that were written before float16 could be asked for lack it.
            ("scaler", self.scaler, "a scale of the loss", "run.precision fp16"),
        )
        for key, own, name, setting in parts:
            if (values.get(key) is None) == (own is None):
                continue
            saved, wanted = ("without", "has") if own else ("with", "does not have")
            raise CheckpointError(
                f"{source}: was saved {saved} {name}, and this training {wanted} {setting}; "
                "resume with the settings it was started with"
            )


def _group_settings(optimizer_state: Mapping[str, Any]) -> list[set[str]]:
    """Names of the settings of each group: AdamW's `betas` or SGD's `momentum`, for one."""
    return [set(group) for group in optimizer_state["param_groups"]]
