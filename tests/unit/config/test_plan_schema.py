"""The settings of `plan`: machines as text, and which command a job file is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from retinaray.config.loading import load_from_argv, load_from_dict, to_dict
from retinaray.config.nodes import Job
from retinaray.config.plan_schema import (
    NodeRequest,
    PlanJob,
    find_verb,
    load_planned,
    parse_nodes,
)
from retinaray.config.schema import EvaluateJob, InferJob, TrainJob
from retinaray.config.yaml_files import read_yaml
from retinaray.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "jobs" / "configs"
GIB = 1024**3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("g5.12xlarge", [NodeRequest(1, "g5.12xlarge", {})]),
        (
            "2xg5.12xlarge, 4xc7i.4xlarge",
            [NodeRequest(2, "g5.12xlarge", {}), NodeRequest(4, "c7i.4xlarge", {})],
        ),
        (
            "3x(cpu=48,gpu=4,mem=192GiB,gpu_mem=24GB),x9.large",
            [
                NodeRequest(
                    3, None, {"cpu": 48, "gpu": 4, "mem": 192 * GIB, "gpu_mem": 24 * 10**9}
                ),
                NodeRequest(1, "x9.large", {}),
            ],
        ),
        ("(cpu=0.5,mem=1.5MiB)", [NodeRequest(1, None, {"cpu": 0.5, "mem": 1.5 * 1024**2})]),
    ],
)
def test_parse_nodes_reads_types_and_resources(text: str, expected: list[NodeRequest]) -> None:
    assert list(parse_nodes(text)) == expected


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("0xg5.xlarge", "'0xg5.xlarge': expected COUNTxTYPE"),
        ("g5.xlarge,", "'': expected COUNTxTYPE"),
        ("2x(cpu=4", "'2x(cpu=4': expected COUNTxTYPE"),
        ("(mem=4GiB)", "(mem=4GiB): lacks cpu"),
        ("(cpu=4)", "(cpu=4): lacks mem"),
        ("(cpu=4,mem=4)", "'mem=4': expected a size with its unit, as in mem=24GiB"),
        ("(cpu=4GiB,mem=4GiB)", "'cpu=4GiB': expected a number without a unit"),
        ("(cpu=4,mem=4GiB,gpu=1)", "lacks gpu_mem, the memory of each GPU"),
        ("(cpu=4,cpu=5,mem=4GiB)", "'cpu=5': expected each of cpu, gpu, mem, gpu_mem once"),
        ("(cpu=0,mem=4GiB)", "expected finite numbers, and cpu above 0"),
        ("(cpu=4,mem=4GiB,disk=9GiB)", "'disk=9GiB': expected each of cpu, gpu, mem, gpu_mem"),
    ],
)
def test_plan_job_refuses_malformed_nodes(
    faults_of: Callable[[type[Job], list[str]], list[str]], text: str, fault: str
) -> None:
    (line,) = faults_of(PlanJob, ["--job", "a.yaml", "--nodes", text])
    assert line.startswith(f"nodes={text} (--nodes): ")
    assert fault in line


def test_plan_job_reports_all_its_faults_at_once(
    faults_of: Callable[[type[Job], list[str]], list[str]],
) -> None:
    argv = ["--nodes", "0xa", "--verb", "trian", "--num-images", "0", "--with=--a '"]
    assert sorted(line.split("=")[0].split(" ")[0] for line in faults_of(PlanJob, argv)) == [
        "command",
        "job",
        "nodes",
        "num_images",
        "options",
    ]


def test_plan_job_survives_its_own_dictionary() -> None:
    job = load_from_argv(PlanJob, ["--job", "a.yaml", "--nodes", "2xg5.xlarge", "--with=--batch 4"])
    assert load_from_dict(PlanJob, to_dict(job)) == job


def test_plan_job_examples_are_valid_command_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    monkeypatch.chdir(CONFIGS.parents[1])
    for example in PlanJob.examples:
        program, verb, *argv = shlex.split(example)
        assert (program, verb) == ("retinaray", "plan")
        plan = load_from_argv(PlanJob, argv)
        assert load_planned(plan).verb == find_verb_by_name(Path(plan.job).absolute())


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_find_verb_tells_every_job_file_of_the_repository(path: Path) -> None:
    assert find_verb(read_yaml(str(path)).tree) == find_verb_by_name(path)


def find_verb_by_name(path: Path) -> str:
    """The folder's name below the settings, or what the file's name begins with."""
    return path.relative_to(CONFIGS).with_suffix("").parts[0].partition("_")[0]


@pytest.mark.parametrize(
    ("tree", "verb"),
    [
        ({"output": "m.pth", "data": {"annotations": "a.json"}}, "train"),
        # A misspelt section does not make it another command's.
        ({"output": "m.pth", "data": {"annotations": "a.json"}, "modle": {}}, "train"),
        ({"output": "s", "data": {"annotations": "a.json"}, "space": {"x": [1]}}, "tune"),
        ({"model": "m.onnx", "images": "photos"}, "infer"),
        ({"model": "m.pth", "output": "m.onnx"}, "export"),
        ({"model": "m.pth", "annotations": "a.json"}, "evaluate"),
        ({"model": "m.pth", "annotations": "a.json", "images": "p", "kitti": {}}, "evaluate"),
    ],
)
def test_find_verb_goes_by_the_keys(tree: dict[str, object], verb: str) -> None:
    assert find_verb(tree) == verb


def test_find_verb_refuses_a_file_that_fits_two_commands() -> None:
    tree = {"model": "m.onnx", "images": "photos", "annotations": "a.json"}
    with pytest.raises(ConfigError, match="could be for infer or evaluate: say which with --verb"):
        find_verb(tree)


def test_load_planned_takes_the_command_that_is_given(write_config: Callable[[str], str]) -> None:
    config = write_config("model: m.onnx\nimages: photos\nannotations: a.json\n")
    infer = load_planned(PlanJob(job=config, command="infer"))
    evaluate = load_planned(PlanJob(job=config, command="evaluate"))
    assert (type(infer), type(evaluate)) == (InferJob, EvaluateJob)


def test_load_planned_applies_the_rest_of_the_command_line(
    write_config: Callable[[str], str],
) -> None:
    config = write_config("output: m.pth\ndata: {annotations: a.json}\n")
    plan = load_from_argv(PlanJob, ["--job", config, "--with=--workers 4 run.batch=32"])
    job = load_planned(plan)
    assert isinstance(job, TrainJob)
    assert (job.run.workers, job.run.batch) == (4, 32)


def test_load_planned_reports_all_faults_of_the_job_at_once(
    write_config: Callable[[str], str],
) -> None:
    config = write_config(
        "output: m.pth\ndata: {annotations: a.json, resize: 5}\nrun: {bacth: 4}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_planned(PlanJob(job=config, options="--workers -1"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert any("data.resize=5" in line and "line 2" in line for line in lines)
    assert any("run.bacth" in line for line in lines)
    assert any("run.workers=-1" in line for line in lines)


def test_load_planned_says_which_file_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"config file absent\.yaml: No such file"):
        load_planned(PlanJob(job="absent.yaml"))
