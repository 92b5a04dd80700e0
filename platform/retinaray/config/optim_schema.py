"""What a training minimises and how: the loss, the optimizer, its schedule."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from retinaray.config.nodes import Config, Flag, require


class LossConfig(Config):
    """Matching and loss."""

    focal_alpha: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Weight of the foreground in the focal loss."""
    focal_gamma: Annotated[float, Field(ge=0, le=10)] = 2.0
    """Focusing power of the focal loss."""
    box_loss: Annotated[Literal["smooth_l1", "l1", "giou"], Flag("--box-loss")] = "l1"
    """Regression loss."""
    box_beta: Annotated[float, Field(gt=0)] = 0.11
    """Where smooth L1 turns from quadratic to linear."""
    box_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the regression loss beside the focal loss."""
    anchor_ious: Annotated[
        tuple[float, float], Flag("--anchor-ious", unit="IoU", metavar="LOW HIGH")
    ] = (0.4, 0.5)
    """Below LOW an anchor is background, from HIGH on it is foreground, in between it is
    ignored."""
    keep_best_anchor: bool = True
    """The best anchor of each ground truth is foreground however small its IoU."""

    @model_validator(mode="after")
    def _check_fields_together(self) -> LossConfig:
        low, high = self.anchor_ious
        if not 0 < low <= high < 1:
            raise ValueError(
                f"loss.anchor_ious={self.anchor_ious} (--anchor-ious): expected 0 < LOW <= HIGH < 1"
            )
        return self


class OptimConfig(Config):
    """Optimizer and schedule."""

    optimizer: Annotated[Literal["adamw", "sgd"], Flag("--optimizer")] = "adamw"
    """adamw, or sgd with momentum 0.9."""
    peak_lr: Annotated[float | None, Field(gt=0), Flag("--lr")] = None
    """Learning rate after warm-up, used as given, not scaled by batch; none = 5e-4 for adamw,
    0.01 for sgd."""
    momentum: Annotated[float | None, Field(ge=0, lt=1), Flag("--momentum")] = None
    """Momentum of sgd, where it is another; none = 0.9."""
    weight_decay: Annotated[float | None, Field(ge=0), Flag("--regularization-l2")] = None
    """Decay of convolution weights; none = 0.05 for adamw, 1e-4 for sgd. Norms and biases do not
    decay."""
    warmup_steps: Annotated[int | None, Field(ge=0), Flag("--warmup", unit="steps")] = None
    """Linear warm-up; none = 1000, but at most a tenth of the run."""
    schedule: Annotated[Literal["cosine", "milestones"], Flag("--lr-schedule")] = "cosine"
    """Decay after warm-up."""
    milestones: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], Flag("--milestones", unit="steps")
    ] = ()
    """Steps at which the rate is multiplied by --gamma; giving any selects the milestones
    schedule."""
    gamma: Annotated[float, Field(gt=0, lt=1), Flag("--gamma")] = 0.1
    """Factor at each milestone."""
    clip_norm: Annotated[float, Field(ge=0), Flag("--clip-norm")] = 10.0
    """Largest gradient norm; 0 = no clipping."""
    ema_decay: Annotated[float, Field(ge=0, lt=1), Flag("--ema-decay")] = 0.998
    """Decay of the averaged weights that are validated and exported, ramped up from 0; 0 = no
    averaging."""
    max_skipped_steps: Annotated[int, Field(ge=1), Flag("--max-skipped", unit="steps")] = 20
    """Stop after this many steps in a row without a finite gradient; such a step changes
    nothing."""

    @model_validator(mode="after")
    def _check_fields_together(self) -> OptimConfig:
        require(
            [
                (
                    all(later > earlier for earlier, later in pairwise(self.milestones)),
                    f"optim.milestones={self.milestones} (--milestones): expected rising steps",
                ),
                (
                    self.momentum is None or self.optimizer == "sgd",
                    f"optim.momentum={self.momentum} would not be used by "
                    f"optim.optimizer={self.optimizer}: drop --momentum, or give --optimizer sgd",
                ),
            ]
        )
        return self
