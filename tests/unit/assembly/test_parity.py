"""The command `parity` on the tiny model: what it compares, writes, refuses and says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from retinaray.artifact import ModelCard, dump_weights
from retinaray.assembly import parity as parity_module
from retinaray.assembly import parity_cases
from retinaray.assembly.hardware import describe_hardware
from retinaray.assembly.parity import make_tolerance, run_parity
from retinaray.assembly.parity_cases import plan_cases, read_files
from retinaray.assembly.parity_images import read_batches
from retinaray.config.loading import load_from_dict
from retinaray.config.parity_schema import ParityJob, ToleranceConfig
from retinaray.detector.retinanet import RetinaNet
from retinaray.errors import CheckpointError, DatasetError, InferenceError, MissingFileError
from retinaray.evaluation.parity_rows import ParityTolerance
from retinaray.inference.onnx_card import replace_onnx_card
from retinaray.inference.pipeline import ImageSource, ReadSettings
from retinaray.inference.plan_sidecar import PlanSidecar, write_sidecar

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def files(tmp_path: Path, tiny_weights: bytes, tiny_onnx: bytes) -> Path:
    """A folder with model.pth and model.onnx."""
    (tmp_path / "model.pth").write_bytes(tiny_weights)
    (tmp_path / "model.onnx").write_bytes(tiny_onnx)
    return tmp_path


@pytest.fixture
def make_job(files: Path, image_set: Any) -> Callable[..., ParityJob]:
    """Jobs on the folder and the image set: make_job("other.onnx", {"limit": 2})."""

    def make(*names: str, changes: dict[str, object] | None = None) -> ParityJob:
        tree = {
            "model": str(files / "model.pth"),
            "files": [str(files / name) for name in names or ("model.onnx",)],
            "images": str(image_set.folder),
            "backend": "onnxruntime",
            "threads": 1,
        }
        return load_from_dict(ParityJob, tree, changes or {})

    return make


@pytest.fixture
def annotations(image_set: Any, write_json: Callable[[str, Any], str]) -> str:
    """Annotations of the image set with all three classes of the tiny model."""
    third = {"id": 27, "name": "class 2"}
    coco = {**image_set.coco, "categories": [*image_set.coco["categories"], third]}
    return write_json("annotations.json", coco)


@pytest.fixture
def shift_scores(files: Path, tiny_onnx: bytes) -> Callable[[str, float], str]:
    """Write the tiny file with other class scores: shift_scores("name.onnx", 0.2)."""

    def write(name: str, shift: float) -> str:
        model = onnx.load_model_from_string(tiny_onnx)
        (bias,) = (
            entry
            for entry in model.graph.initializer
            if entry.name.endswith("class_head.output.bias")
        )
        values = numpy_helper.to_array(bias) + np.float32(shift)
        bias.CopyFrom(numpy_helper.from_array(values, bias.name))
        (files / name).write_bytes(model.SerializeToString())
        return name

    return write


def test_run_parity_passes_what_was_exported_from_the_weights(
    make_job: Callable[..., ParityJob], annotations: str, files: Path
) -> None:
    changes = {
        "annotations": annotations,
        "output": str(files / "out" / "numbers.json"),
        "report": str(files / "out" / "page.html"),
        "batch": 2,
    }
    outcome = run_parity(make_job(changes=changes))
    (row,) = outcome.result.rows
    assert outcome.exit_code == 0
    assert row.has_passed
    assert (row.case.name, row.case.precision) == ("model.onnx onnxruntime fp32", "fp32")
    assert row.candidates.num_reference > 50
    assert 0 < row.candidates.box_px.max < 0.01
    assert row.ap == pytest.approx(row.ap_reference, abs=1e-4)
    assert row.latency_ms is not None
    assert outcome.result.num_images == 6
    assert outcome.result.batch == 2
    (group,) = outcome.result.groups
    assert group.canvas == (64, 96)
    assert group.latency_ms is not None
    assert json.loads((files / "out" / "numbers.json").read_text()) == outcome.to_dict()
    assert "All 1 cases pass" in (files / "out" / "page.html").read_text()
    line = json.loads(outcome.to_json())
    assert line["passed"] is True
    assert line["report"].endswith("page.html")
    assert f"written: {changes['report']}" in outcome.to_text()


def test_run_parity_fails_a_file_whose_scores_differ_and_draws_where(
    make_job: Callable[..., ParityJob], shift_scores: Callable[[str, float], str], files: Path
) -> None:
    shift_scores("louder.onnx", 0.5)
    changes = {"report": str(files / "page.html"), "limit": 4}
    outcome = run_parity(make_job("model.onnx", "louder.onnx", changes=changes))
    same, louder = outcome.result.rows
    assert same.has_passed
    assert any("score differs by 0.1" in reason for reason in louder.reasons)
    assert outcome.exit_code == 1
    assert outcome.result.num_images == 4
    page = (files / "page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3  # the worst three, of the louder file only
    assert "No visible difference: model.onnx onnxruntime fp32" in page
    assert "FAILS  louder.onnx onnxruntime fp32: " in outcome.to_text()


@pytest.mark.parametrize(("limit", "has_passed"), [(0.5, True), (1e-9, False)])
def test_run_parity_holds_rows_to_the_callers_tolerance(
    make_job: Callable[..., ParityJob], limit: float, has_passed: bool
) -> None:
    changes = {"tolerance.box_px": limit, "tolerance.score": limit, "limit": 1}
    assert run_parity(make_job(changes=changes)).result.has_passed == has_passed


def test_run_parity_compares_every_runtime_of_this_machine_and_lists_the_others(
    make_job: Callable[..., ParityJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(parity_cases, "list_capabilities", lambda: ["FP32"])
    outcome = run_parity(make_job(changes={"backend": "auto", "limit": 1}))
    assert [row.case.name for row in outcome.result.rows] == [
        "model.onnx onnxruntime fp32",
        "model.onnx openvino fp32",
    ]
    reasons = {case.name: case.reason for case in outcome.result.unrun}
    assert list(reasons) == ["model.onnx openvino bf16", "model.onnx tensorrt tf32"]
    assert "needs a processor that computes it" in reasons["model.onnx openvino bf16"]
    assert "needs an NVIDIA GPU" in reasons["model.onnx tensorrt tf32"]
    assert outcome.exit_code == 0
    assert outcome.to_text().count("not run model.onnx") == 2


def test_run_parity_counts_a_runtime_that_refuses_a_file_as_a_fault(
    make_job: Callable[..., ParityJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = parity_module.load_predictor

    def refuse(*args: Any, **options: Any) -> Any:
        if options["uri"].endswith("copy.onnx"):
            raise InferenceError("unsupported node")
        return load(*args, **options)

    monkeypatch.setattr(parity_module, "load_predictor", refuse)
    job = make_job(changes={"limit": 1})
    copy = Path(job.files[0]).with_name("copy.onnx")
    copy.write_bytes(Path(job.files[0]).read_bytes())
    outcome = run_parity(make_job("model.onnx", "copy.onnx", changes={"limit": 1}))
    assert [row.case.name for row in outcome.result.rows] == ["model.onnx onnxruntime fp32"]
    assert outcome.exit_code == 1
    assert "FAILS  copy.onnx onnxruntime fp32: unsupported node" in outcome.to_text()
    alone = run_parity(make_job("copy.onnx", changes={"limit": 1}))
    assert (alone.result.rows, alone.exit_code) == ((), 1)


def test_run_parity_leaves_unreadable_images_out_of_both_aps(
    make_job: Callable[..., ParityJob], annotations: str, write_json: Callable[[str, Any], str]
) -> None:
    broken = json.loads(Path(annotations).read_text())
    first = {"id": 99, "file_name": "missing.png", "height": 64, "width": 96}
    box = {"id": 99, "image_id": 99, "category_id": 7, "bbox": [1, 1, 9, 9], "area": 81}
    broken["images"] = [first, *broken["images"]]
    broken["annotations"] = [box, *broken["annotations"]]
    path = write_json("broken.json", broken)
    whole = run_parity(make_job(changes={"annotations": annotations}))
    outcome = run_parity(make_job(changes={"annotations": path}))
    assert (outcome.result.num_images, outcome.result.num_errors) == (6, 1)
    assert "1 UNREADABLE" in outcome.to_text()
    assert outcome.result.rows[0].ap_reference == whole.result.rows[0].ap_reference


def test_run_parity_notes_a_card_that_differs_and_uses_the_weights(
    make_job: Callable[..., ParityJob], files: Path, tiny_card: ModelCard, tiny_onnx: bytes
) -> None:
    other = replace(tiny_card, score_thresholds=(0.9,) * 3, nms_iou=0.3)
    content = replace_onnx_card(tiny_onnx, other, uri="other.onnx")
    (files / "other.onnx").write_bytes(content)
    outcome = run_parity(make_job("other.onnx", changes={"limit": 1}))
    assert [note.split(",")[0] for note in outcome.result.notes] == [
        "other.onnx holds score_thresholds=(0.9",
        "other.onnx holds nms_iou=0.3",
    ]
    assert outcome.result.rows[0].candidates.num_reference > 10
    assert outcome.exit_code == 0


def test_run_parity_gives_each_number_of_candidates_its_own_reference(
    make_job: Callable[..., ParityJob], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (files / "few.onnx").write_bytes((files / "model.onnx").read_bytes())
    sizes = iter([1000, 50])
    monkeypatch.setattr(parity_cases, "read_top_k", lambda _: next(sizes))
    asked = []
    load = parity_module.load_torch_predictor

    def load_reference(*args: Any, **options: Any) -> Any:
        asked.append((options["top_k"], options["settings"].precision))
        return load(*args, **options)

    monkeypatch.setattr(parity_module, "load_torch_predictor", load_reference)
    outcome = run_parity(make_job("model.onnx", "few.onnx", changes={"limit": 1}))
    assert asked == [(50, "fp32"), (1000, "fp32")]
    assert [row.case.name for row in outcome.result.rows] == [
        "few.onnx onnxruntime fp32",
        "model.onnx onnxruntime fp32",
    ]
    assert [len(group.rows) for group in outcome.result.groups] == [1, 1]


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"model": "model.onnx"}, CheckpointError, r"expected the \.pth weights"),
        ({"images": "nowhere"}, DatasetError, "no images found"),
        ({"files": ["absent.onnx"]}, MissingFileError, "absent.onnx: no such file"),
        ({"backend": "tensorrt"}, InferenceError, r"none of .*model\.onnx can run here: .*GPU"),
    ],
)
def test_run_parity_refuses_what_it_cannot_compare(
    make_job: Callable[..., ParityJob],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    error: type[Exception],
    text: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=text):
        run_parity(make_job(changes=changes))


def test_run_parity_refuses_annotations_that_are_no_coco_file(
    make_job: Callable[..., ParityJob], write_json: Callable[[str, Any], str]
) -> None:
    path = write_json("list.json", [])
    with pytest.raises(DatasetError, match=r"list\.json: expected a COCO file with images"):
        run_parity(make_job(changes={"annotations": path}))


def test_run_parity_refuses_annotations_of_other_classes_before_it_runs_anything(
    make_job: Callable[..., ParityJob], image_set: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity_module, "load_predictor", None)
    job = make_job(changes={"annotations": str(image_set.annotations)})
    with pytest.raises(DatasetError, match=r"annotations\.json: lacks the model's categories 27"):
        run_parity(job)


def test_run_parity_stops_when_no_image_can_be_read(
    make_job: Callable[..., ParityJob], tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=r"none of 1 images could be read, first: .*a\.png"):
        run_parity(make_job(changes={"images": str(folder)}))


def test_read_files_refuses_a_file_of_another_model(tiny_card: ModelCard, tiny_onnx: bytes) -> None:
    card = replace(tiny_card, architecture=replace(tiny_card.architecture, head_depth=3))
    with pytest.raises(CheckpointError, match=r"m\.onnx: its architecture are not those of m\.pth"):
        read_files(["m.onnx"], lambda _: tiny_onnx, card, model="m.pth")


def test_read_files_names_cases_by_file_and_by_place_where_names_are_equal(
    tiny_card: ModelCard, tiny_onnx: bytes
) -> None:
    uris = ["a/m.onnx", "b/m.onnx", "a/n.onnx"]
    read = read_files(uris, lambda _: tiny_onnx, tiny_card, model="m.pth")
    assert [file.name for file in read] == ["a/m.onnx", "b/m.onnx", "n.onnx"]
    assert all((file.precision, file.sidecar) == ("fp32", None) for file in read)
    assert read[0].top_k is not None


@pytest.fixture
def make_sidecar(tiny_card: ModelCard) -> Callable[..., bytes]:
    """Descriptions of plans: make_sidecar(precision="fp16")."""

    def make(**changes: Any) -> bytes:
        sidecar = PlanSidecar(
            card=tiny_card,
            input_type="uint8",
            precision="fp16",
            batch=(1, 8, 8),
            flavour="tensorrt",
            version="10.3.0",
            gpu=None,
            machine="Linux x86_64",
            workspace_bytes=1 << 30,
            optimization_level=3,
            version_compatible=False,
            hardware_compatibility="none",
            allow_tf32=True,
            plan_bytes=4,
            plan_sha256="",
            onnx_sha256="",
        )
        return write_sidecar(replace(sidecar, **changes))

    return make


@pytest.mark.parametrize(
    ("changes", "name", "precision"),
    [
        ({}, "e.plan tensorrt fp16", "fp16"),
        ({"precision": "int8"}, "e.plan tensorrt int8", "int8"),
        ({"precision": "fp32", "allow_tf32": False}, "e.plan tensorrt fp32", "fp32"),
        # TF32 has as many bits of mantissa as fp16.
        ({"precision": "fp32"}, "e.plan tensorrt tf32", "fp16"),
    ],
)
def test_plan_cases_runs_an_engine_in_tensorrt_only(
    monkeypatch: pytest.MonkeyPatch,
    tiny_card: ModelCard,
    make_sidecar: Callable[..., bytes],
    changes: dict[str, Any],
    name: str,
    precision: str,
) -> None:
    contents = {"e.plan": b"plan", "e.plan.json": make_sidecar(**changes)}
    read = read_files(["e.plan"], contents.__getitem__, tiny_card, model="m.pth")
    monkeypatch.setattr(parity_cases, "load_tensorrt", lambda: None)
    (planned,), unrun = plan_cases(read, "auto")
    assert (planned.case.name, planned.case.precision) == (name, precision)
    assert (planned.backend, planned.file.sidecar) == ("tensorrt", contents["e.plan.json"])
    assert unrun == []


def test_read_files_needs_the_description_of_an_engine(
    tiny_card: ModelCard, make_sidecar: Callable[..., bytes]
) -> None:
    def read(uri: str) -> bytes:
        if uri == "e.plan":
            return b"plan"
        raise MissingFileError(f"{uri}: no such file")

    with pytest.raises(CheckpointError, match=r"e\.plan\.json: expected the description"):
        read_files(["e.plan"], read, tiny_card, model="m.pth")
    contents = {"e.plan": b"plan", "e.plan.json": make_sidecar(precision="fp8")}
    with pytest.raises(CheckpointError, match="expected precision fp32, fp16 or int8, found 'fp8'"):
        read_files(["e.plan"], contents.__getitem__, tiny_card, model="m.pth")


@pytest.mark.parametrize(
    ("precision", "names"),
    [
        ("fp32", ["onnxruntime fp32", "openvino fp32", "openvino bf16", "tensorrt tf32"]),
        ("fp16", ["onnxruntime fp16", "openvino fp16", "openvino bf16", "tensorrt fp16"]),
        ("int8", ["onnxruntime int8", "openvino int8", "tensorrt int8"]),
    ],
)
def test_plan_cases_lists_each_runtime_and_type_of_an_onnx_file(
    monkeypatch: pytest.MonkeyPatch,
    tiny_card: ModelCard,
    tiny_onnx: bytes,
    precision: Any,
    names: list[str],
) -> None:
    monkeypatch.setattr(parity_cases, "load_tensorrt", lambda: None)
    monkeypatch.setattr(parity_cases, "list_capabilities", lambda: ["BF16"])
    (file,) = read_files(["m.onnx"], lambda _: tiny_onnx, tiny_card, model="m.pth")
    file = replace(file, precision=precision)
    planned, unrun = plan_cases([file], "auto")
    assert [case.case.name for case in planned] == [f"m.onnx {name}" for name in names]
    assert unrun == []
    only, _ = plan_cases([file], "openvino")
    assert [case.case.name for case in only] == [
        f"m.onnx {name}" for name in names if name.startswith("openvino")
    ]
    assert [case.compute for case in only] == ["fp32", "bf16"][: len(only)]


def test_plan_cases_says_which_package_is_missing(
    monkeypatch: pytest.MonkeyPatch, tiny_card: ModelCard, tiny_onnx: bytes
) -> None:
    def absent() -> None:
        raise InferenceError("needs the package onnxruntime")

    monkeypatch.setattr(parity_cases, "load_onnxruntime", absent)
    files = read_files(["m.onnx"], lambda _: tiny_onnx, tiny_card, model="m.pth")
    planned, (unrun,) = plan_cases(files, "onnxruntime")
    assert planned == []
    assert (unrun.name, unrun.reason) == (
        "m.onnx onnxruntime fp32",
        "needs the package onnxruntime",
    )


def test_make_tolerance_without_changes_is_the_gates_own() -> None:
    assert make_tolerance(ToleranceConfig()) == ParityTolerance()
    changed = make_tolerance(ToleranceConfig(ap_int8=0.2, changed_bf16=0.3, box_px=4))
    assert (changed.ap["int8"], changed.changed["bf16"], changed.box_px) == (0.2, 0.3, 4)


def test_read_batches_reads_no_image_before_it_is_wanted(image_set: Any) -> None:
    asked: list[str] = []

    def sources() -> Iterator[ImageSource]:
        for number in range(1, 7):
            asked.append(f"{number}.png")
            yield ImageSource(number, str(image_set.folder / f"{number}.png"))

    failed: list[str] = []
    batches = read_batches(
        sources(), (64, 96), image_set.read, batch=4, settings=ReadSettings(), failed=failed
    )
    images, keys = next(batches)
    assert asked == ["1.png", "2.png", "3.png", "4.png"]
    assert images.shape == (4, 3, 64, 96)
    assert images.dtype == torch.uint8
    assert [source.image_id for source, _ in keys] == [1, 2, 3, 4]
    images, keys = next(batches)
    assert (images.shape[0], failed) == (2, [])
    with pytest.raises(StopIteration):
        next(batches)


def test_describe_hardware_names_the_processor_and_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    processor = describe_hardware()
    assert processor
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert describe_hardware() == f"{processor}, NVIDIA H200"


def test_run_parity_refuses_weights_of_another_model(
    make_job: Callable[..., ParityJob],
    files: Path,
    make_tiny_card: Callable[..., ModelCard],
    make_lively_model: Callable[[ModelCard], RetinaNet],
) -> None:
    card = make_tiny_card(num_classes=2)
    (files / "model.pth").write_bytes(dump_weights(card, make_lively_model(card).state_dict()))
    with pytest.raises(CheckpointError, match=r"its categories are not those of .*model\.pth"):
        run_parity(make_job())
