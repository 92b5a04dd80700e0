from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from retinaray.api import model as model_module
from retinaray.assembly import evaluation as evaluation_module
from retinaray.assembly import thresholds as thresholds_module


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, image_set: Any, tiny_weights: bytes
) -> Path:
    """model.pth, data/images and data/{train,val,test}.json; tests only read it."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "model.pth").write_bytes(tiny_weights)
    shutil.copytree(image_set.folder, folder / "data" / "images")
    truth: dict[str, Any] = copy.deepcopy(image_set.coco)
    # The third class of the tiny model.
    truth["categories"].append({"id": 27, "name": "class 2"})
    for split in ("train", "val", "test"):
        (folder / "data" / f"{split}.json").write_text(json.dumps(truth))
    return folder


@pytest.fixture(scope="session")
def onnx_folder(model_folder: Path, tiny_onnx: bytes) -> Path:
    """`model_folder` with model.onnx; the export costs seconds."""
    (model_folder / "model.onnx").write_bytes(tiny_onnx)
    return model_folder


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Models that are loaded take one thread of the machine."""
    for module in (model_module, evaluation_module, thresholds_module):
        monkeypatch.setattr(module, "count_cores", lambda: 1)
