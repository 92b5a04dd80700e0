"""Feature pyramid: P2 or P3 to P7 from a backbone's maps; P6 comes from C5."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class FeaturePyramid(nn.Module):
    """Top-down pyramid with two extra levels.

    Args:
        in_channels: Channels of the backbone's maps, finest first, each half the size of the one
            before.
        channels: Channels of every output level.

    Source: Lin et al. 2017 (arXiv:1612.03144); P6 and P7 as in arXiv:1708.02002, section 4.
    """

    def __init__(self, in_channels: Sequence[int], *, channels: int = 256) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)
        self.smooth = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels
        )
        self.p6 = nn.Conv2d(in_channels[-1], channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, features: Sequence[Float[Tensor, "N _ _ _"]]
    ) -> list[Float[Tensor, "N C _ _"]]:
        """Pyramid levels, finest first: one per input map, then P6 and P7."""
        levels: list[Tensor] = []
        upper: Tensor | None = None
        for lateral, smooth, feature in zip(
            reversed(self.lateral), reversed(self.smooth), reversed(features), strict=True
        ):
            merged = lateral(feature)
            if upper is not None:
                # By size, not by a factor of two: odd sizes must meet their lateral map.
                merged = merged + functional.interpolate(
                    upper, size=merged.shape[-2:], mode="nearest"
                )
            upper = merged
            levels.insert(0, smooth(merged))
        p6 = self.p6(features[-1])
        return [*levels, p6, self.p7(functional.relu(p6))]
