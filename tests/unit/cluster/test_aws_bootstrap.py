"""What `ray up` does on AWS, against a simulation of EC2: bootstrap and the start of every node."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

moto = pytest.importorskip("moto", reason="needs the package moto, which simulates AWS")

Config = dict[str, Any]
REGION = "us-east-1"


ACCOUNT_ID = "123456789012"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home without a past: Ray writes the key of the nodes there."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def account(home: Path) -> Iterator[Any]:
    """A simulated account; gives its EC2 client."""
    import boto3
    from ray.autoscaler._private.aws import utils

    with pytest.MonkeyPatch.context() as patch, moto.mock_aws():
        patch.setenv("HOME", str(home))
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_EC2", "AWS_PROFILE"):
            patch.delenv(name, raising=False)
        yield boto3.client("ec2", region_name=REGION)
    # Ray keeps clients; these know a simulation that is over.
    utils.client_cache.cache_clear()
    utils.resource_cache.cache_clear()


@pytest.fixture(scope="module")
def profiles(account: Any, repository: Path) -> None:
    """The roles of the nodes, made of the documents in cluster/iam as README says."""
    import boto3

    iam = boto3.client("iam", region_name=REGION)
    folder = repository / "cluster" / "iam"
    for role in ("retinaray-head", "retinaray-worker"):
        trust = (folder / "trust-ec2.json").read_text("utf-8")
        iam.create_role(RoleName=role, AssumeRolePolicyDocument=trust)
        names = ["s3-run-policy"] + ["head-autoscaler-policy"] * role.endswith("head")
        for name in names:
            document = (folder / f"{name}.json").read_text("utf-8")
            iam.put_role_policy(RoleName=role, PolicyName=name, PolicyDocument=document)
        iam.create_instance_profile(InstanceProfileName=role)
        iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)


@pytest.fixture(scope="module")
def filled_in(account: Any, profiles: None, repository: Path) -> Config:
    """ray_cluster.yaml as a user fills it in, with what the simulated account has."""
    import yaml

    vpc = account.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnets = [
        account.create_subnet(
            VpcId=vpc, CidrBlock=f"10.0.{number}.0/24", AvailabilityZone=f"{REGION}{zone}"
        )["Subnet"]["SubnetId"]
        for number, zone in enumerate("ab")
    ]
    group = account.create_security_group(GroupName="nodes", Description="nodes", VpcId=vpc)
    image = account.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    text = (repository / "ray_cluster.yaml").read_text("utf-8")
    for placeholder, value in (
        ("ami-00000000000000000", image),
        ("subnet-00000000000000000", subnets[0]),
        ("subnet-00000000000000001", subnets[1]),
        ("sg-00000000000000000", group["GroupId"]),
        ("::000000000000:", f"::{ACCOUNT_ID}:"),
    ):
        assert placeholder in text
        text = text.replace(placeholder, value)
    content: Config = yaml.safe_load(text)
    return content


@pytest.fixture(scope="module")
def bootstrapped(filled_in: Config) -> Config:
    """What Ray makes of it."""
    from ray.autoscaler._private.commands import _bootstrap_config

    config: Config = _bootstrap_config(filled_in, no_config_cache=True)
    return config


def test_bootstrap_leaves_what_was_filled_in(
    bootstrapped: Config, filled_in: Config, account: Any, home: Path
) -> None:
    for name, node_type in bootstrapped["available_node_types"].items():
        node, given = node_type["node_config"], filled_in["available_node_types"][name]
        for key in ("SubnetIds", "SecurityGroupIds", "IamInstanceProfile", "ImageId"):
            assert node[key] == given["node_config"][key], f"{name}.{key}"
        assert node_type["resources"]["CPU"] == given["resources"]["CPU"], name
    # No group of Ray's own, which would open port 22 to the world.
    groups = account.describe_security_groups()["SecurityGroups"]
    assert not [group for group in groups if group["GroupName"].startswith("ray-autoscaler")]
    (key,) = (home / ".ssh").glob("*.pem")
    assert key.stat().st_mode & 0o077 == 0


def test_bootstrap_gives_gpus_of_ec2_to_gpu_nodes_alone(bootstrapped: Config) -> None:
    types = bootstrapped["available_node_types"]
    gpus = {name: types[name]["resources"].get("GPU", 0) for name in types}
    assert gpus == {"head": 0, "gpu_on_demand": 1, "gpu_spot": 1, "cpu_decode": 0}


def test_nodes_start_as_they_are_described(bootstrapped: Config, account: Any) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider = AWSNodeProvider(bootstrapped["provider"], bootstrapped["cluster_name"])
    for name, node_type in bootstrapped["available_node_types"].items():
        provider.create_node(node_type["node_config"], {"ray-user-node-type": name}, 1)
    found = {}
    for reservation in account.describe_instances()["Reservations"]:
        for instance in reservation["Instances"]:
            tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
            assert tags["ray-cluster-name"] == "retinaray"
            found[tags["ray-user-node-type"]] = instance
    assert set(found) == set(bootstrapped["available_node_types"])
    assert found["gpu_spot"].get("InstanceLifecycle") == "spot"
    assert "InstanceLifecycle" not in found["gpu_on_demand"]
    assert {instance.get("PublicIpAddress", "") for instance in found.values()} == {""}
    assert all(i["MetadataOptions"]["HttpTokens"] == "required" for i in found.values())


def test_head_policy_names_what_the_file_starts(
    ray_cluster: Config, load_policy: Callable[[str], dict[str, Any]]
) -> None:
    from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME

    text = json.dumps(load_policy("head-autoscaler-policy.json"))
    types = ray_cluster["available_node_types"]
    started = {types[name]["node_config"]["InstanceType"] for name in types if name != "head"}
    assert set(re.findall(r'"([a-z]\d\w?\.\w+)"', text)) == started
    assert f"aws:RequestTag/{TAG_RAY_CLUSTER_NAME}" in text
    assert f'"{ray_cluster["cluster_name"]}"' in text
