"""cluster/kuberay: accepted by KubeRay's schemas made strict, closed, alike where they must be."""

from __future__ import annotations

import copy
import importlib
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from retinaray.config.loading import load_from_argv
from retinaray.config.schema import InferJob, TrainJob, TuneJob
from retinaray.errors import ConfigError

Document = dict[str, Any]

RAY_FILES = ("raycluster.yaml", "rayjob-train.yaml", "rayjob-tune.yaml", "rayjob-infer.yaml")
JOB_CLASSES = {"train": TrainJob, "tune": TuneJob, "infer": InferJob}


def list_faults(schemas: Mapping[str, Document], document: Document) -> list[str]:
    """What the API server would refuse or drop, with the place of each."""
    validator = Draft7Validator(schemas[document["kind"]])
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"
        for error in validator.iter_errors(document)
    ]


def cluster_of(document: Document) -> Document:
    spec: Document = document["spec"]
    found: Document = spec if document["kind"] == "RayCluster" else spec["rayClusterSpec"]
    return found


def list_pods(document: Document) -> Iterator[tuple[str, Document]]:
    """Every pod that a file makes, by name."""
    cluster = cluster_of(document)
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]
    if document["kind"] == "RayJob":
        yield "submitter", document["spec"]["submitterPodTemplate"]["spec"]


@pytest.fixture(params=RAY_FILES)
def document(
    request: pytest.FixtureRequest, load_kuberay: Callable[[str], list[Document]]
) -> Document:
    """The one document of each file."""
    (found,) = load_kuberay(request.param)
    return found


def test_files_are_all_that_there_are(repository: Path) -> None:
    found = {path.name for path in (repository / "cluster" / "kuberay").iterdir()}
    assert found == {*RAY_FILES, "access.yaml"}


def test_document_is_accepted(document: Document, kuberay_schemas: dict[str, Document]) -> None:
    assert list_faults(kuberay_schemas, document) == []


def put(node: Any, path: str, value: Any) -> None:
    *way, last = path.split(".")
    for key in way:
        node = node[int(key) if key.isdecimal() else key]
    if value is None:
        del node[last]
    else:
        node[last] = value


HEAD_POD = "spec.rayClusterSpec.headGroupSpec.template.spec"
GROUP = "spec.rayClusterSpec.workerGroupSpecs.0"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("spec.entryPoint", "retinaray", "'entryPoint' was unexpected"),
        (f"{GROUP}.maxReplicas", "4", "'4' is not of type 'integer'"),
        (f"{GROUP}.groupName", None, "'groupName' is a required property"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0, "0 is not of type"),
        (f"{HEAD_POD}.containers.0.imagePullPolcy", "Always", "'imagePullPolcy' was unexpected"),
        (f"{HEAD_POD}.securityContext.runAsNonroot", True, "'runAsNonroot' was unexpected"),
        (f"{HEAD_POD}.containers.0.securityContext.capabilities.drop", "ALL", "not of type 'arr"),
        (f"{GROUP}.template.spec.tolerations.0.operater", "Exists", "'operater' was unexpected"),
        (f"{HEAD_POD}.containers.0.livenessProbe.httpGet.port", None, "'port' is a required"),
        ("spec.rayClusterSpec.authOptions.mode", "tokens", "is not one of ['disabled', 'token']"),
        ("spec.submissionMode", 1, "1 is not of type 'string'"),
        (f"{HEAD_POD}.volumes.0.emptyDir.medum", "Memory", "'medum' was unexpected"),
    ],
)
def test_document_is_refused_when_misspelt(
    path: str,
    value: Any,
    message: str,
    load_kuberay: Callable[[str], list[Document]],
    kuberay_schemas: dict[str, Document],
) -> None:
    (job,) = load_kuberay("rayjob-infer.yaml")
    put(job, path, value)
    faults = list_faults(kuberay_schemas, job)
    assert len(faults) == 1
    assert message in faults[0]


def test_schema_takes_numbers_and_texts_for_ports_and_quantities(
    load_kuberay: Callable[[str], list[Document]], kuberay_schemas: dict[str, Document]
) -> None:
    (job,) = load_kuberay("rayjob-infer.yaml")
    for port in (8265, "dashboard"):
        put(job, f"{HEAD_POD}.containers.0.livenessProbe.httpGet.port", port)
        assert list_faults(kuberay_schemas, job) == []
    put(job, f"{HEAD_POD}.containers.0.livenessProbe.httpGet.port", 8265.5)
    assert len(list_faults(kuberay_schemas, job)) == 1


def test_pods_run_as_nobody_special(document: Document) -> None:
    for name, pod in list_pods(document):
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert context["runAsUser"] > 0, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), name
        assert not [volume for volume in pod["volumes"] if "hostPath" in volume], name
    containers = [c for _, pod in list_pods(document) for c in pod["containers"]]
    for container in [*containers, cluster_of(document)["autoscalerOptions"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_containers_ask_for_what_they_may_use(document: Document) -> None:
    for name, pod in list_pods(document):
        for container in pod["containers"]:
            resources = container["resources"]
            assert resources["requests"] == resources["limits"], name
            assert {"cpu", "memory"} <= set(resources["limits"]), name


def test_containers_can_write_where_ray_writes(document: Document) -> None:
    for name, pod in list_pods(document):
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) <= volumes, name
            home = {e["name"]: e.get("value") for e in container["env"]}["HOME"]
            assert {"/tmp", home} <= set(mounts), name
            assert name == "submitter" or "/dev/shm" in mounts, name


def test_object_stores_fit_into_their_volume(document: Document) -> None:
    cluster = cluster_of(document)
    groups = {"head": cluster["headGroupSpec"]}
    groups |= {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    for name, pod in list_pods(document):
        if name == "submitter":
            continue
        (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "shm"]
        assert volume["emptyDir"]["medium"] == "Memory"
        limit = int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi")) * 2**30
        store = int(groups[name]["rayStartParams"]["object-store-memory"])
        assert 0.8 * limit < store < limit, name


def test_gpu_groups_go_to_gpu_nodes(document: Document) -> None:
    for name, pod in list_pods(document):
        has_gpu = "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
        assert has_gpu == name.startswith("gpu"), name
        tolerated = [toleration["key"] for toleration in pod.get("tolerations", [])]
        assert tolerated == ["nvidia.com/gpu"] * has_gpu, name
        is_spot = pod.get("nodeSelector") == {"eks.amazonaws.com/capacityType": "SPOT"}
        assert is_spot == name.endswith("spot"), name


def test_clusters_ask_for_a_token_and_grow_by_themselves(document: Document) -> None:
    cluster = cluster_of(document)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] <= group["maxReplicas"]


def test_versions_are_those_of_the_lock_file(document: Document, repository: Path) -> None:
    lock = (repository / "requirements.lock").read_text("utf-8").splitlines()
    assert f"ray=={cluster_of(document)['rayVersion']}" in lock
    version = importlib.import_module("importlib.metadata").version("retinaray")
    images = {c["image"] for _, pod in list_pods(document) for c in pod["containers"]}
    assert images == {f"REGISTRY/retinaray:{version}"}


@pytest.mark.parametrize("name", RAY_FILES[1:])
def test_pods_of_jobs_are_those_of_the_cluster(
    name: str, load_kuberay: Callable[[str], list[Document]]
) -> None:
    # The reasons stand in one file only, so the others must not drift from it.
    (cluster,), (job,) = load_kuberay(RAY_FILES[0]), load_kuberay(name)
    expected = dict(list_pods(cluster))
    found = {key: pod for key, pod in list_pods(job) if key != "submitter"}
    assert found == {key: expected[key] for key in found}
    for key in ("authOptions", "autoscalerOptions", "rayVersion"):
        assert cluster_of(job)[key] == cluster_of(cluster)[key]


@pytest.mark.parametrize("verb", JOB_CLASSES)
def test_entrypoints_are_commands_of_ours(
    verb: str,
    load_kuberay: Callable[[str], list[Document]],
    repository: Path,
) -> None:
    (job,) = load_kuberay(f"rayjob-{verb}.yaml")
    program, found_verb, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (program, found_verb) == ("retinaray", verb)
    arguments = [text.replace("/opt/retinaray", str(repository)) for text in arguments]
    settings = load_from_argv(JOB_CLASSES[verb], arguments)
    pods = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    gpus = sum(group["replicas"] for group in pods)
    workers = settings.workers if verb == "infer" else settings.run.workers
    assert 1 <= workers <= gpus
    with pytest.raises(ConfigError, match="no-such-flag"):
        load_from_argv(JOB_CLASSES[verb], [*arguments, "--no-such-flag", "1"])


def test_jobs_end_with_their_cluster(load_kuberay: Callable[[str], list[Document]]) -> None:
    for name in RAY_FILES[1:]:
        spec = load_kuberay(name)[0]["spec"]
        assert spec["shutdownAfterJobFinishes"] is True
        # The time that a finished job keeps its GPUs.
        assert spec["ttlSecondsAfterFinished"] <= 300
        assert spec["activeDeadlineSeconds"] > 0
        assert spec["backoffLimit"] >= 1


def may_reach(policy: Document, namespace: Mapping[str, str], pod: Mapping[str, str]) -> set[int]:
    """TCP ports that a pod of a namespace reaches; -1 stands for all of them."""
    own = {"kubernetes.io/metadata.name": "retinaray"}
    ports: set[int] = set()
    for rule in policy["spec"]["ingress"]:
        for peer in rule["from"]:
            wanted = peer.get("namespaceSelector", {}).get("matchLabels", own)
            labels = peer.get("podSelector", {}).get("matchLabels", {})
            if wanted.items() <= namespace.items() and labels.items() <= pod.items():
                ports |= {port["port"] for port in rule.get("ports", [{"port": -1}])}
    return ports


@pytest.fixture
def access(load_kuberay: Callable[[str], list[Document]]) -> dict[str, list[Document]]:
    """The documents of access.yaml by kind."""
    found: dict[str, list[Document]] = {}
    for one in load_kuberay("access.yaml"):
        found.setdefault(one["kind"], []).append(one)
    return found


@pytest.mark.parametrize(
    ("namespace", "pod", "ports"),
    [
        ("retinaray", {}, {-1}),
        ("kuberay-operator", {"app.kubernetes.io/name": "kuberay"}, {8265}),
        ("kuberay-operator", {"app.kubernetes.io/name": "other"}, set()),
        ("monitoring", {}, {8080}),
        ("default", {"app.kubernetes.io/name": "kuberay"}, set()),
    ],
)
def test_network_policy_closes_ray_to_strangers(
    namespace: str, pod: dict[str, str], ports: set[int], access: dict[str, list[Document]]
) -> None:
    (policy,) = access["NetworkPolicy"]
    assert policy["spec"]["podSelector"] == {}
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert may_reach(policy, {"kubernetes.io/metadata.name": namespace}, pod) == ports
    assert not [
        peer for rule in policy["spec"]["ingress"] for peer in rule["from"] if "ipBlock" in peer
    ]


def test_network_policy_keeps_pods_from_the_nodes_metadata(
    access: dict[str, list[Document]],
) -> None:
    egress = access["NetworkPolicy"][0]["spec"]["egress"]
    open_rules = [rule for rule in egress for peer in rule["to"] if "ipBlock" in peer]
    assert len(open_rules) == 1
    assert open_rules[0]["to"][0]["ipBlock"]["except"] == ["169.254.169.254/32"]
    assert {port["port"] for port in open_rules[0]["ports"]} == {443, 6443}


def test_access_names_what_the_pods_use(
    access: dict[str, list[Document]], document: Document
) -> None:
    accounts = {account["metadata"]["name"]: account for account in access["ServiceAccount"]}
    claims = {claim["metadata"]["name"]: claim for claim in access["PersistentVolumeClaim"]}
    for name, pod in list_pods(document):
        account = accounts[pod["serviceAccountName"]]
        assert account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"], name
        assert (name == "head") == (pod["serviceAccountName"] == "retinaray-head")
        assert name == "head" or pod["automountServiceAccountToken"] is False
        for volume in pod["volumes"]:
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            assert claim is None or claims[claim]["spec"]["accessModes"] == ["ReadWriteMany"]
    everything = [document, *(one for found in access.values() for one in found)]
    spaces = {one["metadata"].get("namespace", one["metadata"]["name"]) for one in everything}
    assert spaces == {"retinaray"}
    labels = access["Namespace"][0]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_harden_refuses_an_unknown_key_where_the_schema_lists_keys(
    kuberay_schemas: dict[str, Document], load_kuberay: Callable[[str], list[Document]]
) -> None:
    (job,) = load_kuberay("rayjob-train.yaml")
    broken = copy.deepcopy(job)
    broken["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["gpus"] = 1
    assert list_faults(kuberay_schemas, job) == []
    assert ["'gpus' was unexpected" in fault for fault in list_faults(kuberay_schemas, broken)] == [
        True
    ]
