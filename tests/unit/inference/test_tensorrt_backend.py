"""The TensorRT backend as far as it can be checked without a GPU: names and refusals."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch

import retinaray.inference.tensorrt_backend as backend
from retinaray.errors import InferenceError
from retinaray.inference.predictor import PredictorSettings

SOURCE = Path(backend.__file__)


def _used_trt_names() -> set[str]:
    """Dotted names that are reached from a variable called `trt`."""
    names = set()
    for node in ast.walk(ast.parse(SOURCE.read_text(encoding="utf-8"))):
        parts: list[str] = []
        inner: ast.expr | ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id == "trt":
            names.add(".".join(parts))
    return {name for name in names if not name.startswith("__")}


def test_used_names_include_the_strong_typing_flag() -> None:
    assert "NetworkDefinitionCreationFlag.STRONGLY_TYPED" in _used_trt_names()


@pytest.mark.parametrize("version", ["trt-10.3.0", "trt-10.16.1", "trt-11.4.0", "rtx-1.7.1"])
def test_used_names_exist_in_the_recorded_bindings(version: str, shared_data: Path) -> None:
    record = shared_data.parent / "facts" / "trt_api" / f"{version}.json"
    bindings = json.loads(record.read_text(encoding="utf-8"))
    used = _used_trt_names()
    owners = {name.split(".")[0] for name in used} - {"__version__"}
    assert owners <= set(bindings)
    for name in used:
        owner, _, member = name.partition(".")
        if member:
            assert f"'{member}'" in str(bindings[owner]), name


def test_load_refuses_before_touching_tensorrt_when_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InferenceError, match="needs an NVIDIA GPU"):
        backend.load_tensorrt_predictor(b"", uri="m.onnx", settings=PredictorSettings())


def test_load_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(InferenceError, match=r"retinaray\[tensorrt\]"):
        backend.load_tensorrt_predictor(b"", uri="m.onnx", settings=PredictorSettings())
