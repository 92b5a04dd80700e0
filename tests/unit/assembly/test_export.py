"""`export`: the file is written when it finds the original's boxes, and only then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from retinaray.artifact import hash_content
from retinaray.assembly import file_gate, portable_file
from retinaray.assembly.export import run_export
from retinaray.config.loading import load_from_dict
from retinaray.config.schema import ExportJob
from retinaray.errors import (
    CheckpointError,
    DatasetError,
    ExportError,
    InferenceError,
    StorageError,
)
from retinaray.export.nvidia_parser import is_nvidia_parser_available
from retinaray.export.targets import read_file_kind

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def job(tmp_path: Path, tiny_weights: bytes, monkeypatch: pytest.MonkeyPatch) -> ExportJob:
    """Export of the tiny model; the counted cores are one."""
    monkeypatch.setattr(file_gate, "count_cores", lambda: 1)
    monkeypatch.setattr(portable_file, "count_cores", lambda: 1)
    (tmp_path / "model.pth").write_bytes(tiny_weights)
    tree = {
        "model": str(tmp_path / "model.pth"),
        "output": str(tmp_path / "out" / "model.onnx"),
        # One test asks it; each build costs seconds.
        "gate": {"nvidia": "skip"},
    }
    return load_from_dict(ExportJob, tree)


@pytest.fixture
def fake_export(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Replaces the exporter by one that gives this file."""

    def replace_by(content: bytes) -> None:
        monkeypatch.setattr(portable_file, "export_onnx", lambda *_: content)

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
    found = outcome.parity.candidates
    assert found.num_reference > 50
    assert found.num_changed == 0
    assert found.box_px.max < 0.01
    values = json.loads(outcome.to_json())
    assert values["parity"]["candidates"]["num_missing"] == 0
    assert (values["canvas"], values["kind"], values["nvidia"]) == ([64, 96], "fp32", None)
    assert "64x96 (height x width), fp32, uint8 input" in outcome.to_text()


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
    with pytest.raises(ExportError, match=r"model\.onnx was not written: "):
        run_export(job)
    assert not Path(job.output).parent.exists()


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
        ExportJob, job.model_dump(), {"gate.images": str(image_set.folder), "input": "uint8"}
    )
    outcome = run_export(with_images)
    assert outcome.parity.num_images == 6
    assert outcome.parity.candidates.num_reference > 0


@pytest.mark.usefixtures("remembered_export")
@pytest.mark.skipif(
    not is_nvidia_parser_available(), reason="needs the packages of the extra [rtx]"
)
def test_run_export_writes_what_nvidia_builds_for_each_precision(
    job: ExportJob, image_set: Any
) -> None:
    changes = {
        "gate.nvidia": "require",
        "precision": "int8",
        "target": "jetpack6",
        "calibration.images": str(image_set.folder),
        "batch": 2,
    }
    outcome = run_export(load_from_dict(ExportJob, job.model_dump(), changes))
    assert (outcome.kind, outcome.input_type) == ("int8-fp16", "uint8")
    assert outcome.nvidia is not None
    assert outcome.nvidia.convolutions["Int8"] > 10
    assert outcome.parity.case.precision == "int8"
    assert outcome.parity.num_images == 6
    proto = onnx.load(job.output)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    assert "parses and builds it" in outcome.to_text()


@pytest.mark.usefixtures("remembered_export")
@pytest.mark.parametrize(
    ("precision", "target", "kind", "input_type"),
    [
        ("fp16", None, "fp16", "uint8"),
        ("fp16", "jetpack5", "fp32", "float32"),
        ("fp16", "tensorrt11", "fp16", "uint8"),
        ("fp32", "deepstream-dgpu", "fp32", "float32"),
    ],
)
def test_run_export_writes_the_file_that_the_target_takes(
    job: ExportJob, precision: str, target: str | None, kind: str, input_type: str
) -> None:
    outcome = run_export(
        load_from_dict(ExportJob, job.model_dump(), {"precision": precision, "target": target})
    )
    assert (outcome.kind, outcome.input_type) == (kind, input_type)
    assert read_file_kind(Path(job.output).read_bytes()) == kind


def test_run_export_says_what_an_engine_needs_before_it_works(
    job: ExportJob, fake_export: Callable[[bytes], None], tmp_path: Path
) -> None:
    fake_export(b"never reached")
    engine = load_from_dict(ExportJob, job.model_dump(), {"output": str(tmp_path / "engine.plan")})
    with pytest.raises(InferenceError, match="GPU"):
        run_export(engine)


@pytest.mark.usefixtures("remembered_export")
def test_run_export_goes_on_without_calibration_images_that_cannot_be_read(
    job: ExportJob, image_set: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "calibration"
    folder.mkdir()
    first = sorted(image_set.folder.iterdir())[0]
    (folder / first.name).write_bytes(first.read_bytes())
    (folder / "broken.jpg").write_bytes(b"no image")
    changes = {
        "precision": "int8",
        "calibration.images": str(folder),
        "gate.images": str(image_set.folder),
    }
    outcome = run_export(load_from_dict(ExportJob, job.model_dump(), changes))
    assert outcome.kind == "int8"
    assert "calibration goes on without an image: " in caplog.text
    (folder / first.name).unlink()
    with pytest.raises(DatasetError, match="no image could be used for calibration"):
        run_export(load_from_dict(ExportJob, job.model_dump(), changes))


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
    empty = load_from_dict(ExportJob, job.model_dump(), {"gate.images": str(tmp_path / "none")})
    with pytest.raises(DatasetError, match="no images found"):
        run_export(empty)
    assert not Path(job.output).exists()
