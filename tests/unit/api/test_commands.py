"""Functions hand the runners of the commands exactly the jobs of the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import retinaray
from retinaray.config.loading import load_from_argv
from retinaray.config.schema import (
    AnchorsJob,
    ConvertJob,
    DoctorJob,
    EvaluateJob,
    ExportJob,
    InferJob,
    Job,
    ParityJob,
    ReportJob,
    ThresholdsJob,
    TrainJob,
    TuneJob,
)
from retinaray.errors import ConfigError, DatasetError, ImageError

SPACE = {"anchors.base_scale": [2, 3]}


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """What the runners were asked for; they answer with their own names."""
    asked: list[Job] = []

    def stand_in(name: str) -> Callable[[Job], str]:
        def take(job: Job) -> str:
            asked.append(job)
            return name

        return take

    for place in (
        "distributed.train.run_training",
        "distributed.tune.run_sweep",
        "distributed.batch_inference.run_inference",
        "assembly.evaluation.run_evaluation",
        "assembly.thresholds.run_thresholds",
        "assembly.export.run_export",
        "assembly.parity.run_parity",
        "assembly.anchors.run_anchors",
        "assembly.doctor.run_doctor",
        "assembly.report.run_report",
        "assembly.convert.run_convert",
    ):
        monkeypatch.setattr(f"retinaray.{place}", stand_in(place.rpartition(".")[2]))
    return asked


@pytest.mark.parametrize(
    ("call", "runner", "job_class", "argv"),
    [
        (
            lambda: retinaray.train(output="m.pth", annotations="t.json", batch=4),
            *("run_training", TrainJob, "m.pth --annotations t.json --batch 4"),
        ),
        (
            lambda: retinaray.evaluate("m.pth", Path("a"), "t.json", batch=2),
            *("run_evaluation", EvaluateJob, "m.pth --images a --annotations t.json --batch 2"),
        ),
        (
            lambda: retinaray.choose_thresholds("m.pth", "p", "v.json", rule="recall=0.5"),
            "run_thresholds",
            ThresholdsJob,
            "m.pth --images p --annotations v.json --rule recall=0.5",
        ),
        (
            lambda: retinaray.infer("m.onnx", "s3://b/p/", output="s3://b/run", workers=3),
            *("run_inference", InferJob, "m.onnx --images s3://b/p/ --output s3://b/run "
              "--workers 3"),
        ),
        (
            lambda: retinaray.export_model("m.pth", Path("m.onnx"), size=(64, 96)),
            *("run_export", ExportJob, "m.pth m.onnx --size 64 96"),
        ),
        (
            lambda: retinaray.compare_runtimes("m.pth", ["a.onnx", Path("b.onnx")], "p", limit=3),
            *("run_parity", ParityJob, "m.pth a.onnx b.onnx --images p --limit 3"),
        ),
        (
            lambda: retinaray.anchor_coverage("t.json", fit=True, picture=None),
            *("run_anchors", AnchorsJob, "--annotations t.json --fit --picture none"),
        ),
        (
            lambda: retinaray.check_dataset("t.json", images="p"),
            *("run_doctor", DoctorJob, "--annotations t.json --images p"),
        ),
        (
            lambda: retinaray.report("m_run", output="a.html"),
            *("run_report", ReportJob, "m_run --output a.html"),
        ),
        (
            lambda: retinaray.report(["m_run", Path("n_run")], detect=True),
            *("run_report", ReportJob, "m_run n_run --detect"),
        ),
        (
            lambda: retinaray.run("convert", source="voc", output="t.json", **{"from": "voc"}),
            *("run_convert", ConvertJob, "voc t.json --from voc"),
        ),
    ],
    ids=[
        *("train", "evaluate", "choose_thresholds", "infer", "export_model", "compare_runtimes"),
        *("anchor_coverage", "check_dataset", "report", "reports", "run"),
    ],
)  # fmt: skip
def test_functions_hand_over_the_job_of_their_command(
    call: Callable[[], object], runner: str, job_class: type[Job], argv: str, jobs: list[Job]
) -> None:
    assert call() == runner
    assert jobs == [load_from_argv(job_class, argv.split())]


def test_tune_hands_over_its_space(jobs: list[Job]) -> None:
    retinaray.tune(
        {"space": SPACE}, output="s", annotations="t.json", val_annotations="v.json", trials=3
    )
    (job,) = jobs
    assert isinstance(job, TuneJob)
    assert (job.space, job.sweep.trials, job.output) == (SPACE, 3, "s")


def test_functions_read_config_files_below_their_arguments(jobs: list[Job], tmp_path: Path) -> None:
    file = tmp_path / "evaluate.yaml"
    file.write_text("model: other.pth\nbatch: 3\ndetection: {nms_iou: 0.7, nms_kind: none}\n")
    retinaray.evaluate("m.pth", "p", "t.json", config=file, nms_iou=0.6)
    (job,) = jobs
    assert isinstance(job, EvaluateJob)
    assert (job.model, job.batch) == ("m.pth", 3)
    assert (job.detection.nms_iou, job.detection.nms_kind) == (0.6, "none")


def test_a_loaded_model_stands_for_its_file_and_settings(
    jobs: list[Job], model_folder: Path
) -> None:
    model = retinaray.load(
        model_folder / "model.pth", nms_iou=0.4, batch=2, endpoint_url="http://127.0.0.1:1"
    )
    retinaray.evaluate(model, "p", "t.json")
    retinaray.evaluate(model, "p", "t.json", nms_iou=0.7)
    retinaray.infer(model, "p")
    retinaray.export_model(model, "m.onnx")
    first, second, third, exported = jobs
    path = str(model_folder / "model.pth")
    endpoint = ["--endpoint-url", "http://127.0.0.1:1"]
    flags = ["--batch", "2", "--nms-iou", "0.4", "--images", "p", *endpoint]
    argv = [path, *flags, "--annotations", "t.json"]
    assert first == load_from_argv(EvaluateJob, argv)
    assert second == load_from_argv(EvaluateJob, [*argv, "detection.nms_iou=0.7"])
    assert third == load_from_argv(InferJob, [path, *flags])
    # How it was run is no matter of the exported file: its batch is another thing.
    assert exported == load_from_argv(ExportJob, [path, "m.onnx", *endpoint])


def test_functions_refuse_wrong_keywords_before_anything_runs(jobs: list[Job]) -> None:
    with pytest.raises(ConfigError) as caught:
        retinaray.evaluate("m.pth", "p", "t.json", btch=4, nms_iou=2)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        *("btch=4", "detection.nms_iou=2 (--nms-iou)")
    ]
    with pytest.raises(ConfigError, match=r"output .*required"):
        retinaray.train(annotations="t.json")
    with pytest.raises(ConfigError, match=r"config=model\.pth: expected a file that ends in"):
        retinaray.train("model.pth", annotations="t.json")
    assert jobs == []


def test_run_names_the_commands_when_there_is_none_of_that_name() -> None:
    with pytest.raises(ValueError, match=r"verb='trian': expected one of train, tune, evaluate"):
        retinaray.run("trian")


def test_read_dataset_reads_a_coco_file(model_folder: Path, tmp_path: Path) -> None:
    dataset = retinaray.read_dataset(model_folder / "data" / "train.json")
    assert (len(dataset), dataset.categories.names) == (6, ("class 0", "class 1", "class 2"))
    truth = json.loads((model_folder / "data" / "train.json").read_bytes())
    left, top, width, height = truth["annotations"][0]["bbox"]
    assert dataset.targets(0).boxes_xyxy[0].tolist() == [left, top, left + width, top + height]
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(DatasetError, match=r"list\.json"):
        retinaray.read_dataset(tmp_path / "list.json")


def test_read_dataset_refuses_bad_boxes_when_asked(model_folder: Path, tmp_path: Path) -> None:
    truth = json.loads((model_folder / "data" / "train.json").read_bytes())
    truth["annotations"][3]["bbox"][2] = 0
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(truth))
    assert len(retinaray.read_dataset(path).boxes_xyxy) == 11
    with pytest.raises(DatasetError, match=r"bad\.json: .*data\.on_bad_box"):
        retinaray.read_dataset(path, on_bad_box="error")


def test_draw_truth_marks_the_boxes_in_white(model_folder: Path) -> None:
    dataset = retinaray.read_dataset(model_folder / "data" / "train.json")
    path = model_folder / "data" / "images" / dataset.images[0].file_name
    drawn = np.asarray(retinaray.draw_truth(path, dataset.targets(0)))
    left, top, *_ = (round(float(value)) * 10 for value in dataset.targets(0).boxes_xyxy[0])
    # 64x96 is enlarged ten times.
    assert drawn.shape == (640, 960, 3)
    assert drawn[top, left + 20].tolist() == [255, 255, 255]
    assert drawn[top + 60, left + 60].tolist() != [255, 255, 255]
    with pytest.raises(ImageError, match=r"^images\[0\]: expected JPEG"):
        retinaray.draw_truth(b"text", dataset.targets(0))
    assert Image.fromarray(drawn).mode == "RGB"
