from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from retinaray.cli import VERBS
from retinaray.config.completion import (
    SHELLS,
    classify_value,
    describe_command,
    format_completion,
)
from retinaray.config.help_text import format_help
from retinaray.config.nodes import BackboneName, Job
from retinaray.config.options import OptionTable
from retinaray.errors import ConfigError
from retinaray.log_format import FORMATS

# What a shell cannot complete, by the names that the help gives them. A new name has to be put
# here, or among the paths of the module.
NO_PATHS = {
    *("NAME", "RULE", "METRIC", "GLOB", "DATE", "TEXT", "URL", "URI", "VERSION", "'OPTIONS'"),
    "NxTYPE,...",
}


def load_jobs() -> dict[str, type[Job]]:
    return {
        name: vars(importlib.import_module(verb.job.partition(":")[0]))[verb.job.partition(":")[2]]
        for name, verb in VERBS.items()
    }


@pytest.fixture(scope="module")
def jobs() -> dict[str, type[Job]]:
    return load_jobs()


@pytest.fixture(scope="module")
def scripts(jobs: dict[str, type[Job]]) -> dict[str, str]:
    """The script of each shell."""
    summaries = {name: verb.help for name, verb in VERBS.items()}
    return {shell: format_completion(shell, jobs, summaries) for shell in SHELLS}


@pytest.fixture
def complete(scripts: dict[str, str], tmp_path: Path) -> Callable[..., list[str]]:
    """What bash offers: complete("retinaray", "train", "--no") completes the last word."""
    program = shutil.which("bash")
    if program is None:
        pytest.skip("needs bash, which is not installed")
    (tmp_path / "script.bash").write_text(scripts["bash"], encoding="utf-8")
    folder = tmp_path / "here"
    (folder / "photos 2026").mkdir(parents=True)
    (folder / "train.json").touch()
    (folder / "model.pth").touch()

    def ask(*words: str) -> list[str]:
        text = (
            'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
            '_retinaray; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        answer = subprocess.run(
            [program, "--norc", "-c", text, str(tmp_path / "script.bash"), *words],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (answer.returncode, answer.stderr) == (0, "")
        return answer.stdout.splitlines() if answer.stdout.strip() else []

    return ask


def test_bash_offers_every_command(complete: Callable[..., list[str]]) -> None:
    assert complete("retinaray", "") == [*VERBS, "completion", "--help", "--version"]
    assert complete("retinaray", "ex") == ["export"]


@pytest.mark.parametrize("verb", list(VERBS))
def test_bash_offers_the_options_of_the_help(
    complete: Callable[..., list[str]], jobs: dict[str, type[Job]], verb: str
) -> None:
    offered = complete("retinaray", verb, "--")
    table = OptionTable(jobs[verb])
    text = format_help(jobs[verb], table).partition("Input and output")[2]
    # An option stands at the beginning of its line, in some with its opposite or its short form.
    lines = [line.strip() for line in text.splitlines() if re.match(r"  -", line)]
    shown = {name for line in lines for name in re.findall(r"(?:^|, )(--[\w.-]+)", line)}
    assert "--config" in shown
    listed = {option.names[0] for option in table.options if option.is_positional}
    assert set(offered) - listed == shown - {
        "--" + o.key for o in table.options if o.shape.kind == "mapping"
    }
    assert len(offered) == len(set(offered))


def test_bash_offers_the_values_of_a_choice(complete: Callable[..., list[str]]) -> None:
    names = list(get_args(BackboneName))
    assert complete("retinaray", "train", "--backbone", "") == names
    assert complete("retinaray", "train", "--model.backbone", "ResNet1") == [
        name for name in names if name.startswith("ResNet1")
    ]
    # bash makes three words of --norm=g.
    assert complete("retinaray", "train", "--norm", "=", "g") == ["gn"]
    assert complete("retinaray", "train", "--norm", "=")[:2] == ["auto", "frozen_bn"]
    assert complete("retinaray", "train", "--log-format", "") == list(FORMATS)


def test_bash_offers_files_where_a_path_is_taken(complete: Callable[..., list[str]]) -> None:
    everything = ["model.pth", "photos 2026", "train.json"]
    assert sorted(complete("retinaray", "train", "--annotations", "")) == everything
    assert sorted(complete("retinaray", "train", "")) == everything
    assert sorted(complete("retinaray", "report", "model.pth", "")) == everything
    assert complete("retinaray", "train", "--config", "tr") == ["train.json"]
    assert complete("retinaray", "train", "--images", "") == ["photos 2026"]
    assert complete("retinaray", "train", "--data.val_images", "ph") == ["photos 2026"]


def test_bash_offers_nothing_where_only_a_person_knows(complete: Callable[..., list[str]]) -> None:
    assert complete("retinaray", "train", "--lr", "") == []
    assert complete("retinaray", "train", "--experiment", "") == []
    assert complete("retinaray", "frobnicate", "--l") == []


def test_bash_offers_options_when_a_command_takes_no_bare_argument(
    complete: Callable[..., list[str]],
) -> None:
    assert "--annotations" in complete("retinaray", "doctor", "")
    assert complete("retinaray", "completion", "") == list(SHELLS)
    # A switch takes no value.
    assert "train.json" in complete("retinaray", "train", "--two-canvases", "")


def test_bash_offers_dotted_names_when_a_dot_has_been_typed(
    complete: Callable[..., list[str]],
) -> None:
    offered = complete("retinaray", "train", "--model.b")
    assert offered == ["--model.backbone", "--model.backbone_weights"]
    assert complete("retinaray", "train", "--loss.focal_g") == ["--loss.focal_gamma"]


@pytest.mark.parametrize("shell", SHELLS)
def test_shells_read_their_script_without_complaint(
    shell: str, scripts: dict[str, str], tmp_path: Path
) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"needs {shell}, which is not installed")
    path = tmp_path / "script"
    path.write_text(scripts[shell], encoding="utf-8")
    answer = subprocess.run([program, "-n", str(path)], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stderr) == (0, "")
    path.write_text(scripts[shell] + "\nif (((\n", encoding="utf-8")
    assert subprocess.run([program, "-n", str(path)], capture_output=True, check=False).returncode


def test_fish_offers_what_bash_offers(
    scripts: dict[str, str], complete: Callable[..., list[str]], tmp_path: Path
) -> None:
    program = shutil.which("fish")
    if program is None:
        pytest.skip("needs fish, which is not installed")
    path = tmp_path / "script.fish"
    path.write_text(scripts["fish"], encoding="utf-8")
    text = 'source $argv[1]; complete -C "retinaray $argv[2]"'
    for line in ("train --", "train --backbone ", "plan --", "ev", "train --norm=f"):
        answer = subprocess.run(
            [program, "--no-config", "-c", text, str(path), line],
            cwd=tmp_path,
            env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert answer.returncode == 0, answer.stderr
        found = {
            entry.partition("\t")[0].rpartition("=")[2] for entry in answer.stdout.splitlines()
        }
        expected = set(complete("retinaray", *line.replace("=", " = ").split(" ")))
        assert found == expected, line
        assert expected


def test_zsh_knows_the_options_and_their_values(scripts: dict[str, str], tmp_path: Path) -> None:
    program = shutil.which("zsh")
    if program is None:
        pytest.skip("needs zsh, which is not installed")
    path = tmp_path / "_retinaray"
    path.write_text(scripts["zsh"], encoding="utf-8")
    # `_arguments` is what zsh brings; here it tells what it was given.
    text = (
        "compdef() { : }; _arguments() { print -rl -- $@ }; source $1; "
        "words=(retinaray train --norm ''); CURRENT=4; _retinaray; print -r -- $words"
    )
    answer = subprocess.run(
        [program, "-f", "-c", text, "zsh", str(path)], capture_output=True, text=True, check=False
    )
    assert (answer.returncode, answer.stderr) == (0, "")
    lines = answer.stdout.splitlines()
    assert any(line.startswith("--norm=[Normalisation") for line in lines)
    assert any(re.fullmatch(r"!--model\.norm=.*:\(auto frozen_bn .*\)", line) for line in lines)
    assert "1:model.pth:_files" in lines
    assert any(re.fullmatch(r"--images=.*:DIR\|s3\\://:_files -/", line) for line in lines)
    assert lines[-1].split()[0] == "train"


def test_classify_value_takes_every_name_of_the_help_for_path_or_text(
    jobs: dict[str, type[Job]],
) -> None:
    texts = {
        option.flag.metavar if option.flag else ""
        for job_class in jobs.values()
        for option in OptionTable(job_class).options
        if option.shape.kind == "text" and classify_value(option) == "text"
    }
    assert texts - {""} == NO_PATHS


@pytest.mark.parametrize(
    ("verb", "key", "taken"),
    [
        ("train", "output", "file"),
        ("train", "data.images", "folder"),
        ("infer", "images", "file"),
        ("train", "model.backbone", "choice"),
        ("train", "optim.peak_lr", "text"),
        ("train", "data.two_canvases", "nothing"),
        ("train", "tracking.mlflow_uri", "text"),
        ("export", "output", "file"),
    ],
)
def test_classify_value_goes_by_type_and_name(
    jobs: dict[str, type[Job]], verb: str, key: str, taken: str
) -> None:
    option = OptionTable(jobs[verb]).by_path[tuple(key.split("."))]
    assert classify_value(option) == taken


def test_describe_command_leaves_out_what_only_a_file_can_hold(
    jobs: dict[str, type[Job]],
) -> None:
    command = describe_command("tune", jobs["tune"], "search")
    assert "--space" not in [name for word in command.words for name in word.names]
    assert any(o.shape.kind == "mapping" for o in OptionTable(jobs["tune"]).options)


@pytest.mark.parametrize(("shell", "came"), [("powershell", "got powershell"), ("", "got nothing")])
def test_format_completion_refuses_other_shells(shell: str, came: str) -> None:
    with pytest.raises(ConfigError, match=f"expected one of bash, zsh, fish, {came}"):
        format_completion(shell, {}, {})
