"""Every exception of the package survives the way between two processes, message included."""

from __future__ import annotations

import ast
import builtins
import pickle

import pytest

import retinaray.errors
import retinaray.storage

# Modules whose exception classes are loaded above; all others would load torch or ray.
LOADED = f"{retinaray.errors.__name__} or {retinaray.storage.__name__}"
MESSAGE = "expected 3, got 4 in images[17]: \u00e9, 'quoted'\nsecond line"
# Arguments of classes whose constructor takes something else than one message.
ARGUMENTS: dict[str, tuple[object, ...]] = {}


def list_classes(root: type[Exception]) -> list[type[Exception]]:
    """A class and all classes derived from it that are loaded."""
    return [root, *(inner for child in root.__subclasses__() for inner in list_classes(child))]


def find_exception_classes(trees: dict[str, ast.Module]) -> dict[str, str]:
    """Name and file of every class whose bases lead to an exception."""
    bases = {
        node.name: (path, {ast.unparse(base).split(".")[-1] for base in node.bases})
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    known = {name for name, value in vars(builtins).items() if _is_exception(value)}
    found: dict[str, str] = {}
    while fresh := {
        name: path
        for name, (path, names) in bases.items()
        if name not in found and names & (known | set(found))
    }:
        found |= fresh
    return found


def _is_exception(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


CLASSES = sorted(list_classes(retinaray.errors.RetinarayError), key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_exception_keeps_type_and_message_when_pickled(cls: type[Exception], protocol: int) -> None:
    error = cls(*ARGUMENTS.get(cls.__name__, (MESSAGE,)))
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is cls
    assert str(copy) == str(error)
    assert MESSAGE in str(copy)
    assert vars(copy) == vars(error)


def test_every_exception_class_is_tested_here(package_trees: dict[str, ast.Module]) -> None:
    found = find_exception_classes(package_trees)
    assert set(found) == {cls.__name__ for cls in CLASSES}, (
        f"expected classes derived from RetinarayError that {LOADED} loads, found {found}"
    )


def test_every_exception_has_one_root(package_trees: dict[str, ast.Module]) -> None:
    assert retinaray.errors.RetinarayError.__bases__ == (Exception,)
    in_file = {name for name, path in find_exception_classes(package_trees).items()
               if path == "errors.py"}  # fmt: skip
    assert in_file == {cls.__name__ for cls in CLASSES if cls.__module__ == "retinaray.errors"}


def test_find_exception_classes_follows_bases_over_files() -> None:
    trees = {
        "a.py": ast.parse("class A(errors.B): ...\nclass Plain: ..."),
        "b.py": ast.parse("class B(ValueError): ...\nclass Box(Plain): ..."),
    }
    assert find_exception_classes(trees) == {"A": "a.py", "B": "b.py"}
