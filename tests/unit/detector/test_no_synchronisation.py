"""Matching and losses never wait for the device: proved on a CPU by source and by shapes alone.

The run on a real device is in tests/gpu.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from retinaray.detector import losses, matching
from retinaray.detector.losses import BoxLoss, box_loss_sum, focal_loss_sum
from retinaray.detector.matching import match_anchors

WAITING_CALLS = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique", "argwhere"}
WAITING_BUILTINS = {"bool", "float", "int"}


def find_waits(source: str) -> list[str]:
    """What would make the host wait for the device: read-outs, and indexing by a tensor."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            nodes = [node for line in function.body for node in ast.walk(line)]
            slices = {
                target.id
                for node in nodes
                if isinstance(node, ast.Assign) and _is_call_of(node.value, {"slice"})
                for target in node.targets
                if isinstance(target, ast.Name)
            }
            found += [ast.unparse(node) for node in nodes if _is_wait(node, slices)]
    return found


def _is_wait(node: ast.AST, slices: set[str]) -> bool:
    if isinstance(node, ast.Subscript):
        return not all(_is_static_index(part, slices) for part in _index_parts(node))
    is_read_out = isinstance(node, ast.Attribute) and node.attr in WAITING_CALLS
    return is_read_out or _is_call_of(node, WAITING_BUILTINS)


def _is_call_of(node: ast.AST, names: set[str]) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def _index_parts(node: ast.Subscript) -> Iterator[ast.expr]:
    yield from node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]


def _is_static_index(part: ast.expr, slices: set[str]) -> bool:
    is_number = isinstance(part, ast.Constant | ast.UnaryOp | ast.Slice)
    return is_number or (isinstance(part, ast.Name) and part.id in slices)


@pytest.mark.parametrize("module", [matching, losses], ids=["matching", "losses"])
def test_source_reads_nothing_from_the_device(module: ModuleType) -> None:
    assert find_waits(inspect.getsource(module)) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x.sum().item()", ["x.sum().item"]),
        ("x.nonzero()", ["x.nonzero"]),
        ("x.tolist()", ["x.tolist"]),
        ("x.cpu()", ["x.cpu"]),
        ("float(x)", ["float(x)"]),
        ("x[x > 0]", ["x[x > 0]"]),
        ("x[is_foreground]", ["x[is_foreground]"]),
        ("x[:, is_foreground, None]", ["x[:, is_foreground, None]"]),
        ("x[..., 2:] + x[0] + x[-1]", []),
    ],
)
def test_find_waits_sees_a_wait_when_there_is_one(line: str, expected: list[str]) -> None:
    assert find_waits(f"def function(x, is_foreground):\n    return {line}\n") == expected


@pytest.mark.parametrize("kind", ["l1", "smooth_l1", "giou"])
def test_matching_and_losses_need_no_values_for_their_shapes(kind: BoxLoss) -> None:
    # The meta device holds shapes only: whatever depends on a value raises there.
    num_images, num_boxes, num_anchors, num_classes = 2, 3, 50, 4
    with torch.device("meta"):
        anchors, boxes = torch.empty(num_anchors, 4), torch.empty(num_images, num_boxes, 4)
        flags = torch.empty(num_images, num_boxes, dtype=torch.bool)
        logits = torch.empty(num_images, num_anchors, num_classes, requires_grad=True)
        deltas = torch.empty(num_images, num_anchors, 4, requires_grad=True)
        matches = match_anchors(anchors, boxes, is_valid=flags, is_crowd=flags)
        targets = boxes.gather(1, matches.clamp(min=0)[..., None].expand(-1, -1, 4))
        loss = focal_loss_sum(logits, matches.clamp(max=num_classes - 1))
        loss = loss + box_loss_sum(deltas, anchors, targets, matches >= 0, kind=kind)
        loss.backward()
    assert matches.shape == (num_images, num_anchors)
    assert logits.grad is not None
    assert deltas.grad is not None
