"""The settings of `parity`, and the arguments of a command that takes several files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

import pytest
from pydantic import Field

from retinaray.config.help_text import format_help
from retinaray.config.loading import load_from_argv, load_from_dict, to_dict
from retinaray.config.nodes import Config, Flag, Job
from retinaray.config.options import OptionTable
from retinaray.config.parity_schema import ParityJob

IMAGES = ["--images", "photos"]


class AnyFilesJob(Job):
    """Take files, perhaps none."""

    verb: ClassVar[str] = "files"
    examples: ClassVar[tuple[str, ...]] = ()
    files: Annotated[tuple[str, ...], Flag("files", metavar="FILE")] = ()
    """Files."""


@pytest.mark.parametrize(
    ("argv", "files"),
    [
        (["m.pth", "a.onnx"], ("a.onnx",)),
        (["m.pth", "a.onnx", "b.plan", "c.engine"], ("a.onnx", "b.plan", "c.engine")),
        (["m.pth", "a.onnx", "--batch", "4", "b.onnx"], ("a.onnx", "b.onnx")),
        (["--limit", "none", "m.pth", "a.onnx", "--", "-b.onnx"], ("a.onnx", "-b.onnx")),
        (["m.pth", "--files", "a.onnx", "b.onnx"], ("a.onnx", "b.onnx")),
        (["m.pth", "--files=a.onnx,b.onnx"], ("a.onnx", "b.onnx")),
        (["m.pth", "files=a.onnx b.onnx", "c.onnx"], ("a.onnx", "b.onnx", "c.onnx")),
        # What comes later wins, as with every option.
        (["m.pth", "a.onnx", "files=b.onnx"], ("b.onnx",)),
    ],
)
def test_load_from_argv_gives_all_bare_arguments_to_the_last_one(
    argv: list[str], files: tuple[str, ...]
) -> None:
    job = load_from_argv(ParityJob, [*IMAGES, *argv])
    assert (job.model, job.files, job.images) == ("m.pth", files, "photos")


def test_load_from_argv_lets_the_command_line_replace_the_files_of_the_yaml(
    write_config: Callable[[str], str],
) -> None:
    config = write_config("model: m.pth\nfiles: [a.onnx, b.onnx]\nimages: photos\n")
    assert load_from_argv(ParityJob, ["--config", config]).files == ("a.onnx", "b.onnx")
    job = load_from_argv(ParityJob, ["--config", config, "m.pth", "c.onnx", "d.onnx"])
    assert job.files == ("c.onnx", "d.onnx")


@pytest.mark.parametrize("argv", [[], ["a"], ["a", "b"]])
def test_load_from_argv_takes_no_files_where_none_are_needed(argv: list[str]) -> None:
    assert load_from_argv(AnyFilesJob, argv).files == tuple(argv)


def test_option_table_refuses_an_argument_behind_one_that_takes_all() -> None:
    class Behind(Config):
        files: Annotated[tuple[str, ...], Flag("files")]
        output: Annotated[str, Flag("output")]

    with pytest.raises(ValueError, match="files takes all that come: no argument may follow it"):
        OptionTable(Behind)


def test_option_table_says_how_many_values_a_list_without_upper_limit_takes() -> None:
    class Lists(Config):
        some: Annotated[tuple[str, ...], Field(min_length=1)] = ("a",)
        any_number: tuple[int, ...] = ()

    table = OptionTable(Lists)
    assert table.by_path[("some",)].shape.expected == "1 or more texts"
    assert table.by_path[("any_number",)].shape.expected == "whole numbers"


def test_format_help_shows_that_an_argument_may_be_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    lines = format_help(ParityJob, OptionTable(ParityJob)).splitlines()
    usage = "usage: retinaray parity model.pth FILE [FILE ...] [options] [section.key=value ...]"
    assert lines[0] == usage
    (line,) = (line for line in lines if line.startswith("  FILE "))
    assert line.split("   ")[0].strip() == "FILE [FILE ...]"
    assert line.endswith("[required]")
    optional = format_help(AnyFilesJob, OptionTable(AnyFilesJob)).splitlines()
    assert optional[0].startswith("usage: retinaray files [FILE [FILE ...]] [options]")


@pytest.mark.parametrize(
    ("argv", "fault"),
    [
        (["m.pth", *IMAGES], "files (argument FILE): required, but not given: Exported files"),
        (["m.pth", "files=", *IMAGES], "files=[] (argument FILE): expected 1 or more texts"),
        (
            ["m.pth", "a.onnx", "b.pth", *IMAGES],
            "files=[a.onnx, b.pth] (argument FILE): expected exported files that end in .onnx, "
            ".plan, .engine, got b.pth",
        ),
        (
            ["m.pth", "a.onnx", "b.onnx", "a.onnx", *IMAGES],
            "files=[a.onnx, b.onnx, a.onnx] (argument FILE): a.onnx: given more than once",
        ),
        (
            ["m.pth", "a.onnx", "b.plan", "--backend", "openvino", *IMAGES],
            "backend=openvino cannot run b.plan: leave --backend out, or these files",
        ),
        (
            ["m.pth", "a.onnx", "--backend", "torch", *IMAGES],
            "backend=torch runs no exported file: it is the reference; leave --backend out",
        ),
        (
            ["m.pth", "a.onnx", "--output", "x", "--report", "x", *IMAGES],
            "output and report are both x: give them different names",
        ),
        (["m.pth", "a.onnx"], "images (--images): required, but not given: Images like those"),
        (
            ["m.pth", "a.onnx", "--tolerance-ap-int8", "2", *IMAGES],
            "tolerance.ap_int8=2 (--tolerance-ap-int8): expected a number from 0 to 1",
        ),
    ],
)
def test_parity_job_refuses(
    faults_of: Callable[[type[Job], list[str]], list[str]], argv: list[str], fault: str
) -> None:
    (line,) = faults_of(ParityJob, argv)
    assert line.startswith(fault)


@pytest.mark.parametrize("backend", ["auto", "tensorrt"])
def test_parity_job_takes_engines_and_survives_its_own_dictionary(backend: str) -> None:
    job = load_from_argv(ParityJob, ["m.pth", "a.PLAN", "b.onnx", "--backend", backend, *IMAGES])
    assert load_from_dict(ParityJob, to_dict(job)) == job
