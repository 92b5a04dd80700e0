"""The settings of `tune`: a training, a space, and how it is searched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from retinaray.config.loading import load_from_argv, load_from_dict, read_request, to_dict, to_yaml
from retinaray.config.schema import Job, TuneJob
from retinaray.config.sweep_schema import is_choice
from retinaray.config.training_schema import METRICS
from retinaray.errors import ConfigError
from retinaray.evaluation.coco_map import TWELVE

FaultsOf = Callable[[type[Job], list[str]], list[str]]
WriteConfig = Callable[[str], str]

TREE: dict[str, Any] = {
    "output": "sweep",
    "data": {"annotations": "train.json", "val_annotations": "val.json"},
    "space": {
        "anchors.base_scale": {"loguniform": [1.5, 4.0]},
        "anchors.ratios": [[1.0, 2.0, 0.5], [1, 3]],
        "model.backbone_weights": [None, "DEFAULT"],
    },
}
ARGV = ["sweep", "--annotations", "train.json", "--val-annotations", "val.json"]


def test_tune_job_reads_space_and_search(write_config: WriteConfig) -> None:
    config = write_config(yaml.safe_dump(TREE))
    argv = ["--config", config, "--trials", "40", "--search", "random", "--objective", "AP_small"]
    job = load_from_argv(TuneJob, [*argv, "--lr", "0.01", "--rule", "fppi=0.5"])
    assert job.space == TREE["space"]
    assert (job.sweep.trials, job.sweep.search, job.sweep.rule) == (40, "random", "fppi=0.5")
    assert (job.run.objective, job.optim.peak_lr) == ("AP_small", 0.01)
    assert job.output == "sweep"


def test_tune_job_keeps_its_space_through_yaml(write_config: WriteConfig) -> None:
    job = load_from_dict(TuneJob, TREE, {"sweep.concurrent": 3})
    again = load_from_argv(TuneJob, ["--config", write_config(to_yaml(job))])
    assert again == job
    assert list(again.space) == list(TREE["space"])
    assert load_from_dict(TuneJob, to_dict(job)) == job


def test_tune_job_prints_its_settings_as_a_file_that_gives_the_same_job(
    write_config: WriteConfig,
) -> None:
    config = write_config(yaml.safe_dump(TREE))
    request = read_request(TuneJob, ["--config", config, "--trials", "5", "--print-config"])
    assert request.job is None
    assert "  trials: 5\n" in request.printout
    expected = load_from_argv(TuneJob, ["--config", config, "--trials", "5"])
    printed = write_config(request.printout)
    assert load_from_argv(TuneJob, ["--config", printed]) == expected


def test_tune_job_leaves_the_space_of_the_caller_alone() -> None:
    tree = {**TREE, "space": dict(TREE["space"])}
    load_from_dict(TuneJob, tree)
    assert tree == TREE


def test_tune_job_needs_a_validation_set() -> None:
    tree = {**TREE, "data": {"annotations": "train.json"}}
    with pytest.raises(
        ConfigError, match=r"^data\.val_annotations \(--val-annotations\): required"
    ):
        load_from_dict(TuneJob, tree)


@pytest.mark.parametrize("space", [{}, None, 5, [1, 2]])
def test_tune_job_needs_a_space(space: object) -> None:
    with pytest.raises(ConfigError, match="space"):
        load_from_dict(TuneJob, {**TREE, "space": space})


def test_tune_job_says_that_the_space_is_missing(faults_of: FaultsOf) -> None:
    (fault,) = faults_of(TuneJob, ARGV)
    assert fault.startswith("space (--space): required, but not given: What is searched, by YAML")
    assert "{loguniform: [low, high]}" in fault


@pytest.mark.parametrize("value", ["optim.peak_lr", "{optim.peak_lr: [0.1, 0.2]}"])
def test_tune_job_answers_a_space_on_the_command_line(faults_of: FaultsOf, value: str) -> None:
    (fault,) = faults_of(TuneJob, [*ARGV, "--space", value])
    assert fault == (
        f"space={value} (--space): expected a section of the file of --config, with a key per entry"
    )


def test_tune_job_names_the_faults_of_space_search_and_data_together(
    write_config: WriteConfig, faults_of: FaultsOf
) -> None:
    config = write_config(
        "output: s\ndata: {annotations: a}\nsweep: {search: grid}\n"
        "space:\n  optim.peak_rl: [0.1]\n  run.workers: [1, 2]\n  optim.gamma: {uniform: [1, 0]}\n"
    )
    assert faults_of(TuneJob, ["--config", config]) == [
        "data.val_annotations (--val-annotations): required for a sweep: trials are compared by "
        "validation AP",
        "space.optim.peak_rl=[0.1]: no such key; nearest: optim.peak_lr (--lr)",
        "space.run.workers: cannot be searched: it must be the same for all trials",
        "space.optim.gamma={uniform}: expected low < high, got 1 and 0",
        "sweep.search=grid: every entry of space must be a list of choices; give lists, or "
        "--search random",
    ]


def test_tune_job_takes_a_grid_of_choices() -> None:
    space = {"anchors.num_scales": [1, 2, 3], "anchors.levels": ["3-7", "2-7"]}
    job = load_from_dict(TuneJob, {**TREE, "space": space}, {"sweep.search": "grid"})
    assert all(is_choice(domain) for domain in job.space.values())


def test_tune_job_holds_the_space_against_the_training_it_varies() -> None:
    changes = {"space": {"run.batch": [8, 12]}, "run.workers": 8}
    with pytest.raises(ConfigError, match=r"^space\.run\.batch: run\.batch=12 does not divide"):
        load_from_dict(TuneJob, TREE, changes)


@pytest.mark.parametrize(
    ("argv", "fault"),
    [
        (["--trials", "0"], "sweep.trials=0 (--trials): expected a whole number from 1 to 100000"),
        (["--search", "tp"], "sweep.search=tp (--search): expected one of tpe, random, grid"),
        (["--reduction", "1"], "sweep.reduction=1 (--reduction): expected a number > 1 and <= 16"),
        (["--rule", "recall=2"], "sweep.rule=recall=2 (--rule): expected f1, precision=P"),
        (["--concurrent", "0"], "sweep.concurrent=0 (--concurrent): expected a whole number"),
    ],
)
def test_tune_job_words_the_faults_of_its_own_settings(
    faults_of: FaultsOf, minimal: dict[str, list[str]], argv: list[str], fault: str
) -> None:
    (line,) = faults_of(TuneJob, [*minimal["tune"], *argv])
    assert line.startswith(fault)


def test_metrics_are_those_that_an_evaluation_gives() -> None:
    assert METRICS == TWELVE
