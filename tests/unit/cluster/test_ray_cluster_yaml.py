"""ray_cluster.yaml: accepted by Ray and by EC2's own service model, and closed to strangers."""

from __future__ import annotations

import copy
import fnmatch
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import ValidationError

Config = dict[str, Any]

# What Ray adds or takes away before it calls EC2's RunInstances.
RAY_ONLY_KEYS = {"SubnetIds"}
SPOT = "gpu_spot"
WORKERS = ("gpu_on_demand", "gpu_spot", "cpu_decode")


def validate(config: Config) -> Config:
    """What `ray up` does before it calls anybody."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: Config = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def report_node_faults(node_config: Config) -> str:
    """What EC2's service model says to the node's settings; empty when nothing."""
    import botocore.session
    from botocore.validate import ParamValidator

    model = botocore.session.get_session().get_service_model("ec2")
    request = {key: value for key, value in node_config.items() if key not in RAY_ONLY_KEYS}
    report = ParamValidator().validate(
        request | {"MinCount": 1, "MaxCount": 1}, model.operation_model("RunInstances").input_shape
    )
    return str(report.generate_report())


def list_commands(config: Config) -> list[str]:
    return [command for key in config if key.endswith("_commands") for command in config[key]]


def list_tracked(repository: Path) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    answer = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    return [name for name in answer.stdout.splitlines() if (repository / name).is_file()]


def test_ray_accepts_the_file(ray_cluster: Config) -> None:
    prepared = validate(ray_cluster)
    assert prepared["head_node_type"] == "head"
    assert set(prepared["available_node_types"]) == {"head", *WORKERS}


@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    [
        (("idle_timeout_minuets",), 5, ValidationError, "'idle_timeout_minuets' was unexpected"),
        (
            ("available_node_types", SPOT, "max_worker"),
            8,
            ValidationError,
            "'max_worker' was unexpected",
        ),
        (
            ("available_node_types", SPOT, "resources"),
            {"GPU": 0.5},
            ValidationError,
            "0.5 is not of type 'integer'",
        ),
        (("head_node_type",), "haed", ValueError, "head_node_type"),
    ],
    ids=["top key", "node key", "half a GPU", "unknown head"],
)
def test_ray_refuses_a_typing_error(
    ray_cluster: Config,
    path: tuple[str, ...],
    value: object,
    error: type[Exception],
    message: str,
) -> None:
    node = ray_cluster
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(error, match=message):
        validate(ray_cluster)


def test_node_settings_are_those_of_ec2(ray_cluster: Config) -> None:
    for name, node_type in ray_cluster["available_node_types"].items():
        assert report_node_faults(node_type["node_config"]) == "", name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"InstanceTyp": "g5.2xlarge"}, "InstanceTyp"),
        ({"MetadataOptions": {"HttpToken": "required"}}, "HttpToken"),
        ({"SecurityGroupIds": "sg-1"}, "SecurityGroupIds"),
        (
            {"BlockDeviceMappings": [{"DeviceName": "/dev/xvda", "Ebs": {"VolumeSize": "100"}}]},
            "VolumeSize",
        ),
    ],
)
def test_node_settings_are_refused_when_misspelt(
    ray_cluster: Config, change: Config, message: str
) -> None:
    node_config = ray_cluster["available_node_types"][SPOT]["node_config"]
    assert validate(ray_cluster), "Ray itself lets all of these pass"
    assert message in report_node_faults(node_config | change)


def test_nodes_are_closed_to_strangers(ray_cluster: Config) -> None:
    assert ray_cluster["provider"]["use_internal_ips"] is True
    for name, node_type in ray_cluster["available_node_types"].items():
        node = node_type["node_config"]
        assert node["MetadataOptions"]["HttpTokens"] == "required", name
        assert node["MetadataOptions"]["HttpPutResponseHopLimit"] == 1, name
        assert node["SecurityGroupIds"], f"{name}: Ray's own group opens port 22 to the world"
        assert node["IamInstanceProfile"]["Arn"].startswith("arn:aws:iam::"), name
        disks = [mapping["Ebs"] for mapping in node["BlockDeviceMappings"]]
        assert all(disk["Encrypted"] and disk["DeleteOnTermination"] for disk in disks), name


def test_only_the_head_may_start_nodes(ray_cluster: Config) -> None:
    types = ray_cluster["available_node_types"]
    profiles = {name: types[name]["node_config"]["IamInstanceProfile"]["Arn"] for name in types}
    assert profiles.pop("head").endswith("/retinaray-head")
    assert {arn.rpartition("/")[2] for arn in profiles.values()} == {"retinaray-worker"}


def test_head_runs_no_tasks_and_workers_cost_nothing_while_idle(ray_cluster: Config) -> None:
    types = ray_cluster["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["head"]["max_workers"] == 0
    assert [types[name]["min_workers"] for name in WORKERS] == [0, 0, 0]
    assert sum(types[name]["max_workers"] for name in WORKERS) == ray_cluster["max_workers"]
    assert 0 < ray_cluster["idle_timeout_minutes"] <= 15


def test_spot_nodes_differ_from_the_others_in_the_market_alone(ray_cluster: Config) -> None:
    types = ray_cluster["available_node_types"]
    spot = dict(types[SPOT]["node_config"])
    assert spot.pop("InstanceMarketOptions")["MarketType"] == "spot"
    assert spot == types["gpu_on_demand"]["node_config"]


def test_every_node_starts_with_token_and_environment(ray_cluster: Config) -> None:
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [command for command in ray_cluster[key] if "ray start" in command]
        assert start.startswith(". ~/retinaray/cluster/node_env.sh &&"), key
    (head,) = [c for c in ray_cluster["head_start_ray_commands"] if "ray start" in c]
    assert "--dashboard-host=127.0.0.1" in head
    assert ray_cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_no_secret_lies_in_the_file(repository: Path) -> None:
    text = (repository / "ray_cluster.yaml").read_text("utf-8")
    assert not re.search(r"AKIA[0-9A-Z]{16}|RAY_AUTH_TOKEN\s*=|AWS_SECRET|BEGIN .*PRIVATE", text)
    assert set(re.findall(r"\b\d{12}\b", text)) == {"000000000000"}
    assert set(re.findall(r"\b(?:ami|subnet|sg|fs|eice)-([0-9a-f]+)\b", text)) <= {
        "0" * 17,
        "0" * 16 + "1",
    }


def test_what_must_be_filled_in_is_marked(repository: Path) -> None:
    lines = (repository / "ray_cluster.yaml").read_text("utf-8").splitlines()
    for number, line in enumerate(lines):
        if re.search(r"-0{16}\d|::0{12}:", line):
            around = lines[max(0, number - 5) : number + 3]
            assert any("FILL IN" in near for near in around), f"line {number + 1}: {line}"


def test_commands_agree_with_each_other(ray_cluster: Config) -> None:
    commands = list_commands(ray_cluster)
    regions = {found for text in commands for found in re.findall(r"AWS_REGION=([\w-]+)", text)}
    assert regions == {ray_cluster["provider"]["region"]}
    ports = {
        found for text in commands for found in re.findall(r"--metrics-export-port=(\d+)", text)
    }
    assert ports == {"8080"}
    install = [text for text in commands if text.startswith("make ")]
    assert install == ["make -C ~/retinaray install PYTHON=python3.11"]


def test_every_command_is_shell(ray_cluster: Config) -> None:
    for command in list_commands(ray_cluster):
        answer = subprocess.run(
            ["bash", "-n", "-c", command], capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, f"{command}: {answer.stderr}"


def list_unanchored_losses(patterns: list[str], names: list[str]) -> Iterator[tuple[str, str]]:
    """Files that a pattern leaves out, by rsync's rules for names without a leading slash."""
    for pattern in patterns:
        for name in names:
            parts = name.split("/")
            ends = {"/".join(parts[:end]) for end in range(1, len(parts) + 1)}
            if pattern.startswith("/"):
                is_lost = pattern.strip("/") in ends
            else:
                is_lost = any(fnmatch.fnmatch(part, pattern.removeprefix("**/")) for part in parts)
            if is_lost:
                yield pattern, name


def test_rsync_exclude_keeps_every_file_of_the_checkout(
    ray_cluster: Config, repository: Path
) -> None:
    names = list_tracked(repository)
    assert "platform/retinaray/data/coco.py" in names
    assert list(list_unanchored_losses(ray_cluster["rsync_exclude"], names)) == []
    # Without its slash the pattern for the data folder would take the package's module along.
    losses = list(list_unanchored_losses(["data"], names))
    assert ("data", "platform/retinaray/data/coco.py") in losses


def test_rayignore_keeps_what_a_job_needs(repository: Path, tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import _get_ignore_file

    is_left_out = _get_ignore_file(repository, ignore_file=".rayignore")
    needed = [n for n in list_tracked(repository) if n.startswith(("platform/", "jobs/"))]
    assert [name for name in needed if is_left_out(repository / name)] == []
    assert is_left_out(repository / "tests" / "conftest.py")
    assert is_left_out(repository / "model.pth")
    # The fault that the leading slashes prevent.
    (tmp_path / ".rayignore").write_text("data/\n")
    (tmp_path / "platform/retinaray/data").mkdir(parents=True)
    is_lost = _get_ignore_file(tmp_path, ignore_file=".rayignore")
    assert is_lost(tmp_path / "platform/retinaray/data/coco.py")


@pytest.fixture
def read_node_environment(repository: Path, tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Variables after sourcing cluster/node_env.sh, with `ip` answering as given."""

    def read(route: str) -> dict[str, str]:
        tools = tmp_path / "bin"
        tools.mkdir()
        (tools / "ip").write_text(f"#!/bin/sh\necho '{route}'\n")
        (tools / "ip").chmod(0o755)
        answer = subprocess.run(
            ["bash", "-euc", f'. "{repository}/cluster/node_env.sh"; env -0'],
            env={"HOME": str(tmp_path), "PATH": f"{tools}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        )
        pairs = [pair.partition("=") for pair in answer.stdout.split("\0") if pair]
        return {name: value for name, _, value in pairs}

    return read


def test_node_env_names_the_interface_of_the_default_route(
    read_node_environment: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    (tmp_path / ".retinaray_region").write_text("export AWS_REGION=eu-central-1\n")
    found = read_node_environment("default via 10.0.0.1 dev ens5 proto dhcp src 10.0.0.9")
    assert found["NCCL_SOCKET_IFNAME"] == found["GLOO_SOCKET_IFNAME"] == "ens5"
    assert found["RAY_AUTH_MODE"] == "token"
    assert found["AWS_REGION"] == "eu-central-1"
    assert found["PATH"].startswith(f"{tmp_path}/retinaray/.venv/bin:")


def test_node_env_names_no_interface_when_there_is_no_route(
    read_node_environment: Callable[[str], dict[str, str]],
) -> None:
    found = read_node_environment("")
    assert "NCCL_SOCKET_IFNAME" not in found
    assert "AWS_REGION" not in found
