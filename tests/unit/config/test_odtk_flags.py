from __future__ import annotations

from collections.abc import Callable

import pytest

from retinaray.config.loading import load_from_argv
from retinaray.config.odtk_flags import list_odtk_flags, stretch_schedule
from retinaray.config.options import OptionTable
from retinaray.config.schema import EvaluateJob, ExportJob, InferJob, Job, TrainJob

FaultsOf = Callable[[type[Job], list[str]], list[str]]

# Every flag of `odtk train | infer | export` (0.2.6) with values as its users write them, and
# whether it is taken ("") or which words answer it.
TRAIN_FLAGS = [
    ("--images data/train", ""),
    ("--backbone ResNet18FPN", ""),
    ("--backbone ResNet18FPN ResNet34FPN", "takes one value, and 2 came (ResNet18FPN ResNet34"),
    ("--classes 2", ""),
    ("--batch 16", ""),
    ("--resize 640", ""),
    ("--max-size 640 --resize 640", ""),
    ("--jitter 640 1024", ""),
    ("--iters 90000", ""),
    ("--milestones 60000 80000", ""),
    ("--iters 90000 --schedule 2", ""),
    ("--full-precision", ""),
    ("--lr 0.01", ""),
    ("--warmup 1000", ""),
    ("--gamma 0.1", ""),
    ("--override", ""),
    ("--val-annotations val.json", ""),
    ("--val-images data/val --val-annotations val.json", ""),
    ("--val-iters 8000", "validation is counted in epochs; use --val-every"),
    ("--post-metrics http://host/metrics", "read the JSON on the last line of stdout"),
    ("--fine-tune old.pth", ""),
    ("--logdir logs", "TensorBoard files are in the run folder"),
    ("--with-apex", "bf16 is built in"),
    ("--with-dali", "not needed"),
    ("--augment-rotate", "use --vertical-flip"),
    ("--augment-free-rotate 0 45", "never had an effect"),
    ("--augment-brightness 0.002", ""),
    ("--augment-contrast 0.002", ""),
    ("--augment-saturation 0.002", ""),
    ("--augment-hue 0.0002", ""),
    ("--regularization-l2 0.0001", ""),
    ("--rotated-bbox", "rotated boxes are not supported"),
    ("--anchor-ious 0.4 0.5", ""),
    ("--absolute-angle", "rotated boxes are not supported"),
    ("--master 127.0.0.1:29500", "set RAY_ADDRESS"),
]
INFER_FLAGS = [
    ("--annotations val.json", ""),
    ("--output detections.json", ""),
    ("--batch 8", ""),
    ("--resize 800 --max-size 1333", ""),
    ("--with-apex", "bf16 is built in"),
    ("--with-dali", "not needed"),
    ("--full-precision", ""),
    ("--rotated-bbox", "rotated boxes are not supported"),
    ("--master 127.0.0.1:29500", "set RAY_ADDRESS"),
]
EXPORT_FLAGS = [
    ("--size 1280", ""),
    ("--size 720 1280", ""),
    ("--verbose", ""),
    ("--full-precision", ""),
    ("--int8 --calibration-images data/val", ""),
    ("--calibration-batches 2", ""),
    ("--calibration-table table", "the calibrated ranges are in the exported file"),
    ("--rotated-bbox", "rotated boxes are not supported"),
    ("--dynamic-batch-opts 1 8 16", "use --batch with the same numbers"),
    ("--batch 8", ""),
    ("--master 127.0.0.1:29500", "set RAY_ADDRESS"),
]
TRANSLATED = {
    "train": {"run.precision"},
    "export": {"precision"},
    "infer": {"detection.precision"},
    "evaluate": {"detection.precision"},
}
ALL_FLAGS = [
    *((TrainJob, "model.pth --annotations train.json", *entry) for entry in TRAIN_FLAGS),
    *((InferJob, "model.pth --images images", *entry) for entry in INFER_FLAGS),
    *((ExportJob, "model.pth model.onnx", *entry) for entry in EXPORT_FLAGS),
]
TAKEN = [entry[:3] for entry in ALL_FLAGS if not entry[3]]
ANSWERED = [entry for entry in ALL_FLAGS if entry[3]]


@pytest.mark.parametrize(("job_class", "minimal", "flag"), TAKEN)
def test_load_from_argv_takes_the_flag_of_odtk_before_and_after_the_rest(
    job_class: type[Job], minimal: str, flag: str
) -> None:
    after = load_from_argv(job_class, [*minimal.split(), *flag.split()])
    before = load_from_argv(job_class, [*flag.split(), *minimal.split()])
    assert after == before


@pytest.mark.parametrize(
    ("backbone", "nearest"),
    [
        ("ResNeXt50_32x4dFPN", "ResNet50FPN"),
        ("MobileNetV2FPN", "MobileNetV3LargeFPN"),
        ("ResNet34C4", "ResNet34FPN"),
        ("resnet101", "ResNet101FPN"),
    ],
)
def test_load_from_argv_names_the_backbone_nearest_to_odtks(
    faults_of: FaultsOf, backbone: str, nearest: str
) -> None:
    argv = ["model.pth", "--annotations", "train.json", "--backbone", backbone]
    (fault,) = faults_of(TrainJob, argv)
    assert fault.startswith(f"model.backbone={backbone} (--backbone): expected one of ResNet10FPN")
    assert fault.endswith(f"; nearest: {nearest}")


@pytest.mark.parametrize(("job_class", "minimal", "flag", "answer"), ANSWERED)
def test_load_from_argv_answers_the_flag_of_odtk_and_finds_no_other_fault(
    faults_of: FaultsOf, job_class: type[Job], minimal: str, flag: str, answer: str
) -> None:
    for argv in ([*minimal.split(), *flag.split()], [*flag.split(), *minimal.split()]):
        (fault,) = faults_of(job_class, argv)
        assert fault.startswith(f"{flag.split()[0]}: ")
        assert answer in fault


def test_load_from_argv_takes_a_whole_command_line_of_odtk() -> None:
    line = (
        "model.pth --backbone ResNet18FPN --images train --annotations train.json --val-images val "
        "--val-annotations val.json --classes 2 --batch 8 --full-precision --schedule 0.5 "
        "--iters 90000 --milestones 60000 80000 --jitter 640 640"
    )
    job = load_from_argv(TrainJob, line.split())
    assert job.run.precision == "fp32"
    assert job.run.iters == 45_000  # 90,000 * 0.5
    assert job.optim.milestones == (30_000, 40_000)
    assert job.augment.jitter == (640, 640)


@pytest.mark.parametrize(
    ("tree", "factor", "changes"),
    [
        ({"run": {"iters": 90_000}}, "2", {"run.iters": 180_000}),
        ({"run": {"iters": "3"}}, "0.5", {"run.iters": 1}),  # 1.5 cut to 1
        ({"run": {"iters": "1"}}, "0.1", {"run.iters": 1}),  # never 0 steps
        ({"optim": {"milestones": ["10", 20]}}, "1.5", {"optim.milestones": [15, 30]}),
        ({"run": {"iters": "x"}}, "2", {"run.iters": "x"}),
        ({"run": {"iters": 2.5}}, "2", {"run.iters": 2.5}),
    ],
)
def test_stretch_schedule_multiplies_whole_steps(
    tree: dict[str, object], factor: str, changes: dict[str, object]
) -> None:
    assert stretch_schedule(tree, factor) == (changes, "")


@pytest.mark.parametrize("factor", ["0", "-1", "x", "nan", "inf"])
def test_stretch_schedule_refuses_a_factor_that_gives_no_length(factor: str) -> None:
    changes, fault = stretch_schedule({"run": {"iters": 10}}, factor)
    assert changes == {}
    assert fault == f"--schedule {factor}: expected a number > 0, such as 0.5"


@pytest.mark.parametrize("tree", [{}, {"run": 5}, {"run": {"epochs": 3}}, {"optim": {}}])
def test_stretch_schedule_refuses_when_there_is_nothing_to_multiply(
    tree: dict[str, object],
) -> None:
    changes, fault = stretch_schedule(tree, "2")
    assert changes == {}
    assert "give one of them" in fault


def test_load_from_argv_reports_a_bad_schedule_beside_other_faults(faults_of: FaultsOf) -> None:
    argv = ["m.pth", "--annotations", "a", "--iters", "x", "--schedule"]
    assert faults_of(TrainJob, argv) == [
        "--schedule: no value came; expected a number > 0, such as 0.5",
        "run.iters=x (--iters): expected a whole number >= 1, or none",
    ]
    assert faults_of(TrainJob, [*argv, "2"]) == [
        "run.iters=x (--iters): expected a whole number >= 1, or none"
    ]


@pytest.mark.parametrize("job_class", [TrainJob, EvaluateJob, InferJob, ExportJob])
def test_list_odtk_flags_translates_only_into_settings_that_exist(job_class: type[Job]) -> None:
    keys = {
        flag.change[0]
        for flag in list_odtk_flags(job_class.verb).values()
        if flag.change is not None
    }
    table = OptionTable(job_class)
    assert all(table.has(key) for key in keys)
    assert keys == TRANSLATED.get(job_class.verb, set())
