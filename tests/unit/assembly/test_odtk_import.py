from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from retinaray import cli
from retinaray.artifact import read_weights
from retinaray.assembly.evaluation import run_evaluation
from retinaray.assembly.export import run_export
from retinaray.assembly.odtk_import import run_odtk_import
from retinaray.assembly.training import make_card, read_inputs
from retinaray.config.import_schema import ImportOdtkJob
from retinaray.config.loading import load_from_argv
from retinaray.config.schema import EvaluateJob, ExportJob, TrainJob
from retinaray.detector.retinanet import RetinaNet
from retinaray.errors import CheckpointError, ConfigError, DatasetError, MissingFileError
from retinaray.inference.predictor import PredictorSettings
from retinaray.inference.torch_backend import load_torch_predictor

JobFactory = Callable[..., ImportOdtkJob]


@pytest.fixture(scope="module")
def network() -> RetinaNet:
    """The network that ODTK is thought to have trained."""
    torch.manual_seed(0)
    network = RetinaNet(backbone="ResNet18FPN", num_classes=2, norm="bn").eval()
    # Sure enough of something to be scored.
    torch.nn.init.zeros_(network.class_head.output.bias)
    return network


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    network: RetinaNet,
    write_odtk_checkpoint: Callable[[RetinaNet, Path], None],
) -> Path:
    """`network` as ODTK before March 2020 writes it."""
    path = tmp_path_factory.mktemp("odtk") / "old.pth"
    write_odtk_checkpoint(network, path)
    return path


@pytest.fixture
def import_job(checkpoint: Path, tmp_path: Path) -> JobFactory:
    """Jobs with further arguments: import_job("--anchors", "odtk")."""
    output = str(tmp_path / "new.pth")
    return lambda *argv: load_from_argv(ImportOdtkJob, [str(checkpoint), output, *argv])


@pytest.mark.usefixtures("one_thread")
def test_run_odtk_import_writes_a_file_that_the_other_commands_read(
    import_job: JobFactory, network: RetinaNet, image_set: Any
) -> None:
    size = ["--size", "64", "96"]
    job = import_job("--categories", str(image_set.annotations), *size)
    outcome = run_odtk_import(job)
    card, model = read_weights(Path(job.output).read_bytes(), source="new.pth")
    assert card.categories.ids == (7, 17)
    assert card.anchors.convention == outcome.anchors == "odtk-legacy"
    assert (card.canvas, card.nms_iou, card.max_detections) == ((64, 96), 0.5, 100)
    assert card.score_thresholds == (0.05, 0.05)
    assert card.run_id.startswith("odtk-")
    assert card.training == {"imported": {"from": "odtk", "iteration": 500}}
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        assert all(map(torch.equal, model(images), network(images)))
    predictor = load_torch_predictor(
        Path(job.output).read_bytes(), uri=job.output, settings=PredictorSettings()
    )
    assert (predictor.canvas, predictor.backend) == ((64, 96), "torch")


@pytest.mark.usefixtures("one_thread")
def test_imported_model_is_exported_scored_and_trained_further_like_any_other(
    import_job: JobFactory, image_set: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truth = ["--images", str(image_set.folder), "--annotations", str(image_set.annotations)]
    job = import_job("--categories", str(image_set.annotations), "--size", "64", "96")
    run_odtk_import(job)
    onnx = str(tmp_path / "new.onnx")
    run_export(load_from_argv(ExportJob, [job.output, onnx]))
    scores = [
        json.loads(run_evaluation(load_from_argv(EvaluateJob, [model, *truth])).to_json())
        for model in (job.output, onnx)
    ]
    assert scores[0]["num_detections"] > 0
    assert scores[1]["AP"] == pytest.approx(scores[0]["AP"], abs=1e-4)
    further = ["further.pth", *truth, "--fine-tune", job.output, "--backbone", "ResNet18FPN"]
    with caplog.at_level("INFO"):
        train = load_from_argv(
            TrainJob, [*further, "--anchors", "odtk-legacy", "--size", "64", "96"]
        )
        card, model = make_card(train, read_inputs(train), run_id="further")
    assert "class head kept: the same 2 classes" in caplog.text
    assert card.anchors.convention == "odtk-legacy"
    _, imported = read_weights(Path(job.output).read_bytes(), source="new.pth")
    taken, wanted = model.state_dict(), imported.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in taken.items())


def test_commands_say_how_a_checkpoint_of_odtk_is_imported(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ODTK's.*retinaray import-odtk .*old\.pth imported"):
        read_weights(checkpoint.read_bytes(), source=str(checkpoint))


def test_run_odtk_import_writes_nothing_when_an_input_is_wrong(
    import_job: JobFactory, write_json: Callable[[str, Any], str], tmp_path: Path
) -> None:
    job = import_job("--categories", write_json("c.json", ["one"]))
    with pytest.raises(DatasetError, match="expected 2 categories"):
        run_odtk_import(job)
    with pytest.raises(MissingFileError, match=r"absent\.json"):
        run_odtk_import(import_job("--categories", str(tmp_path / "absent.json")))
    (tmp_path / "bad.pth").write_bytes(b"bad")
    bad = load_from_argv(ImportOdtkJob, [str(tmp_path / "bad.pth"), job.output])
    with pytest.raises(CheckpointError, match=r"bad\.pth: not a checkpoint"):
        run_odtk_import(bad)
    assert not Path(job.output).exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["a.pth", "a.pth"], "output=a.pth is the checkpoint itself"),
        (["a.pth", "a.onnx"], "expected a name that ends in .pth"),
        (["a.pth", "b.pth", "--anchors", "centered"], "expected one of auto, odtk, odtk-legacy"),
        (["a.pth"], "required"),
    ],
)
def test_import_odtk_job_refuses_wrong_settings(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_from_argv(ImportOdtkJob, argv)


def test_main_imports_a_checkpoint_and_says_what_it_made(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new.pth"
    assert cli.main(["import-odtk", str(checkpoint), str(output), "--anchors", "odtk"]) == 0
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    assert values["classes"] == ["class-0", "class-1"]
    assert values["anchors"] == "odtk"
    assert values["num_bytes"] == output.stat().st_size
    first, classes, anchors, canvas = printed.err.splitlines()[-4:]
    assert first.startswith(f"{output}  ResNet18FPN, 19.8 M weights, ")
    assert classes == "classes  2: class-0, class-1 (made up; name them with --categories)"
    assert anchors.startswith("anchors  odtk: as asked for, although the file lacks `ratios`")
    assert canvas.startswith("canvas   800x1344 ")


def test_main_answers_a_wrong_checkpoint_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.pth").write_bytes(b"no weights")
    argv = ["import-odtk", str(tmp_path / "old.pth"), str(tmp_path / "new.pth")]
    assert cli.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "old.pth: not a checkpoint that torch can read (10 bytes)" in line
