"""Anchor boxes: a specification that travels with the weights, and the grid it spans over an image.

Knows nothing of images, ground truth or networks. Letters: A anchors over all levels, L levels, B
anchors per cell.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Convention = Literal["centered", "odtk", "odtk-legacy"]

DEFAULT_SCALES = (4.0, 4.0 * 2 ** (1 / 3), 4.0 * 2 ** (2 / 3))
DEFAULT_RATIOS = (1.0, 2.0, 0.5)
DEFAULT_STRIDES = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class AnchorSpec:
    """Which anchors stand in every cell of every pyramid level.

    Attributes:
        scales: Anchor side over stride, each > 0.
        ratios: Height over width, each > 0.
        strides: Pixels per cell of each level, rising powers of two; the first is 4 (P2) or 8 (P3).
        convention: `centered`: centre in the middle of the cell, exact sides. `odtk`: ODTK since
            2020-03, whose inclusive corners make every side one pixel longer. `odtk-legacy`: ODTK
            before, sides rounded per stride.

    Raises:
        ValueError: If a value is outside its range.

    Source: Lin et al. 2017 (arXiv:1708.02002), section 4; ODTK's two generations as measured from
    its releases.
    """

    scales: tuple[float, ...] = DEFAULT_SCALES
    ratios: tuple[float, ...] = DEFAULT_RATIOS
    strides: tuple[int, ...] = DEFAULT_STRIDES
    convention: Convention = "centered"

    def __post_init__(self) -> None:
        for name, values in (("scales", self.scales), ("ratios", self.ratios)):
            if not values or not all(math.isfinite(value) and value > 0 for value in values):
                raise ValueError(f"anchor {name}={values}: expected at least one finite value > 0")
        first = self.strides[0] if self.strides else 0
        is_power_of_two = first > 0 and first & (first - 1) == 0
        if not is_power_of_two or any(
            stride != first << index for index, stride in enumerate(self.strides)
        ):
            raise ValueError(
                f"anchor strides={self.strides}: expected powers of two, each twice the last"
            )
        if self.convention not in get_args(Convention):
            raise ValueError(
                f"anchor convention={self.convention!r}: expected one of {get_args(Convention)}"
            )

    @property
    def num_per_cell(self) -> int:
        """Anchors per cell: scales times ratios."""
        return len(self.scales) * len(self.ratios)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a file's metadata; `from_dict` gives an equal spec back."""
        return {
            "scales": list(self.scales),
            "ratios": list(self.ratios),
            "strides": list(self.strides),
            "convention": self.convention,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AnchorSpec:
        """Rebuild a spec from `to_dict`.

        Raises:
            ValueError: If a value is outside its range.
            KeyError: If a key is missing.
        """
        return cls(
            scales=tuple(float(value) for value in values["scales"]),
            ratios=tuple(float(value) for value in values["ratios"]),
            strides=tuple(int(value) for value in values["strides"]),
            convention=values["convention"],
        )


def make_cell_anchors(spec: AnchorSpec, stride_px: int) -> Float[Tensor, "B 4"]:
    """Anchors of the cell at the image's top-left corner.

    Args:
        spec: What to make.
        stride_px: Side of the cell.

    Returns:
        Corners xyxy in continuous pixels (width is x2 - x1), scale-major and ratio-minor. ODTK's
        inclusive corners are one less in x2 and y2 than these.
    """
    corners = []
    for scale in spec.scales:
        for ratio in spec.ratios:
            width = math.sqrt(stride_px * stride_px / ratio)
            if spec.convention == "odtk-legacy":
                width = float(round(width))
                height = float(round(width * ratio))
            else:
                height = width * ratio
            # ODTK since 2020-03 measures width as x2 - x1 + 1 without having taken the 1 off
            # before.
            extra = 1.0 if spec.convention == "odtk" else 0.0
            corners.append(
                (
                    0.5 * (stride_px - width * scale),
                    0.5 * (stride_px - height * scale),
                    0.5 * (stride_px + width * scale) + extra,
                    0.5 * (stride_px + height * scale) + extra,
                )
            )
    return torch.tensor(corners, dtype=torch.float32)


def count_cells(size_px: int, stride_px: int) -> int:
    """Cells along one side: what stride-2 convolutions with padding leave of a side."""
    return -(-size_px // stride_px)


def count_level_anchors(spec: AnchorSpec, height: int, width: int) -> tuple[int, ...]:
    """Anchors of each level for an image of that size."""
    return tuple(
        count_cells(height, stride) * count_cells(width, stride) * spec.num_per_cell
        for stride in spec.strides
    )


def make_anchors(
    spec: AnchorSpec, height: int, width: int, *, device: torch.device | str | None = None
) -> Float[Tensor, "A 4"]:
    """All anchors over an image.

    Strides come from the level, never from a ratio of sizes, so that sizes that are no multiple of
    the largest stride keep their boxes in place.

    Args:
        spec: What stands in each cell.
        height: Image height in pixels, >= 1.
        width: Image width in pixels, >= 1.
        device: Where to make them.

    Returns:
        Corners xyxy in pixels of that image, level by level, row by row, cell by cell; parts of
        anchors may lie outside the image.
    """
    levels = []
    for stride in spec.strides:
        cell = make_cell_anchors(spec, stride).to(device)
        xs = torch.arange(count_cells(width, stride), device=device, dtype=torch.float32) * stride
        ys = torch.arange(count_cells(height, stride), device=device, dtype=torch.float32) * stride
        grid_y, grid_x = torch.meshgrid(ys, xs, indexing="ij")
        shifts = torch.stack((grid_x, grid_y, grid_x, grid_y), dim=-1).reshape(-1, 1, 4)
        levels.append((shifts + cell).reshape(-1, 4))
    return torch.cat(levels)


def hash_anchors(anchors_xyxy: Float[Tensor, "A 4"]) -> str:
    """SHA-256 of anchors, in hexadecimal: two trainings with the same anchors have the same.

    Args:
        anchors_xyxy: As `make_anchors` gives them, on any device.
    """
    values = anchors_xyxy.detach().to(device="cpu", dtype=torch.float32).contiguous()
    return hashlib.sha256(values.numpy().astype("<f4").tobytes()).hexdigest()
