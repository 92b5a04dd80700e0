"""cluster/iam: enough for what our code asks of S3, and nothing more.

The judge in conftest.py knows IAM's rules for the operators in use; moto's own knows neither
resources nor conditions.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from retinaray import s3_objects
from retinaray.inference.manifest import cut_parts, list_sources
from retinaray.inference.part_attempts import PartAttempts
from retinaray.inference.part_table import write_parts
from retinaray.inference.pipeline import ImageResult, ImageSource
from retinaray.inference.run_files import RunFiles
from retinaray.inference.run_lock import RunLock
from retinaray.storage import Storage, join_uri, split_s3_uri

Document = dict[str, Any]
Judge = Callable[..., str]
Asked = tuple[str, str, str]

POLICIES = ("s3-run-policy.json", "head-autoscaler-policy.json")
RUN_BUCKET = "arn:aws:s3:::RUN_BUCKET"
INPUT_BUCKET = "arn:aws:s3:::INPUT_BUCKET"
# EC2 knows no resources for these; they only look.
MUST_BE_ANY = "ec2:Describe"

# What S3 asks for, by the client's method.
# Source: "Actions, resources, and condition keys for Amazon S3".
ACTIONS = {
    "put_object": "s3:PutObject",
    "create_multipart_upload": "s3:PutObject",
    "upload_part": "s3:PutObject",
    "complete_multipart_upload": "s3:PutObject",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "get_object": "s3:GetObject",
    "head_object": "s3:GetObject",
    "delete_object": "s3:DeleteObject",
    "list_objects_v2": "s3:ListBucket",
}
OPERATIONS = {"".join(word.title() for word in m.split("_")): a for m, a in ACTIONS.items()}


def to_list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def list_methods(source: str) -> set[str]:
    """Methods that a module calls on a `client`, on what `client()` gives, or by a paginator."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if re.search(r"\bclient(\(\))?$", ast.unparse(node.func.value)):
            is_paged = node.func.attr == "get_paginator"
            argument = node.args[0] if is_paged else None
            found.add(argument.value if isinstance(argument, ast.Constant) else node.func.attr)  # type: ignore[arg-type]
    return found


def test_every_call_of_ours_is_covered(
    repository: Path, load_policy: Callable[[str], Document]
) -> None:
    folder = repository / "platform" / "retinaray"
    callers = ("s3_objects.py", "s3_listing.py")
    methods = set().union(*(list_methods((folder / name).read_text("utf-8")) for name in callers))
    # A method that is new here needs a line in ACTIONS, and maybe one in the policy.
    assert methods == set(ACTIONS)
    others = [
        path.name
        for path in folder.rglob("*.py")
        if "boto3" in path.read_text("utf-8") and path.name != "s3_objects.py"
    ]
    # Of the last one only a comment names it.
    talking = {"embedded_s3.py", "s3_failures.py", "storage.py", "provenance.py"}
    assert set(others) <= talking | {"mlflow_logger.py"}
    statements = load_policy("s3-run-policy.json")["Statement"]
    granted = {action for statement in statements for action in to_list(statement["Action"])}
    assert granted == set(ACTIONS.values())


def test_list_methods_finds_calls_of_all_three_forms() -> None:
    source = "client.put_object()\nself.client().get_object()\nx.close()\n"
    source += "client.get_paginator('list_objects_v2')"
    assert list_methods(source) == {"put_object", "get_object", "list_objects_v2"}


@pytest.mark.parametrize("name", POLICIES)
def test_grants_name_actions_and_resources(
    name: str, load_policy: Callable[[str], Document]
) -> None:
    for statement in load_policy(name)["Statement"]:
        assert statement["Effect"] == "Allow"
        actions = to_list(statement["Action"])
        assert not [action for action in actions if "*" in action], statement["Sid"]
        for resource in to_list(statement["Resource"]):
            if resource == "*":
                assert all(action.startswith(MUST_BE_ANY) for action in actions), statement["Sid"]
            else:
                # A bucket, an account and a kind are always named.
                assert re.match(r"arn:aws:(s3:::[A-Z_]+|(iam|ec2):[\w-]*:\d*:[\w-]+/)", resource)
                assert resource != f"{RUN_BUCKET}/*"


def test_documents_are_all_checked(repository: Path) -> None:
    found = {path.name for path in (repository / "cluster" / "iam").iterdir()}
    assert found == {*POLICIES, "run-bucket-policy.json", "run-bucket-lifecycle.json"} | {
        "trust-ec2.json",
        "trust-irsa.json",
    }
    for name in found:
        text = (repository / "cluster" / "iam" / name).read_text("utf-8")
        assert json.loads(text)
        assert set(re.findall(r"\b\d{12}\b", text)) <= {"000000000000"}, name


@pytest.fixture
def s3_requests(s3_bucket: str) -> Iterator[list[Asked]]:
    """What the client asks for from here on: action, bucket, key or prefix."""
    asked: list[Asked] = []

    def note(params: dict[str, Any], model: Any, **_: Any) -> None:
        key = params["Prefix"] if model.name == "ListObjectsV2" else params["Key"]
        asked.append((OPERATIONS[model.name], params["Bucket"], key))
        if model.name in ("GetObject", "HeadObject"):
            # Of an absent key S3 says 404 only to who may list it, else 403.
            asked.append(("s3:ListBucket", params["Bucket"], key))

    events = s3_objects.S3Objects(None, 5.0, 60.0, 5).client().meta.events
    events.register("before-parameter-build.s3", note)
    yield asked
    events.unregister("before-parameter-build.s3", note)


def live_through_a_run(root: str) -> None:
    """All that a batch inference does with S3, from the lock to --overwrite."""
    storage = Storage()
    files = RunFiles(root, storage)
    with RunLock(root, storage).held() as lock:
        lock.look()
        assert files.read_record() is None
        files.remove_all()
        sources = [ImageSource(number, f"s3://x/{number}.jpg") for number in (1, 2)]
        totals = write_parts(cut_parts(sources, 1), files.manifest, storage)
        files.write_record({"num_parts": totals.num_parts})
        for number, source in enumerate(sources):
            attempts = PartAttempts(root, number, storage)
            attempts.begin()
            result = ImageResult(source, 4, 4, error="broken" if number else "")
            files.commit(number, [result])
            attempts.end()
        assert files.list_committed() == {0, 1}
        assert files.merge(2).num_images == 1
        storage.write_bytes(files.success, b"")
    # More than one part of an upload.
    with storage.open_writer(join_uri(root, "detections.json")) as out:
        out.write(bytes(s3_objects.PART_BYTES + 1))
    with pytest.raises(ZeroDivisionError):
        break_off_an_upload(storage, join_uri(root, "x"))
    files.remove_all()


def break_off_an_upload(storage: Storage, uri: str) -> None:
    with storage.open_writer(uri) as out:
        out.write(bytes(s3_objects.PART_BYTES + 1))
        raise ZeroDivisionError


def test_run_policy_allows_a_whole_run(
    s3_bucket: str,
    s3_requests: list[Asked],
    load_policy: Callable[[str], Document],
    judge: Judge,
) -> None:
    bucket, prefix = split_s3_uri(s3_bucket)
    live_through_a_run(f"{s3_bucket}/monday")
    text = json.dumps(load_policy("s3-run-policy.json"))
    text = text.replace("RUN_BUCKET", bucket).replace("runs/*", f"{prefix}/*")
    policy = json.loads(text)
    assert {action for action, _, _ in s3_requests} == set(ACTIONS.values())
    refused = []
    for action, place, key in s3_requests:
        resource = f"arn:aws:s3:::{place}"
        if action == "s3:ListBucket":
            decision = judge(policy, action, resource, {"s3:prefix": key})
        else:
            decision = judge(policy, action, f"{resource}/{key}")
        if decision != "allow":
            refused.append((action, place, key))
    assert refused == []


def test_input_policy_allows_a_listing_of_ours(
    s3_bucket: str,
    s3_requests: list[Asked],
    load_policy: Callable[[str], Document],
    judge: Judge,
) -> None:
    bucket, prefix = split_s3_uri(s3_bucket)
    storage = Storage()
    storage.write_bytes(f"{s3_bucket}/photos/a.jpg", b"1")
    s3_requests.clear()
    for place in ("photos", "photos/"):
        (found,) = list_sources(f"{s3_bucket}/{place}", None, storage)
        assert storage.read_bytes(found.uri) == b"1"
    text = json.dumps(load_policy("s3-run-policy.json")).replace("INPUT_BUCKET", bucket)
    policy = json.loads(text.replace("photos/*", f"{prefix}/photos/*"))
    listed = {key.removeprefix(f"{prefix}/") for a, _, key in s3_requests if a.endswith("Bucket")}
    assert listed == {"photos", "photos/", "photos/a.jpg"}
    decisions = {
        key: judge(policy, "s3:ListBucket", f"arn:aws:s3:::{bucket}", {"s3:prefix": key})
        for key in (f"{prefix}/photos", f"{prefix}/photos/")
    }
    # A prefix without its slash could also be the beginning of another one: give the slash.
    assert list(decisions.values()) == ["none", "allow"]


@pytest.mark.parametrize(
    ("action", "resource", "context", "decision"),
    [
        ("s3:GetObject", f"{INPUT_BUCKET}/photos/a/b.jpg", {}, "allow"),
        ("s3:GetObject", f"{INPUT_BUCKET}/models/cells.onnx", {}, "allow"),
        ("s3:GetObject", f"{INPUT_BUCKET}/salaries.csv", {}, "none"),
        ("s3:PutObject", f"{INPUT_BUCKET}/photos/a.jpg", {}, "none"),
        ("s3:DeleteObject", f"{INPUT_BUCKET}/photos/a.jpg", {}, "none"),
        ("s3:ListBucket", INPUT_BUCKET, {"s3:prefix": "photos/"}, "allow"),
        ("s3:ListBucket", INPUT_BUCKET, {"s3:prefix": ""}, "none"),
        ("s3:ListBucket", INPUT_BUCKET, {}, "none"),
        ("s3:PutObject", f"{RUN_BUCKET}/runs/a/parts/part-000000000.jsonl", {}, "allow"),
        ("s3:DeleteObject", f"{RUN_BUCKET}/runs/a/attempts/part-000000000.json", {}, "allow"),
        ("s3:DeleteObject", f"{RUN_BUCKET}/archive/a.json", {}, "none"),
        ("s3:PutObject", f"{RUN_BUCKET}/index.html", {}, "none"),
        ("s3:ListBucket", RUN_BUCKET, {"s3:prefix": "runs/a/parts/"}, "allow"),
        ("s3:ListBucket", RUN_BUCKET, {"s3:prefix": "archive/"}, "none"),
        ("s3:DeleteBucket", RUN_BUCKET, {}, "none"),
        ("s3:PutBucketPolicy", RUN_BUCKET, {}, "none"),
        ("s3:GetObject", "arn:aws:s3:::OTHER_BUCKET/runs/a", {}, "none"),
        ("iam:PassRole", "arn:aws:iam::000000000000:role/retinaray-worker", {}, "none"),
    ],
)
def test_run_policy_decides(
    action: str,
    resource: str,
    context: dict[str, str],
    decision: str,
    load_policy: Callable[[str], Document],
    judge: Judge,
) -> None:
    assert judge(load_policy("s3-run-policy.json"), action, resource, context) == decision


ROLE = {"aws:PrincipalArn": "arn:aws:iam::000000000000:role/retinaray-worker"}
TLS = {"aws:SecureTransport": "true"}
KEY = "s3:x-amz-server-side-encryption"


@pytest.mark.parametrize(
    ("context", "decision"),
    [
        # Our writer sends no header: the bucket's own setting encrypts.
        (ROLE | TLS, "none"),
        (ROLE | {"aws:SecureTransport": "false"}, "deny"),
        (TLS | {"aws:PrincipalArn": "arn:aws:iam::000000000000:role/other"}, "deny"),
        (TLS | {"aws:PrincipalArn": "arn:aws:iam::000000000001:role/retinaray-worker"}, "deny"),
        (ROLE | TLS | {KEY: "aws:kms"}, "none"),
        (ROLE | TLS | {KEY: "none"}, "deny"),
        (ROLE | TLS | {f"{KEY}-customer-algorithm": "AES256"}, "deny"),
    ],
    ids=["worker", "no TLS", "other role", "other account", "kms", "no encryption", "own key"],
)
def test_bucket_policy_denies_what_is_not_ours(
    context: dict[str, str], decision: str, load_policy: Callable[[str], Document], judge: Judge
) -> None:
    document = load_policy("run-bucket-policy.json")
    assert judge(document, "s3:PutObject", f"{RUN_BUCKET}/runs/a", context) == decision
    # It grants nothing: that is the roles' own policies' task.
    assert {statement["Effect"] for statement in document["Statement"]} == {"Deny"}


EC2 = "arn:aws:ec2:us-east-1:000000000000:"
ROLES = "arn:aws:iam::000000000000:role/"
RUN = "ec2:RunInstances"
END = "ec2:TerminateInstances"
OURS = {"aws:ResourceTag/ray-cluster-name": "retinaray"}
TO_EC2 = {"iam:PassedToService": "ec2.amazonaws.com"}
NODE = {
    "aws:RequestTag/ray-cluster-name": "retinaray",
    "ec2:InstanceType": "g5.2xlarge",
    "ec2:MetadataHttpTokens": "required",
}


@pytest.mark.parametrize(
    ("action", "resource", "context", "decision"),
    [
        (RUN, f"{EC2}instance/*", NODE, "allow"),
        (RUN, f"{EC2}instance/*", NODE | {"ec2:InstanceType": "p5.48xlarge"}, "none"),
        (RUN, f"{EC2}instance/*", NODE | {"ec2:MetadataHttpTokens": "optional"}, "none"),
        (RUN, f"{EC2}volume/*", {"ec2:Encrypted": "true"}, "allow"),
        (RUN, f"{EC2}volume/*", {"ec2:Encrypted": "false"}, "none"),
        (RUN, f"{EC2}security-group/sg-00000000000000000", {}, "allow"),
        (RUN, f"{EC2}security-group/sg-11111111111111111", {}, "none"),
        (END, f"{EC2}instance/i-1", OURS, "allow"),
        (END, f"{EC2}instance/i-1", {}, "none"),
        ("ec2:DescribeInstances", "*", {"aws:RequestedRegion": "us-east-1"}, "allow"),
        ("iam:PassRole", f"{ROLES}retinaray-worker", TO_EC2, "allow"),
        ("iam:PassRole", f"{ROLES}Admin", TO_EC2, "none"),
        ("s3:GetObject", f"{RUN_BUCKET}/runs/a", {}, "none"),
    ],
)
def test_head_policy_decides(
    action: str,
    resource: str,
    context: dict[str, str],
    decision: str,
    load_policy: Callable[[str], Document],
    judge: Judge,
) -> None:
    assert judge(load_policy("head-autoscaler-policy.json"), action, resource, context) == decision


def test_pods_of_our_service_accounts_alone_take_the_role(
    load_policy: Callable[[str], Document],
    judge: Judge,
    load_kuberay: Callable[[str], list[Document]],
) -> None:
    document = load_policy("trust-irsa.json")
    (key,) = [
        k for k in document["Statement"][0]["Condition"]["StringEquals"] if k.endswith(":sub")
    ]
    accounts = [one for one in load_kuberay("access.yaml") if one["kind"] == "ServiceAccount"]
    audience = {key.replace(":sub", ":aud"): "sts.amazonaws.com"}
    names = [f"{one['metadata']['namespace']}:{one['metadata']['name']}" for one in accounts]
    for name, decision in [*((name, "allow") for name in names), ("default:default", "none")]:
        context = audience | {key: f"system:serviceaccount:{name}"}
        assert judge(document, "sts:AssumeRoleWithWebIdentity", "*", context) == decision


@pytest.mark.parametrize(
    ("context", "decision"),
    [({"k": "abc"}, "allow"), ({"k": "xbc"}, "none"), ({}, "none")],
)
def test_judge_takes_an_absent_key_for_a_failed_condition(
    context: dict[str, str], decision: str, judge: Judge
) -> None:
    grant = {
        "Effect": "Allow",
        "Action": "s3:*",
        "Resource": "*",
        "Condition": {"StringLike": {"k": "a*"}},
    }
    assert judge({"Statement": [grant]}, "s3:GetObject", "arn", context) == decision
    denial = {"Effect": "Deny", "Action": "s3:GetObject", "Resource": "*"}
    assert judge({"Statement": [grant, denial]}, "s3:GetObject", "arn", context) == "deny"
