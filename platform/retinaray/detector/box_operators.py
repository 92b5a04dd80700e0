"""torchvision's compiled non-maximum suppression, without the import of torchvision.

`import torchvision` imports the tracing compiler of torch: four of the eight seconds that an
inference worker took to start (torchvision 0.29). Its operators lie in a library of their own.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

# The first since torchvision 0.29, the second before.
_LIBRARIES = ("_C_stable", "_C")


def nms(
    boxes_xyxy: Float[Tensor, "D 4"], scores: Float[Tensor, " D"], iou_threshold: float
) -> Int[Tensor, " R"]:
    """Non-maximum suppression; see `torchvision.ops.nms`, of which this is the operator.

    Args:
        boxes_xyxy: Corners; may be empty.
        scores: In any order.
        iou_threshold: Of two boxes that overlap more, the one with the lower score goes.

    Returns:
        Indices of the boxes that stay, best first.
    """
    _load_operators()
    kept: Tensor = torch.ops.torchvision.nms(boxes_xyxy, scores, iou_threshold)
    return kept


@cache
def _load_operators() -> None:
    """Register the operators; a torchvision that keeps them elsewhere is imported whole."""
    spec = importlib.util.find_spec("torchvision")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for name in _LIBRARIES:
            path = Path(folder) / f"{name}.so"
            if path.exists():
                torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
                return
    importlib.import_module("torchvision.ops")
