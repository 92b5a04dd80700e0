from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import yaml

from retinaray.config.loading import (
    load_from_argv,
    load_from_dict,
    read_request,
    to_dict,
    to_yaml,
)
from retinaray.config.schema import (
    JOBS,
    DemoJob,
    DoctorJob,
    EvaluateJob,
    ExportJob,
    InferJob,
    Job,
    TrainJob,
)
from retinaray.errors import ConfigError

FaultsOf = Callable[[type[Job], list[str]], list[str]]
WriteConfig = Callable[[str], str]

TRAIN = ["model.pth", "--annotations", "train.json"]


def _value(job: Job, key: str) -> object:
    node: object = to_dict(job)
    for name in key.split("."):
        assert isinstance(node, dict)
        node = node[name]
    return node


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--resize", "600"], "data.resize", 600),
        (["--resize=600"], "data.resize", 600),
        (["--data.resize", "600"], "data.resize", 600),
        (["data.resize=600"], "data.resize", 600),
        (["--lr", "0.02"], "optim.peak_lr", 0.02),
        (["--lr", "1e-3"], "optim.peak_lr", 0.001),
        (["--lr", "none"], "optim.peak_lr", None),
        (["--loss.focal_gamma", "1.5"], "loss.focal_gamma", 1.5),
        (["--anchor-scales", "2", "2.52", "3.17"], "anchors.scales", [2.0, 2.52, 3.17]),
        (["--anchor-scales=2,2.52,3.17"], "anchors.scales", [2.0, 2.52, 3.17]),
        (["anchors.scales=[2, 2.52]"], "anchors.scales", [2.0, 2.52]),
        (["anchors.scales=2 2.52"], "anchors.scales", [2.0, 2.52]),
        (["--jitter", "640", "1024"], "augment.jitter", [640, 1024]),
        (["--jitter", "none"], "augment.jitter", None),
        (["--size", "480", "640"], "data.size", [480, 640]),
        (["--size", "640"], "data.size", [640, 640]),
        (["data.size=640"], "data.size", [640, 640]),
        (["--milestones", "10", "20", "30"], "optim.milestones", [10, 20, 30]),
        (["--milestones"], "optim.milestones", []),
        (["optim.milestones="], "optim.milestones", []),
        (["--override"], "run.override", True),
        (["--override=true"], "run.override", True),
        (["--override", "--no-override"], "run.override", False),
        (["--no-loss.keep_best_anchor"], "loss.keep_best_anchor", False),
        (["--loss.keep_best_anchor", "false"], "loss.keep_best_anchor", False),
        (["loss.keep_best_anchor=off"], "loss.keep_best_anchor", False),
        (["--model.stride_in_1x1", "none"], "model.stride_in_1x1", None),
        (["--model.stride_in_1x1"], "model.stride_in_1x1", True),
        (["--objective", "AP_small"], "run.objective", "AP_small"),
        (["--objective", "AP/car"], "run.objective", "AP/car"),
        (["--latency-price", "0.01"], "run.latency_price", 0.01),
        (["--strict-anchors"], "run.strict_anchors", True),
        (["--levels", "2-7"], "anchors.levels", "2-7"),
        (["--output", "other.pth"], "output", "other.pth"),
        (["--resize", "500", "--resize", "600"], "data.resize", 600),
        (["--images=a=b"], "data.images", "a=b"),
        (["--images", "-"], "data.images", "-"),
    ],
    ids=lambda entry: " ".join(map(str, entry)) if isinstance(entry, list) else None,
)
def test_load_from_argv_takes_every_spelling(argv: list[str], key: str, value: object) -> None:
    assert _value(load_from_argv(TrainJob, [*TRAIN, *argv]), key) == value


def test_load_from_argv_leaves_the_file_name_when_a_list_comes_before_it() -> None:
    job = load_from_argv(TrainJob, ["--size", "640", "model.pth", "--annotations", "t.json"])
    assert job.output == "model.pth"
    assert job.data.size == (640, 640)


def test_load_from_argv_takes_bare_changes_between_values_and_names() -> None:
    argv = ["--anchor-scales", "2", "3", "run.seed=7", "model.pth", "--annotations", "t.json"]
    job = load_from_argv(TrainJob, argv)
    assert (job.anchors.scales, job.run.seed, job.output) == ((2.0, 3.0), 7, "model.pth")


def test_load_from_argv_takes_names_that_look_like_options_after_two_dashes() -> None:
    job = load_from_argv(ExportJob, ["--size", "640", "--", "-v", "--x.onnx"])
    assert (job.model, job.output) == ("-v", "--x.onnx")


def test_load_from_argv_takes_a_file_name_with_equals_when_it_has_a_folder() -> None:
    job = load_from_argv(TrainJob, ["./lr=0.1.pth", "--annotations", "t.json"])
    assert job.output == "./lr=0.1.pth"


def test_load_from_argv_lets_options_win_over_the_file(write_config: WriteConfig) -> None:
    config = write_config(
        "output: file.pth\ndata:\n  annotations: file.json\n  resize: 500\n  max_size: 900\n"
        "anchors:\n  scales: [2, 3]\naugment:\n"
    )
    job = load_from_argv(TrainJob, ["option.pth", "--config", config, "--resize", "600"])
    assert job.output == "option.pth"
    assert (job.data.resize, job.data.max_size, job.data.annotations) == (600, 900, "file.json")
    assert job.anchors.scales == (2.0, 3.0)
    # A section whose keys are all commented out has its defaults.
    assert job.augment.flip == 0.5


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("data: {annotations: a, size: 640}", "data.size", [640, 640]),
        ("data: {annotations: a, classes: none}", "data.classes", None),
        ("data: {annotations: a, classes: ~}", "data.classes", None),
        # YAML 1.1 reads 1e-3 as a text; it is still a number for a number's key.
        ("{data: {annotations: a}, optim: {peak_lr: 1e-3}}", "optim.peak_lr", 0.001),
        ("{data: {annotations: a}, loss: {focal_gamma: 2}}", "loss.focal_gamma", 2.0),
        ("{data: {annotations: a}, run: {override: yes}}", "run.override", True),
    ],
)
def test_load_from_argv_reads_the_values_of_a_file(
    write_config: WriteConfig, line: str, key: str, value: object
) -> None:
    job = load_from_argv(TrainJob, ["m.pth", "--config", write_config(line)])
    assert _value(job, key) == value


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("resize: 3.7", "data.resize=3.7 (--resize; config file job.yaml, line 3): expected a"),
        ("resize: true", "data.resize=true (--resize; config file job.yaml, line 3): expected a"),
        ("resize: [800]", "data.resize=[800] (--resize; config file job.yaml, line 3): expected"),
        ("size: [480, true]", "data.size[1]=true (--size; config file job.yaml, line 3): expect"),
        ("size: true", "data.size[0]=true (--size; config file job.yaml, line 3): expected a wh"),
        ("images: 5", "data.images=5 (--images; config file job.yaml, line 3): expected a text "),
        ("images: 2026-01-01", "data.images=2026-01-01 (--images; config file job.yaml, line 3)"),
        ("images: ~", "data.images=none (--images; config file job.yaml, line 3): expected a te"),
        ("resize: .nan", "data.resize=nan (--resize; config file job.yaml, line 3): expected a w"),
        ("on_bad_box: no", "data.on_bad_box=false (--on-bad-box; config file job.yaml, line 3):"),
    ],
)
def test_load_from_argv_does_not_bend_the_values_of_a_file(
    write_config: WriteConfig, faults_of: FaultsOf, line: str, fault: str
) -> None:
    config = write_config(f"data:\n  annotations: a.json\n  {line}\n")
    lines = faults_of(TrainJob, ["m.pth", "--config", config])
    assert lines[0].startswith(fault)


def test_load_from_argv_names_all_faults_at_once(
    write_config: WriteConfig, faults_of: FaultsOf
) -> None:
    config = write_config(
        "data:\n  annotations: a.json\n  annotations: b.json\n  resiz: 600\n  max_size: 3.7\n"
        "lr: 0.1\nanchors:\n  scales: [4, abc, -1]\nrun: 5\n"
        "model:\n  backbone: resnet18\nloss:\n  anchor_ious: [0.5, 0.4]\nmodl: {a: 1}\n"
    )
    argv = ["m.pth", "more.pth", "--config", config, "--bach", "4", "--with-dali", "--lr"]
    assert faults_of(TrainJob, [*argv, "--jitter", "5", "--augment-hue", "x", "run.sed=4"]) == [
        "config file job.yaml, line 3, column 3: data.annotations is given twice, first in line "
        "2; keep one",
        "argument more.pth: not expected here; an option's name must precede it",
        "--bach 4: no such option; nearest: --batch (run.batch)",
        "--with-dali: not needed, loader processes decode; remove it",
        "optim.peak_lr (--lr): no value came; expected a number > 0, or none",
        "run.sed=4: no such key; nearest: run.seed (--seed)",
        "model.backbone=resnet18 (--backbone; config file job.yaml, line 11): expected one of "
        "ResNet10FPN, ResNet18FPN, ResNet34FPN, ResNet50FPN, ResNet101FPN, ResNet152FPN, "
        "MobileNetV3LargeFPN; nearest: ResNet18FPN",
        "anchors.scales[1]=abc (--anchor-scales; config file job.yaml, line 8): expected a "
        "number > 0",
        "anchors.scales[2]=-1 (--anchor-scales; config file job.yaml, line 8): expected a "
        "number > 0",
        "data.max_size=3.7 (--max-size; config file job.yaml, line 5): expected a whole number "
        "from 32 to 8192",
        "data.resiz=600 (config file job.yaml, line 4): no such key; nearest: data.resize "
        "(--resize)",
        "augment.jitter=[5] (--jitter): expected 2 whole numbers >= 1, or none",
        "augment.hue=x (--augment-hue): expected a number from 0 to 0.5",
        "loss.anchor_ious=(0.5, 0.4) (--anchor-ious): expected 0 < LOW <= HIGH < 1",
        "run=5 (config file job.yaml, line 9): expected a section with keys of batch, epochs, "
        "iters, workers, accumulate, precision, compile, seed, val_every, patience, log_every, "
        "objective, "
        "latency_price, strict_anchors, min_workers, storage, keep_every, "
        "checkpoint_minutes, max_failures, override",
        "lr=0.1 (config file job.yaml, line 6): no such key; nearest: optim.peak_lr (--lr)",
        "modl={a} (config file job.yaml, line 14): no such key; nearest: the section model",
    ]


@pytest.mark.parametrize(
    ("job_class", "argv", "faults"),
    [
        (
            TrainJob,
            [],
            [
                "output (argument model.pth): required, but not given: Weights file to write; its "
                "run folder (checkpoints, logs, curves) stands beside it.",
                "data.annotations (--annotations): required, but not given: COCO JSON of the "
                "training set.",
            ],
        ),
        (
            TrainJob,
            [*TRAIN, "--batch", "8", "--workers", "3", "--epochs", "2", "--iters", "5"],
            [
                "run.epochs=2 and run.iters=5 are both given: keep one (--epochs or --iters)",
                "run.batch=8 does not divide among run.workers=3: make --batch a multiple of 3",
            ],
        ),
        (
            ExportJob,
            ["m.pth", "m.trt", "--top-k", "4000"],
            [
                "output=m.trt (argument model.onnx|engine.plan): expected a name that ends in "
                ".onnx, or in .plan or .engine for a TensorRT engine of this machine's GPU",
                "top_k=4000 (--top-k): expected a whole number from 1 to 3839",
            ],
        ),
        (
            InferJob,
            ["m.onnx", "--images", "x", "--resize", "640", "--endpoint-url", "host:9000"],
            [
                "detection.resize=640 alone does not make a canvas: give both --resize and "
                "--max-size, or --size H W",
                "reading.endpoint_url=host:9000 (--endpoint-url): expected an address that starts "
                "with http:// or https://",
            ],
        ),
        (
            EvaluateJob,
            ["", "--annotations", "a", "--batch", "-1", "--batch-size", "3", "--backend", "trt"],
            [
                "--batch-size 3: no such option; nearest: --batch (batch)",
                "model='' (argument MODEL|detections.json): expected a text that is not empty, or "
                "none",
                "backend=trt (--backend): expected one of auto, openvino, onnxruntime, torch, "
                "tensorrt",
                "batch=-1 (--batch): expected a whole number from 1 to 1024",
            ],
        ),
        (
            DoctorJob,
            ["--annotations", "a", "-x", "--help-me", "-q", "-v"],
            [
                "-x: no such option; --help lists all",
                "--help-me: no such option; nearest: --help",
                "--verbose and --quiet are both given: keep one",
            ],
        ),
        (
            TrainJob,
            [*TRAIN, "--objective", "mAP", "--latency-price", "-1", "--levels", "3-6"],
            [
                "anchors.levels=3-6 (--levels): expected one of 3-7, 2-7",
                "run.objective=mAP (--objective): expected one of AP, AP50, AP75, AP_small, "
                "AP_medium, AP_large, AR_1, AR_10, AR_100, AR_small, AR_medium, AR_large, or a "
                "class's AP as in AP/car",
                "run.latency_price=-1 (--latency-price): expected a number >= 0",
            ],
        ),
        (
            DemoJob,
            ["--workers", "--epochs", "--quiet=1", "--config"],
            [
                "workers (--workers): no value came; expected a whole number from 1 to 64",
                "epochs (--epochs): no value came; expected a whole number >= 1, or none",
                "--quiet=1: takes no value; give --quiet alone",
                "--config: expected a YAML file after it",
            ],
        ),
        (
            TrainJob,
            [*TRAIN, "--no-override=true", "--no-resize", "--size", "1", "2", "3", "--resiz"],
            [
                "--no-override=true: takes no value; give --override=true",
                "--no-resize: no such option; nearest: --resize (data.resize)",
                "--resiz: no such option; nearest: --resize (data.resize)",
                "data.size=[1, 2, 3] (--size): expected 2 whole numbers from 32 to 8192, or none",
            ],
        ),
        (
            TrainJob,
            ["lr=0.1.pth", "--annotations", "a"],
            [
                "lr=0.1.pth: no such key; nearest: optim.peak_lr (--lr)",
                "output (argument model.pth): required, but not given: Weights file to write; its "
                "run folder (checkpoints, logs, curves) stands beside it.",
            ],
        ),
        (
            TrainJob,
            [*TRAIN, "qqqq=1"],
            ["qqqq=1: no such key; for a file of this name write ./qqqq=1"],
        ),
    ],
    ids=lambda entry: entry.verb if isinstance(entry, type) else None,
)
def test_load_from_argv_words_each_fault(
    faults_of: FaultsOf, job_class: type[Job], argv: list[str], faults: list[str]
) -> None:
    assert faults_of(job_class, argv) == faults


def test_load_from_argv_does_not_abbreviate(faults_of: FaultsOf) -> None:
    (fault,) = faults_of(TrainJob, [*TRAIN, "--resi", "600"])
    assert fault == "--resi 600: no such option; nearest: --resize (data.resize)"


def test_load_from_argv_keeps_the_file_name_when_an_unknown_switch_precedes_it(
    faults_of: FaultsOf,
) -> None:
    faults = faults_of(TrainJob, ["--overide", "model.pth", "--annotations", "a"])
    assert faults == ["--overide: no such option; nearest: --override (run.override)"]


def test_load_from_argv_reports_keys_that_are_no_words_once(
    write_config: WriteConfig, faults_of: FaultsOf
) -> None:
    config = write_config("5: x\ndata:\n  annotations: a\n  6: y\n")
    assert faults_of(TrainJob, ["m.pth", "--config", config]) == [
        "config file job.yaml, line 1, column 1: the key 5 must be a word; quote it",
        "config file job.yaml, line 4, column 3: the key data.6 must be a word; quote it",
    ]


def test_load_from_argv_reports_a_file_that_contains_itself(
    write_config: WriteConfig, faults_of: FaultsOf
) -> None:
    config = write_config("output: m\ndata: &self\n  annotations: a\n  inner: *self\n")
    (fault,) = faults_of(TrainJob, ["--config", config])
    assert fault.startswith("data.inner={annotations, inner} (config file job.yaml, line 4): no")


def test_load_from_argv_reports_only_the_file_when_it_is_unreadable(
    write_config: WriteConfig, faults_of: FaultsOf
) -> None:
    config = write_config("data: [\n")
    # Neither what is missing nor --resize against the file's max_size can be judged.
    faults = faults_of(TrainJob, ["--config", config, "--resize", "2000", "--seed", "x"])
    assert len(faults) == 2
    assert faults[0].startswith("config file job.yaml, line 2, column 1: not YAML:")
    assert faults[1].startswith("run.seed=x (--seed): expected a whole number")


def test_load_from_argv_refuses_two_files(faults_of: FaultsOf, write_config: WriteConfig) -> None:
    config = write_config("output: a\n")
    argv = ["--annotations", "a", "--config", config, "--config", "b.yaml"]
    assert faults_of(TrainJob, argv) == [
        "--config b.yaml: given twice; merge the two files into one"
    ]


def test_load_from_argv_forgets_the_line_of_a_value_that_an_option_replaces(
    faults_of: FaultsOf, write_config: WriteConfig
) -> None:
    config = write_config("data:\n  annotations: a\n  resize: 700\n")
    (fault,) = faults_of(TrainJob, ["m.pth", "--config", config, "--resize", "12"])
    assert fault == "data.resize=12 (--resize): expected a whole number from 32 to 8192"


@pytest.mark.parametrize("job_class", JOBS, ids=lambda cls: cls.verb)
def test_to_yaml_is_read_back_as_the_same_job(
    job_class: type[Job], minimal: dict[str, list[str]], write_config: WriteConfig
) -> None:
    job = load_from_argv(job_class, minimal[job_class.verb])
    text = to_yaml(job)
    assert load_from_argv(job_class, ["--config", write_config(text)]) == job
    assert load_from_dict(job_class, yaml.safe_load(text)) == job
    assert load_from_dict(job_class, to_dict(job)) == job


@pytest.mark.parametrize("job_class", JOBS, ids=lambda cls: cls.verb)
def test_job_survives_the_way_to_another_process(
    job_class: type[Job], minimal: dict[str, list[str]]
) -> None:
    job = load_from_argv(job_class, minimal[job_class.verb])
    assert pickle.loads(pickle.dumps(job)) == job


def test_load_from_argv_prints_the_settings_and_exits(
    capsys: pytest.CaptureFixture[str], write_config: WriteConfig
) -> None:
    argv = [*TRAIN, "--anchor-scales", "2", "2.52", "--size", "480", "640", "--lr", "1e-5"]
    with pytest.raises(SystemExit) as caught:
        load_from_argv(TrainJob, [*argv, "--print-config", "-v"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert load_from_argv(TrainJob, ["--config", write_config(printed)]) == load_from_argv(
        TrainJob, argv
    )


def test_load_from_argv_prints_no_settings_when_they_are_wrong(faults_of: FaultsOf) -> None:
    assert len(faults_of(TrainJob, ["--print-config"])) == 2


def test_load_from_argv_prints_help_before_it_looks_for_faults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        load_from_argv(TrainJob, ["--nonsense", "-h"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: retinaray train model.pth")


@pytest.mark.parametrize(
    ("switches", "verbosity"),
    [([], "normal"), (["-v"], "verbose"), (["--verbose"], "verbose"), (["-q"], "quiet")],
)
def test_read_request_gives_the_verbosity(switches: list[str], verbosity: str) -> None:
    assert read_request(TrainJob, [*TRAIN, *switches]).verbosity == verbosity


@pytest.mark.parametrize(
    ("switches", "is_wanted"), [([], True), (["-v"], True), (["--json"], False), (["-q"], False)]
)
def test_read_request_says_whether_the_result_is_also_for_people(
    switches: list[str], is_wanted: bool
) -> None:
    assert read_request(TrainJob, [*TRAIN, *switches]).is_table_wanted is is_wanted


def test_load_from_dict_applies_typed_changes_and_leaves_the_tree_alone() -> None:
    tree = {"output": "m.pth", "data": {"annotations": "a", "resize": 500}}
    job = load_from_dict(
        TrainJob, tree, {"data.resize": 600, "anchors.scales": (2.0, 3.0), "optim.peak_lr": "1e-3"}
    )
    assert (job.data.resize, job.anchors.scales, job.optim.peak_lr) == (600, (2.0, 3.0), 0.001)
    assert tree == {"output": "m.pth", "data": {"annotations": "a", "resize": 500}}


def test_load_from_dict_names_a_change_that_is_no_setting() -> None:
    tree = {"output": "m.pth", "data": {"annotations": "a"}}
    changes = {"anchor.scales": [2.0], "data.resiz": 600, "output.file": "x"}
    with pytest.raises(ConfigError) as caught:
        load_from_dict(TrainJob, tree, changes)
    assert str(caught.value).splitlines() == [
        "anchor.scales=[2.0]: no such key; nearest: anchors.scales (--anchor-scales)",
        "data.resiz=600: no such key; nearest: data.resize (--resize)",
        "output.file=x: no such key; nearest: output (argument model.pth)",
    ]


def test_load_from_dict_replaces_a_section_and_leaves_it_alone() -> None:
    section = {"annotations": "b", "classes": "none"}
    tree = {"output": "m.pth", "data": {"annotations": "a", "resize": 500}}
    job = load_from_dict(TrainJob, tree, {"data": section})
    assert (job.data.annotations, job.data.classes, job.data.resize) == ("b", None, 800)
    assert section == {"annotations": "b", "classes": "none"}


def test_load_from_dict_refuses_an_empty_tree_of_a_job_that_needs_values() -> None:
    with pytest.raises(ConfigError, match=r"^model \(argument MODEL\): required"):
        load_from_dict(InferJob, {})


def test_read_request_finds_a_key_by_the_words_of_its_help(
    faults_of: FaultsOf, write_config: WriteConfig
) -> None:
    name = write_config("optim:\n  learning_rate: 0.1\n")
    faults = faults_of(TrainJob, ["m.pth", "--annotations", "a", "--config", name])
    assert faults == [
        "optim.learning_rate=0.1 (config file job.yaml, line 2): no such key; nearest: "
        "optim.peak_lr (--lr)"
    ]


def test_read_request_says_that_the_file_is_empty_when_settings_are_missing(
    faults_of: FaultsOf, write_config: WriteConfig
) -> None:
    name = write_config("# nothing yet\n")
    first, *rest = faults_of(TrainJob, ["--config", name])
    assert first == "config file job.yaml: holds no settings; is it the right one?"
    assert all("required, but not given" in line for line in rest)


def test_help_and_wrong_settings_import_neither_torch_nor_ray_nor_numpy() -> None:
    code = (
        "import sys\n"
        "from retinaray.cli import main\n"
        "assert main(['train', '--help']) == 0\n"
        "assert main(['infer', '--bogus']) == 2\n"
        "heavy = {'torch', 'ray', 'numpy', 'torchvision', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_word_none_is_a_choice_where_it_is_one() -> None:
    given = ["m.pth", "--images", "i"]
    assert load_from_argv(InferJob, [*given, "--nms", "none"]).detection.nms_kind == "none"
    assert load_from_argv(InferJob, given).detection.nms_kind is None
    # Elsewhere it is the absence of a value.
    assert load_from_argv(InferJob, [*given, "--size", "none"]).detection.size is None
