"""Nothing that is read can run code: no pickle, no YAML objects, no eval, nowhere in the package.

Ray sends pickles between its own processes; none of them is read from a file or an object.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

# Modules whose readers run what they read; they write nothing that we need either.
PICKLERS = frozenset(
    ["pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"]
)
# By the last name of the call, whatever the module is called where it is imported.
READERS = frozenset(
    [
        "read_pickle",
        "unsafe_load",
        "unsafe_load_all",
        "full_load",
        "full_load_all",
        "set_auto_load",
        "load_module",
    ]
)
BUILTINS = frozenset(["eval", "exec", "compile", "__import__"])
YAML_LOADERS = ("SafeLoader", "CSafeLoader")


def find_unsafe_reads(tree: ast.Module) -> list[str]:
    """One sentence per import or call that could run what it reads."""
    modules = _name_modules(tree)
    return [
        f"line {node.lineno}: {fault}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Call)
        for fault in _judge(node, modules)
    ]


def _name_modules(tree: ast.Module) -> dict[str, str]:
    """What names mean that imports gave: `np` numpy, `load` torch.load."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _judge(node: ast.Import | ast.ImportFrom | ast.Call, modules: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Call):
        yield from _judge_call(node, modules)
        return
    imported = [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        imported = [f"{node.module}.{name}" for name in imported]
    for name in imported:
        if PICKLERS & set(name.split(".")):
            yield f"imports {name}"


def _judge_call(call: ast.Call, modules: dict[str, str]) -> Iterator[str]:
    written = ast.unparse(call.func)
    first, dot, rest = written.partition(".")
    name = modules.get(first, first) + dot + rest
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name in BUILTINS:
        yield f"calls {name}"
    if name.rpartition(".")[2] in READERS:
        yield f"calls {name}"
    if options.get("allow_pickle", "False") != "False":
        yield f"{name} with allow_pickle={options['allow_pickle']}"
    if name in ("torch.load", "torch.serialization.load") and options.get("weights_only") != "True":
        yield f"{name} without weights_only=True"
    if name.endswith((".get_state_dict", "load_state_dict_from_url")):
        yield f"calls {name}, which unpickles what lies in the folder of downloads"
    if name in ("torch.jit.load", "torch.package.PackageImporter", "torch.hub.load"):
        yield f"calls {name}, which runs code from the file"
    if name in ("yaml.load", "yaml.load_all"):
        loader = options.get("Loader") or (ast.unparse(call.args[1]) if len(call.args) > 1 else "")
        if loader.rpartition(".")[2] not in YAML_LOADERS:
            yield f"{name} with {loader or 'no loader'}"
    if name.startswith("yaml.") and name.endswith("Loader") and name[5:] not in YAML_LOADERS:
        yield f"calls {name}"


def test_package_reads_nothing_that_could_run_code(package_trees: dict[str, ast.Module]) -> None:
    assert len(package_trees) > 100
    faults = [
        f"{path}: {fault}"
        for path, tree in package_trees.items()
        for fault in find_unsafe_reads(tree)
    ]
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import pickle", "imports pickle"),
        ("def f():\n    from ray import cloudpickle", "imports ray.cloudpickle"),
        ("from joblib import load", "imports joblib.load"),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "numpy.load with allow_pickle=True"),
        ("import numpy as np\nnp.load(f, allow_pickle=flag)", "allow_pickle=flag"),
        ("import torch\ntorch.load(f)", "torch.load without weights_only=True"),
        ("import torch as t\nt.load(f, weights_only=False)", "torch.load without"),
        ("from torch import load as get\nget(f, weights_only=flag)", "torch.load without"),
        ("import torch\ntorch.jit.load(f)", "torch.jit.load"),
        ("weights.get_state_dict(progress=False)", "unpickles what lies in"),
        (
            "from torch.hub import load_state_dict_from_url\nload_state_dict_from_url(u)",
            "torch.hub",
        ),
        ("import yaml\nyaml.load(f, yaml.Loader)", "yaml.load with yaml.Loader"),
        ("import yaml\nyaml.load(f)", "yaml.load with no loader"),
        ("import yaml\nyaml.Loader(f)", "calls yaml.Loader"),
        ("import yaml\nyaml.unsafe_load(f)", "calls yaml.unsafe_load"),
        ("import pandas as pd\npd.read_pickle(f)", "calls pandas.read_pickle"),
        ("eval(text)", "calls eval"),
        ("exec(text)", "calls exec"),
        ("compile(text, '', 'exec')", "calls compile"),
        ("import pyarrow as pa\npa.PyExtensionType.set_auto_load(True)", "set_auto_load"),
    ],
)
def test_find_unsafe_reads_finds_each_way(source: str, fault: str) -> None:
    faults = find_unsafe_reads(ast.parse(source))
    assert len(faults) == 1
    assert fault in faults[0]


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import re\nre.compile(text)",
        "import torch\ntorch.load(f, weights_only=True)",
        "import yaml\nyaml.safe_load(f)\nyaml.SafeLoader(f)",
        "import yaml\nyaml.load(f, Loader=yaml.CSafeLoader)",
        "import numpy as np\nnp.load(f, allow_pickle=False)\nnp.load(f)",
        "import json\njson.load(f)",
    ],
)
def test_find_unsafe_reads_passes_what_is_safe(source: str) -> None:
    assert find_unsafe_reads(ast.parse(source)) == []
