from __future__ import annotations

import json
import re

import pytest

from retinaray.config.help_text import format_help, list_options, show_default
from retinaray.config.options import OptionTable
from retinaray.config.schema import JOBS, ExportJob, Job, TrainJob


def _help(job_class: type[Job], epilog: str = "") -> str:
    return format_help(job_class, OptionTable(job_class), epilog)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal so wide that no help text is wrapped."""
    monkeypatch.setenv("COLUMNS", "500")


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("job_class", JOBS, ids=lambda cls: cls.verb)
def test_format_help_shows_every_field_with_help_and_default(job_class: type[Job]) -> None:
    # An option whose name is long has its help on the next line.
    lines = re.sub(r"\n {20,}", " ", _help(job_class)).splitlines()
    options = OptionTable(job_class).options
    assert len(options) >= 4
    for option in options:
        name = option.flag.metavar if option.flag and option.is_positional else option.names[0]
        (line,) = (line for line in lines if re.match(rf"  \[?{re.escape(name)}[] ,]", line))
        assert option.help in line
        assert show_default(option) in line


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(
    "line",
    [
        "  --resize PX                 Short side of an image after resize. [800 px]",
        "  model.pth                   Weights file to write; its run folder (checkpoints, logs, "
        "curves) stands beside it. [required]",
        "  --annotations FILE          COCO JSON of the training set. [required]",
        "  --anchor-scales X [X ...]   Anchor side over stride; halve all (2 2.52 3.17) when "
        "objects are small. [4 5.04 6.35 strides] (anchors.scales)",
        "  --levels {3-7,2-7}          Pyramid levels with anchors; 2-7 adds stride 4 for very "
        "small objects (4x the anchors). [3-7]",
        "  --override, --no-override   Start over although a run of this name exists with other "
        "settings; its folder is replaced. [off]",
        "  --backbone NAME             Feature extractor below the feature pyramid. One of "
        "ResNet10FPN, ResNet18FPN, ResNet34FPN, ResNet50FPN, ResNet101FPN, ResNet152FPN, "
        "MobileNetV3LargeFPN. [ResNet50FPN]",
        "  --optimizer {adamw,sgd}     adamw, or sgd with momentum 0.9. [adamw]",
        "  --loss.focal_gamma X        Focusing power of the focal loss. [2]",
        "  --milestones N [N ...]      Steps at which the rate is multiplied by --gamma; giving "
        "any selects the milestones schedule. [none; steps]",
        "Optimizer and schedule (optim.*):",
        "  --config FILE               YAML file with settings, nested by section; options win "
        "over it.",
    ],
)
def test_format_help_writes_a_line_as_a_person_reads_it(line: str) -> None:
    assert line in _help(TrainJob).splitlines()


def test_format_help_begins_with_usage_purpose_and_examples() -> None:
    lines = _help(ExportJob).splitlines()
    assert (
        lines[0] == "usage: retinaray export model.pth model.onnx|engine.plan [options] "
        "[section.key=value ...]"
    )
    assert lines[2] == "Write a trained model as ONNX or a TensorRT engine and check it box by box."
    assert lines[4:6] == ["examples:", "  retinaray export model.pth model.onnx --size 640 960"]


@pytest.mark.parametrize("job_class", JOBS, ids=lambda cls: cls.verb)
def test_format_help_breaks_neither_defaults_nor_words_when_the_terminal_is_narrow(
    job_class: type[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = _help(job_class).splitlines()
    for option in OptionTable(job_class).options:
        assert any(show_default(option) in line for line in lines), option.key
    assert max(len(line) for line in lines if line.startswith("   ")) <= 96


def test_format_help_ends_with_the_epilog() -> None:
    assert _help(ExportJob, "exit codes:\n  0  100% done").endswith("exit codes:\n  0  100% done\n")


def test_list_options_describes_each_kind_of_setting() -> None:
    options = {str(entry["key"]): entry for entry in list_options(OptionTable(TrainJob))}
    assert options["data.resize"] == {
        "key": "data.resize",
        "flags": ["--resize", "--data.resize"],
        "positional": False,
        "expected": "a whole number from 32 to 8192",
        "default": 800,
        "required": False,
        "unit": "px",
        "help": "Short side of an image after resize.",
    }
    output = options["output"]
    assert (output["positional"], output["required"], output["default"]) == (True, True, None)
    assert options["anchors.scales"]["unit"] == "strides"


@pytest.mark.parametrize("job_class", JOBS, ids=lambda cls: cls.verb)
def test_list_options_is_plain_json(job_class: type[Job]) -> None:
    entries = list_options(OptionTable(job_class))
    assert len(json.loads(json.dumps(entries))) == len(OptionTable(job_class).options)
