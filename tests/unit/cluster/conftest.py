from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[3]

# The definitions have 30,000 lines; libyaml reads them in a tenth of the time, where there is one.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# Document of a policy, action, resource, context -> "allow", "deny" (explicit) or "none".
Judge = Callable[..., str]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder with pyproject.toml."""
    return REPOSITORY


@pytest.fixture
def ray_cluster() -> dict[str, Any]:
    """ray_cluster.yaml as it is."""
    content: dict[str, Any] = yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text("utf-8"))
    return content


@pytest.fixture
def load_kuberay() -> Callable[[str], list[dict[str, Any]]]:
    """The documents of a file below cluster/kuberay, by its name."""

    def load(name: str) -> list[dict[str, Any]]:
        text = (REPOSITORY / "cluster" / "kuberay" / name).read_text("utf-8")
        return list(yaml.safe_load_all(text))

    return load


@pytest.fixture(scope="session")
def kuberay_schemas() -> dict[str, dict[str, Any]]:
    """KubeRay's v1 schemas by kind, made strict: unknown keys are faults."""
    folder = REPOSITORY.parent / "shared" / "facts" / "kuberay"
    if not folder.is_dir():
        pytest.skip(f"needs KubeRay's resource definitions in {folder}, which is absent")
    schemas = {}
    for path in sorted(folder.glob("*.yaml")):
        definition = yaml.load(path.read_text("utf-8"), _LOADER)["spec"]
        (version,) = [one for one in definition["versions"] if one["name"] == "v1"]
        schemas[definition["names"]["kind"]] = _harden(version["schema"]["openAPIV3Schema"])
    return schemas


def _harden(schema: Any) -> Any:
    """JSON schema as the API server understands it, but refusing what it would drop silently."""
    if isinstance(schema, list):
        return [_harden(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    hard = {
        # Names of properties are no keywords, even where they are called "type" or "format".
        key: {name: _harden(one) for name, one in value.items()}
        if key == "properties"
        else _harden(value)
        for key, value in schema.items()
    }
    if hard.pop("x-kubernetes-int-or-string", False):
        hard.pop("anyOf", None)
        hard["type"] = ["integer", "string"]
    if (
        "properties" in hard
        and "additionalProperties" not in hard
        and not hard.get("x-kubernetes-preserve-unknown-fields")
    ):
        hard["additionalProperties"] = False
    return hard


@pytest.fixture
def load_policy() -> Callable[[str], dict[str, Any]]:
    """A document below cluster/iam, by its name."""

    def load(name: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((REPOSITORY / "cluster" / "iam" / name).read_bytes())
        return document

    return load


@pytest.fixture
def judge() -> Judge:
    """What one policy says to a request, by IAM's rules: an explicit denial wins."""

    def decide(
        document: Mapping[str, Any],
        action: str,
        resource: str,
        context: Mapping[str, str] | None = None,
    ) -> str:
        found = "none"
        for statement in document["Statement"]:
            if (
                _matches_any(statement["Action"], action)
                and _matches_any(statement.get("Resource", "*"), resource)
                and _holds(statement.get("Condition", {}), context or {})
            ):
                if statement["Effect"] == "Deny":
                    return "deny"
                found = "allow"
        return found

    return decide


def _list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def _matches_any(patterns: Any, value: str) -> bool:
    for pattern in _list(patterns):
        expression = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
        if re.fullmatch(expression, value, re.DOTALL):
            return True
    return False


def _holds(conditions: Mapping[str, Mapping[str, Any]], context: Mapping[str, str]) -> bool:
    """All operators and keys must hold; an absent key fails all but the negated ones and Null."""
    return all(
        _test(operator, _list(wanted), context.get(key))
        for operator, tests in conditions.items()
        for key, wanted in tests.items()
    )


def _test(operator: str, wanted: list[str], value: str | None) -> bool:
    if operator == "Null":
        return (value is None) == (wanted == ["true"])
    is_negated = "Not" in operator
    kind = operator.replace("Not", "")
    if value is None:
        return is_negated
    if kind in ("StringEquals", "Bool"):
        return (value in wanted) != is_negated
    if kind in ("StringLike", "ArnEquals", "ArnLike"):
        return _matches_any(wanted, value) != is_negated
    raise NotImplementedError(f"expected an operator that the tests know, got {operator}")


@pytest.fixture
def walk() -> Callable[[Any], Iterator[tuple[str, Any]]]:
    """Every key with its value in nested mappings and lists."""
    return _walk


def _walk(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield key, value
            yield from _walk(value)
    elif isinstance(node, list):
        for item in node:
            yield from _walk(item)
