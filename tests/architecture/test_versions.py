"""One version everywhere; a lock file that fits pyproject.toml and tells nothing of the machine."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

RequirementsOf = Callable[[str], list[Requirement]]

# What `make` and the image install; the other extras need hardware that not every machine has.
LOCKED_EXTRAS = ("", "dev")


class LockError(Exception):
    """A line of requirements.lock is no exact pin."""


def read_lock(text: str) -> dict[str, Version]:
    """Normalised name and exact version of every pin; comments and `--hash` are passed over.

    The same package may come twice with disjoint markers, if the version is the same.
    """
    pins: dict[str, Version] = {}
    for line in text.replace("\\\n", " ").splitlines():
        content = re.sub(r"(^|\s)#.*", "", line)
        content = re.sub(r"\s--hash=sha256:[0-9a-f]{64}\b", "", content).strip()
        if not content:
            continue
        if content.startswith("-") or "/" in content or "@" in content:
            raise LockError(f"expected name==version, found an option, address or path: {line!r}")
        try:
            requirement = Requirement(content)
        except InvalidRequirement as error:
            raise LockError(f"expected name==version, found {line!r}: {error}") from error
        exact = re.fullmatch(r"===?([^*,]+)", str(requirement.specifier))
        if exact is None:
            raise LockError(f"expected one exact version with ==, found {line!r}")
        name, version = str(canonicalize_name(requirement.name)), Version(exact[1])
        if pins.setdefault(name, version) != version:
            raise LockError(f"{name} is pinned to {pins[name]} and to {version}")
    return pins


def needs_of(name: str, extras: set[str]) -> list[Requirement]:
    """What an installed distribution requires here with the extras named."""
    try:
        lines = requires(name) or []
    except PackageNotFoundError:
        pytest.fail(f"{name} of requirements.lock is not installed: make install")
    return [
        requirement
        for requirement in map(Requirement, lines)
        if requirement.marker is None
        or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    ]


def newest_entry(changelog: str) -> str:
    """Version of the first dated entry of a changelog in the form of Keep a Changelog."""
    found = re.search(r"^## \[?(\d[^\]\s]*)\]?.*\d{4}-\d\d-\d\d", changelog, re.MULTILINE)
    return found[1] if found else "no entry `## [1.2.3] - 2026-01-31`"


def read_required(repository: Path, name: str) -> str:
    path = repository / name
    if not path.is_file():
        pytest.fail(f"{name}: expected at the root of the repository, found no file")
    return path.read_text("utf-8")


@pytest.fixture
def lock(repository: Path) -> dict[str, Version]:
    """The pins of requirements.lock."""
    return read_lock(read_required(repository, "requirements.lock"))


def test_version_is_the_same_in_pyproject_and_package(
    pyproject: dict[str, Any], package_trees: dict[str, ast.Module]
) -> None:
    values = {
        ast.unparse(node.targets[0]): ast.literal_eval(node.value)
        for node in package_trees["__init__.py"].body
        if isinstance(node, ast.Assign)
    }
    assert values["__version__"] == pyproject["project"]["version"]


def test_newest_changelog_entry_is_the_version(repository: Path, pyproject: dict[str, Any]) -> None:
    changelog = read_required(repository, "CHANGELOG.md")
    assert newest_entry(changelog) == pyproject["project"]["version"]


@pytest.mark.parametrize("extra", LOCKED_EXTRAS, ids=lambda extra: extra or "core")
def test_lock_pins_every_dependency(
    extra: str, lock: dict[str, Version], requirements_of: RequirementsOf
) -> None:
    names = {str(canonicalize_name(requirement.name)) for requirement in requirements_of(extra)}
    missing = sorted(names - set(lock))
    assert not missing, f"requirements.lock lacks {missing}: lock again"


def test_lock_satisfies_pyproject(
    lock: dict[str, Version], pyproject: dict[str, Any], requirements_of: RequirementsOf
) -> None:
    faults = [
        f"{requirement.name}=={lock[name]} is outside {requirement.specifier}"
        for extra in ("", *pyproject["project"]["optional-dependencies"])
        for requirement in requirements_of(extra)
        if (name := str(canonicalize_name(requirement.name))) in lock
        and not requirement.specifier.contains(lock[name], prereleases=True)
    ]
    assert not faults, "requirements.lock: " + "; ".join(faults)


def test_lock_pins_whatever_its_pins_need(
    lock: dict[str, Version], requirements_of: RequirementsOf
) -> None:
    # `make install` resolves nothing: a package that only another machine happened to hold shows
    # first as an import that fails in a fresh environment.
    extras: dict[str, set[str]] = {}
    for requirement in (need for extra in LOCKED_EXTRAS for need in requirements_of(extra)):
        name = str(canonicalize_name(requirement.name))
        extras.setdefault(name, set()).update(requirement.extras)
    lacking = [
        f"{name} needs {requirement.name}"
        for name in lock
        for requirement in needs_of(name, extras.get(name, set()))
        if str(canonicalize_name(requirement.name)) not in lock
    ]
    assert not lacking, "requirements.lock: " + "; ".join(lacking)


def test_lock_names_no_address_and_no_path(repository: Path) -> None:
    text = read_required(repository, "requirements.lock")
    # Comments count too: lockers write the command line, with its index, into the head.
    found = [line for line in text.splitlines() if re.search(r"://|--index|--find-links|/\w", line)]
    assert not found, f"requirements.lock names an address or a path: {found[:5]}"


def test_read_lock_reads_pins_with_hashes_and_markers() -> None:
    digest = "0" * 64
    text = f"""# locked
torch==2.14.1+cpu
ray[data,train]==2.60.0 ; python_version >= "3.11"  # via retinaray
Typing_Extensions==4.15.0 \\
    --hash=sha256:{digest} \\
    --hash=sha256:{digest}
"""
    assert read_lock(text) == {
        "torch": Version("2.14.1+cpu"),
        "ray": Version("2.60.0"),
        "typing-extensions": Version("4.15.0"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torch>=2.14", "one exact version"),
        ("torch", "one exact version"),
        ("torch==2.14.*", "one exact version"),
        ("torch==2.14.1,!=2.15", "one exact version"),
        ("torch==2.14.1\nTorch==2.14.0", "pinned to 2.14.1 and to 2.14.0"),
        ("--extra-index-url https://example.org\ntorch==2.14.1", "an option, address or path"),
        ("torch @ https://example.org/torch.whl", "an option, address or path"),
        ("-e .", "an option, address or path"),
        ("./torch.whl", "an option, address or path"),
        ("torch = 2.14.1", "expected name==version"),
    ],
)
def test_read_lock_refuses_what_is_no_pin(text: str, message: str) -> None:
    with pytest.raises(LockError, match=message):
        read_lock(text)


@pytest.mark.parametrize(
    ("changelog", "expected"),
    [
        (
            "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-11-01\n\n## [0.1.0] - 2026-10-01",
            "0.2.0",
        ),
        ("## 1.0.0rc1 (2026-01-31)\n", "1.0.0rc1"),
        ("## [Unreleased]\n", "no entry `## [1.2.3] - 2026-01-31`"),
    ],
    ids=["keep-a-changelog", "plain", "none"],
)
def test_newest_entry_is_the_first_dated_one(changelog: str, expected: str) -> None:
    assert newest_entry(changelog) == expected
