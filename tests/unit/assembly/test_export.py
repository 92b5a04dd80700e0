"""`export`: the file is written when it finds the original's boxes, and only then."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from retinaray.artifact import ModelCard, dump_weights, hash_content
from retinaray.assembly import export as export_module
from retinaray.assembly.export import run_export
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import ExportJob
from retinaray.detector.retinanet import RetinaNet
from retinaray.errors import CheckpointError, DatasetError, ExportError, StorageError
from retinaray.export.parity import ParityReport

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def job(tmp_path: Path, tiny_weights: bytes, monkeypatch: pytest.MonkeyPatch) -> ExportJob:
    """Export of the tiny model; the counted cores are one."""
    monkeypatch.setattr(export_module, "count_cores", lambda: 1)
    (tmp_path / "model.pth").write_bytes(tiny_weights)
    tree = {"model": str(tmp_path / "model.pth"), "output": str(tmp_path / "out" / "model.onnx")}
    return load_from_dict(ExportJob, tree)


@pytest.fixture
def fake_export(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Replaces the exporter by one that gives this file."""

    def replace_by(content: bytes) -> None:
        monkeypatch.setattr(export_module, "export_onnx", lambda *_: content)

    return replace_by


def change_bias(content: bytes, name: str, change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """The file with one of its tensors changed."""
    model = onnx.load_model_from_string(content)
    (tensor,) = (t for t in model.graph.initializer if t.name.endswith(name))
    values = change(numpy_helper.to_array(tensor).copy()).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return bytes(model.SerializeToString())


def test_run_export_writes_the_same_bytes_each_time_and_reports_parity(
    job: ExportJob, tiny_onnx: bytes
) -> None:
    outcome = run_export(job)
    content = Path(job.output).read_bytes()
    assert content == tiny_onnx  # exported earlier, from the same weights
    assert outcome.sha256 == hash_content(content)
    assert outcome.num_bytes == len(content)
    assert outcome.parity.num_boxes > 50
    assert (outcome.parity.num_missing, outcome.parity.num_extra) == (0, 0)
    assert outcome.parity.max_box_px < 0.01
    values = json.loads(outcome.to_json())
    assert values["parity"]["num_missing"] == 0
    assert values["canvas"] == [64, 96]
    assert "64x96 (height x width), uint8 input" in outcome.to_text()


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        # Every box moves by 0.3 of its anchor's width.
        ("box_head.output.bias", lambda b: b + np.tile([0.3, 0, 0, 0], len(b) // 4)),
        # Every box is half as wide again.
        ("box_head.output.bias", lambda b: b + np.tile([0, 0, 0.4, 0], len(b) // 4)),
        # Scores rise a little, and more boxes pass the threshold.
        ("class_head.output.bias", lambda b: b + 0.2),
        # Classes are exchanged.
        ("class_head.output.bias", lambda b: b + np.tile([3, -3, 0], len(b) // 3)),
    ],
    ids=["moved", "wider", "scores", "classes"],
)
def test_run_export_writes_nothing_when_the_boxes_differ(
    job: ExportJob,
    tiny_onnx: bytes,
    fake_export: Callable[[bytes], None],
    tensor: str,
    change: Callable[[np.ndarray], np.ndarray],
) -> None:
    fake_export(change_bias(tiny_onnx, tensor, change))
    with pytest.raises(ExportError, match=r"model.onnx was not written: of \d+ boxes"):
        run_export(job)
    assert not Path(job.output).parent.exists()


@pytest.mark.parametrize(
    ("change", "is_refused"),
    [
        ({}, False),
        ({"max_box_px": 0.5, "max_score": 0.02}, False),  # the tolerances themselves
        ({"max_box_px": 0.51}, True),
        ({"max_score": 0.021}, True),
        ({"num_missing": 1}, True),
        ({"num_extra": 1}, True),
    ],
)
def test_run_export_holds_each_number_of_the_comparison_to_its_limit(
    job: ExportJob,
    tiny_onnx: bytes,
    fake_export: Callable[[bytes], None],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, float],
    is_refused: bool,
) -> None:
    clean = ParityReport(
        num_images=4,
        num_boxes=9,
        num_missing=0,
        num_extra=0,
        max_box_px=0.1,
        mean_box_px=0.01,
        max_score=1e-6,
    )
    report = replace(clean, **change)
    fake_export(tiny_onnx)
    monkeypatch.setattr(export_module, "compare_predictors", lambda *_: report)
    refusal = pytest.raises(ExportError, match=r"model\.onnx was not written: of 9 boxes")
    with refusal if is_refused else nullcontext():
        run_export(job)
    assert Path(job.output).exists() == (not is_refused)


def test_run_export_keeps_an_older_file_when_the_boxes_differ(
    job: ExportJob, tiny_onnx: bytes, fake_export: Callable[[bytes], None]
) -> None:
    Path(job.output).parent.mkdir()
    Path(job.output).write_bytes(b"older")
    fake_export(change_bias(tiny_onnx, "box_head.output.bias", lambda b: b + 0.3))
    with pytest.raises(ExportError):
        run_export(job)
    assert Path(job.output).read_bytes() == b"older"


def test_run_export_compares_on_the_given_images(
    job: ExportJob, tiny_onnx: bytes, fake_export: Callable[[bytes], None], image_set: Any
) -> None:
    fake_export(tiny_onnx)
    with_images = load_from_dict(
        ExportJob, job.model_dump(), {"images": str(image_set.folder), "input": "uint8"}
    )
    outcome = run_export(with_images)
    assert outcome.parity.num_images == 6
    assert outcome.parity.num_boxes > 0


def test_run_export_says_so_when_nothing_was_compared(
    job: ExportJob,
    tiny_card: ModelCard,
    tiny_model: RetinaNet,
    tiny_onnx: bytes,
    fake_export: Callable[[bytes], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    card = replace(tiny_card, score_thresholds=(0.9999,) * 3)
    Path(job.model).write_bytes(dump_weights(card, tiny_model.state_dict()))
    model = onnx.load_model_from_string(tiny_onnx)
    onnx.helper.set_model_props(model, card.to_metadata())
    fake_export(model.SerializeToString())
    with caplog.at_level(logging.WARNING):
        outcome = run_export(job)
    assert outcome.parity.num_boxes == 0
    assert "found nothing in 4 images, so nothing was compared" in caplog.text
    assert Path(job.output).exists()


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"model": "model.onnx"}, ExportError, "expected the .pth weights"),
        ({"model": "model.bin"}, CheckpointError, "expected a model file that ends in"),
        ({"model": "absent.pth"}, StorageError, "absent.pth: no such file"),
    ],
)
def test_run_export_refuses_what_it_cannot_export(
    job: ExportJob, changes: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        run_export(load_from_dict(ExportJob, job.model_dump(), changes))


def test_run_export_refuses_a_folder_without_images(
    job: ExportJob, tiny_onnx: bytes, fake_export: Callable[[bytes], None], tmp_path: Path
) -> None:
    fake_export(tiny_onnx)
    empty = load_from_dict(ExportJob, job.model_dump(), {"images": str(tmp_path / "none")})
    with pytest.raises(DatasetError, match="no images found"):
        run_export(empty)
    assert not Path(job.output).exists()
