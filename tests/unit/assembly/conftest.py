from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retinaray.artifact import ModelCard
from retinaray.assembly import portable_file
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import TrainJob
from retinaray.detector.retinanet import RetinaNet
from retinaray.export.onnx_graph import ExportSettings, export_onnx


@pytest.fixture
def make_train_job(image_set: Any) -> Callable[..., TrainJob]:
    """Training jobs on `image_set`: make_train_job({"run.epochs": 3, ...})."""

    def make(changes: dict[str, object] | None = None) -> TrainJob:
        tree: dict[str, Any] = {
            "output": "model.pth",
            "model": {"backbone": "ResNet10FPN", "fpn_channels": 16, "head_depth": 0},
            "data": {
                "images": str(image_set.folder),
                "annotations": str(image_set.annotations),
                "resize": 64,
                "max_size": 96,
            },
        }
        return load_from_dict(TrainJob, tree, changes or {})

    return make


@pytest.fixture(scope="session")
def exported() -> dict[ExportSettings, bytes]:
    """Files of the tiny model that were exported already; an export costs seconds."""
    return {}


@pytest.fixture
def remembered_export(
    exported: dict[ExportSettings, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter, asked once in the session for each settings of the tiny model."""

    def export_once(model: RetinaNet, card: ModelCard, settings: ExportSettings) -> bytes:
        if settings not in exported:
            exported[settings] = export_onnx(model, card, settings)
        return exported[settings]

    monkeypatch.setattr(portable_file, "export_onnx", export_once)


@pytest.fixture
def write_json(tmp_path: Path) -> Callable[[str, Any], str]:
    """Write a value into a file of the test's folder and give its path."""

    def write(name: str, value: Any) -> str:
        path = tmp_path / name
        path.write_text(json.dumps(value))
        return str(path)

    return write
