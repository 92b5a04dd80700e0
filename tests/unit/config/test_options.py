from __future__ import annotations

from typing import Annotated

import pytest
from pydantic import Field

from retinaray.config.nodes import Config, Flag
from retinaray.config.options import OptionTable, nearest_word
from retinaray.config.schema import JOBS, ExportJob, InferJob, Job, TrainJob


@pytest.fixture(scope="module")
def table() -> OptionTable:
    return OptionTable(TrainJob)


@pytest.mark.parametrize(
    ("key", "names", "expected"),
    [
        ("data.resize", ("--resize", "--data.resize"), "a whole number from 32 to 8192"),
        ("optim.peak_lr", ("--lr", "--optim.peak_lr"), "a number > 0, or none"),
        ("optim.gamma", ("--gamma", "--optim.gamma"), "a number > 0 and < 1"),
        (
            "model.fpn_channels",
            ("--fpn-channels", "--model.fpn_channels"),
            "a whole number from 16 to 1024, a multiple of 8",
        ),
        ("run.override", ("--override", "--run.override"), "true or false"),
        ("model.stride_in_1x1", ("--model.stride_in_1x1",), "true or false, or none"),
        ("anchors.scales", ("--anchor-scales", "--anchors.scales"), "1 to 9 numbers > 0"),
        ("augment.jitter", ("--jitter", "--augment.jitter"), "2 whole numbers >= 1, or none"),
        ("optim.milestones", ("--milestones", "--optim.milestones"), "whole numbers >= 1"),
        ("data.size", ("--size", "--data.size"), "2 whole numbers from 32 to 8192, or none"),
        ("optim.optimizer", ("--optimizer", "--optim.optimizer"), "one of adamw, sgd"),
        ("data.images", ("--images", "--data.images"), "a text that is not empty"),
        ("output", ("--output",), "a text that is not empty"),
    ],
)
def test_option_table_reads_names_and_limits(
    table: OptionTable, key: str, names: tuple[str, ...], expected: str
) -> None:
    option = table.by_path[tuple(key.split("."))]
    assert option.names == names
    assert option.shape.expected == expected


@pytest.mark.parametrize("job_class", JOBS, ids=lambda cls: cls.verb)
def test_option_table_finds_each_option_by_each_of_its_names(job_class: type[Job]) -> None:
    table = OptionTable(job_class)
    assert all(table.by_name[name] is option for option in table.options for name in option.names)
    assert {name for name in table.by_name if "." not in name} >= {"--annotations"} - (
        {"--annotations"} if job_class.verb in WITHOUT_ANNOTATIONS else set()
    )


WITHOUT_ANNOTATIONS = ("export", "bundle", "plan", "demo", "report", "convert", "import-odtk")


def test_option_table_keeps_the_order_of_positionals() -> None:
    assert [option.key for option in OptionTable(ExportJob).positionals] == ["model", "output"]


def test_option_table_refuses_one_flag_for_two_fields() -> None:
    class Twice(Config):
        first: Annotated[int, Field(ge=0), Flag("--same")] = 0
        second: Annotated[int, Flag("--same")] = 0

    with pytest.raises(ValueError, match="--same is both first and second"):
        OptionTable(Twice)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("data.resiz", "data.resize (--resize)"),
        ("resize", "data.resize (--resize)"),
        ("optim.lr", "optim.peak_lr (--lr)"),
        ("lr", "optim.peak_lr (--lr)"),
        ("run.bach", "run.batch (--batch)"),
        ("modle.backbone", "model.backbone (--backbone)"),
        ("loss.focal_gama", "loss.focal_gamma (--loss.focal_gamma)"),
        ("optm", "the section optim"),
        ("outptu", "output (argument model.pth)"),
        ("--reszie", "--resize (data.resize)"),
        ("--max_size", "--max-size (data.max_size)"),
        ("--learning-rate", ""),
        ("--prnt-config", "--print-config"),
        ("qqqqqq", ""),
        ("--zzzzz", ""),
    ],
)
def test_nearest_finds_what_was_meant(table: OptionTable, wrong: str, nearest: str) -> None:
    assert table.nearest(wrong, ["--print-config"]) == nearest


def test_nearest_offers_only_settings_of_the_job_when_the_flag_is_of_another() -> None:
    assert "milestones" not in OptionTable(InferJob).nearest("--milestones")


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("resnet18", "ResNet18FPN"), ("RESNET50FPN", "ResNet50FPN"), ("vgg", "")],
)
def test_nearest_word_ignores_case(wrong: str, nearest: str) -> None:
    assert nearest_word(wrong, ["ResNet18FPN", "ResNet50FPN"]) == nearest


def test_nearest_word_is_empty_when_there_are_no_words() -> None:
    assert nearest_word("any", []) == ""
