"""The operator that is loaded by itself is torchvision's own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torchvision.ops import nms as torchvision_nms

from retinaray.detector import box_operators
from retinaray.detector.box_operators import nms

SCRIPT = """
import sys, torch
from retinaray.detector.box_operators import nms
boxes = torch.tensor([[0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30.0]])
print(nms(boxes, torch.tensor([0.8, 0.9, 0.7]), 0.5).tolist(), "torchvision" in sys.modules)
import torchvision
print(torchvision.ops.nms(boxes, torch.tensor([0.8, 0.9, 0.7]), 0.5).tolist())
"""


@pytest.mark.parametrize("count", [0, 1, 500])
def test_nms_agrees_with_torchvision(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    corners = torch.rand(count, 2, generator=generator) * 100
    sizes = torch.rand(count, 2, generator=generator) * 40
    boxes = torch.cat([corners, corners + sizes], dim=1)
    scores = torch.rand(count, generator=generator)
    kept = nms(boxes, scores, 0.4)
    assert torch.equal(kept, torchvision_nms(boxes, scores, 0.4))
    assert (0 < len(kept) < count) or count < 2


def test_nms_needs_no_import_of_torchvision_and_stands_one_later() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[1, 2] False", "[1, 2]"], done.stderr


def test_nms_imports_torchvision_when_its_library_lies_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    imported = []
    monkeypatch.setattr(box_operators, "_LIBRARIES", ("_of_another_version",))
    monkeypatch.setattr("importlib.import_module", imported.append)
    box_operators._load_operators.cache_clear()
    try:
        box_operators._load_operators()
    finally:
        box_operators._load_operators.cache_clear()
    assert imported == ["torchvision.ops"]
