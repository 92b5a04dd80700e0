"""The two heads that are shared by all pyramid levels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Every class starts at this probability, so that the first steps are not spent on pushing
# background down.
PRIOR_PROBABILITY = 0.01


class PredictionHead(nn.Module):
    """A tower of 3x3 convolutions and one output convolution, over every level.

    Args:
        channels: Channels of the pyramid.
        depth: Convolutions before the output layer, >= 0.
        num_anchors: Anchors per cell.
        num_outputs: Values per anchor: K classes, or 4 offsets.
        output_bias: Initial bias of the output layer.
        norm_groups: Groups of the GroupNorm after each tower convolution; 0 = none, as in ODTK and
            in the paper.

    Source: Lin et al. 2017 (arXiv:1708.02002), section 4.
    """

    def __init__(
        self,
        *,
        channels: int,
        depth: int,
        num_anchors: int,
        num_outputs: int,
        output_bias: float = 0.0,
        norm_groups: int = 0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=norm_groups == 0))
            if norm_groups:
                layers.append(nn.GroupNorm(norm_groups, channels))
            layers.append(nn.ReLU(inplace=True))
        self.tower = nn.Sequential(*layers)
        self.output = nn.Conv2d(channels, num_anchors * num_outputs, 3, padding=1)
        self.num_outputs = num_outputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.output.bias is not None:
            nn.init.constant_(self.output.bias, output_bias)

    def forward(self, levels: Sequence[Float[Tensor, "N C _ _"]]) -> Float[Tensor, "N A V"]:
        """Values of every anchor, in the order of `make_anchors`."""
        return torch.cat([self._flatten(self.output(self.tower(level))) for level in levels], dim=1)

    def _flatten(self, values: Float[Tensor, "N BV h w"]) -> Float[Tensor, "N hwB V"]:
        # Channels-last memory makes this a view.
        return values.permute(0, 2, 3, 1).reshape(values.shape[0], -1, self.num_outputs)


def prior_bias(probability: float = PRIOR_PROBABILITY) -> float:
    """Logit of a probability in (0, 1)."""
    return -math.log((1 - probability) / probability)
