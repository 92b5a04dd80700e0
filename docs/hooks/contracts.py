"""Reference pages made from docstrings: the JSON line of each command, and what files hold.

A hook of MkDocs. The sources are read, never imported: they would bring torch and ray.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cell_text import escape
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from retinaray.cli import VERBS

# Heading, module whose docstring introduces it, classes whose attributes are listed.
_FORMATS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("The model card", "artifact", ("ModelCard", "Architecture")),
    ("Anchors in the card", "detector.anchors", ("AnchorSpec",)),
    ("Beside an engine", "inference.plan_sidecar", ("PlanSidecar", "GpuInfo")),
    ("Checkpoints", "training.checkpoint_files", ("CheckpointManifest", "FileDigest")),
    ("The manifest of a run", "inference.manifest", ("Part",)),
    ("Parts of a run", "inference.run_files", ()),
    ("Merged results", "inference.output_formats", ()),
    ("Images of a run", "inference.image_sources", ("ImageSource", "TarMember", "ImageResult")),
    ("Scores", "evaluation.coco_map", ("CocoScores", "ClassScores")),
)
# Keys that are no attribute of the class which writes them.
SUPPLEMENT: dict[str, dict[str, str]] = {
    "AnchorsOutcome": {
        "all": "Coverage of all boxes: their count, and shares by what an anchor reaches.",
        "by_class": "The same for each class.",
        "by_size": "The same for small, medium and large boxes, as COCO has them.",
        "by_ratio": "The same by height over width.",
        "anchors_per_image": "Anchors on the canvas.",
        "head_gflops": "What both heads cost per image.",
        "unmatched": "Boxes without any anchor of their own; null for very large sets.",
    },
    "ConvertOutcome": {
        "images": "Images that were converted.",
        "boxes": "Boxes that were converted.",
        "classes": "Class names in their order.",
    },
    "DoctorReport": {"is_clean": "Whether there are no errors; warnings may be there."},
    "EvaluateOutcome": {
        "operating_points": "By class, what the thresholds stored in the model give: precision, "
        "recall, F1; empty when they are no more than the floor of a trained model.",
    },
    "InferOutcome": {"exit_code": "0; 1 when not a single image could be processed."},
    "ParityResult": {
        "passed": "Whether every row passed, and no runtime that is here refused a file.",
        "references": "What torch found, for each canvas.",
        "rows": "One per file, runtime and precision: differences, AP, latency, and `passed`.",
        "not_run": "Cases that could not be compared here, and why.",
    },
    "PlanSheet": {
        "fits": "Whether nothing is missing.",
        "estimates": "Names of the figures that are estimated.",
        "notes": "What a figure rests on, by its name.",
    },
    "ThresholdsOutcome": {
        "AP": "On the validation images, with the chosen suppression.",
        "num_errors": "Validation images that could not be read.",
        "classes": "The operating point of each class: threshold, precision, recall, F1.",
    },
}
_KNOWN_MAPPINGS = {
    "summary": (
        *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
        *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
    )
}
_SERIALIZERS = ("asdict", "vars")
Node = TypeVar("Node", ast.ClassDef, ast.FunctionDef)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    root = Path(config.config_file_path).parent
    readme = (root / "README.md").read_text("utf-8")
    sources = Sources(root / "platform")
    pages = {
        "reference/json_line.md": _write_json_lines(sources),
        "reference/files.md": _write_files(sources, readme),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


@dataclass(frozen=True)
class Shape:
    """A class as its docstring and its annotations have it.

    Attributes:
        module: Dotted name below `retinaray`.
        node: The class.
    """

    module: str
    node: ast.ClassDef

    @property
    def summary(self) -> str:
        """The first sentence or paragraph of the docstring."""
        text = (ast.get_docstring(self.node) or "").split("\n\n")[0]
        return " ".join(text.split())

    @property
    def fields(self) -> dict[str, str]:
        """Type by field, in their order."""
        return {
            statement.target.id: ast.unparse(statement.annotation)
            for statement in self.node.body
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        }

    @property
    def meanings(self) -> dict[str, str]:
        """What the section `Attributes` says of each field."""
        text = ast.get_docstring(self.node) or ""
        section = re.search(r"^Attributes:\n((?:(?: {4}.*)?\n?)*)", text, re.MULTILINE)
        entries = re.split(r"^ {4}(\w+): ", section[1] if section else "", flags=re.MULTILINE)
        return {
            name: " ".join(said.split())
            for name, said in zip(entries[1::2], entries[2::2], strict=True)
        }

    def method(self, name: str) -> ast.FunctionDef:
        """One of its functions."""
        return _find(self.node.body, ast.FunctionDef, name)


class Sources:
    """The package as syntax trees."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._trees: dict[str, ast.Module] = {}

    def tree(self, module: str) -> ast.Module:
        """A module below `retinaray`."""
        if module not in self._trees:
            path = self._root / "retinaray" / module.replace(".", "/")
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            self._trees[module] = ast.parse(file.read_text("utf-8"))
        return self._trees[module]

    def find_class(self, module: str, name: str) -> Shape:
        """A class that a module defines or imports."""
        tree = self.tree(module)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
                return self.find_class((node.module or "").removeprefix("retinaray."), name)
        return Shape(module, _find(tree.body, ast.ClassDef, name))

    def find_outcome(self, verb: str) -> Shape:
        """What the runner of a command returns."""
        module, _, name = VERBS[verb].runner.removeprefix("retinaray.").partition(":")
        runner = _find(self.tree(module).body, ast.FunctionDef, name)
        assert runner.returns is not None
        return self.find_class(module, ast.unparse(runner.returns))


def _find(body: list[ast.stmt], kind: type[Node], name: str) -> Node:
    return next(node for node in body if isinstance(node, kind) and node.name == name)


def list_keys(shape: Shape, method: str, sources: Sources) -> dict[str, str]:
    """Keys of the JSON object that a method writes, with what is said of each; "" = nothing."""
    keys: dict[str, str] = {}
    body = shape.method(method)
    nested = {id(child) for value in _list_values(body) for child in ast.walk(value)}
    left_out = {
        constant.value
        for node in ast.walk(body)
        if isinstance(node, ast.DictComp)
        for test in node.generators[0].ifs
        for constant in ast.walk(test)
        if isinstance(constant, ast.Constant)
    }
    for node in ast.walk(body):
        if isinstance(node, ast.Dict) and id(node) not in nested:
            for key, value in zip(node.keys, node.values, strict=True):
                found = {str(key.value): ""} if isinstance(key, ast.Constant) else None
                keys |= found or _list_expanded(value, shape, sources)
        elif isinstance(node, ast.Call) and id(node) not in nested:
            keys |= _list_expanded(node, shape, sources)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            keys |= dict.fromkeys(_list_assigned(node.targets[0].slice, body), "")
    meanings = {**SUPPLEMENT.get(shape.node.name, {}), **shape.meanings}
    return {key: keys[key] or meanings.get(key, "") for key in keys if key not in left_out}


def _list_values(body: ast.FunctionDef) -> Iterator[ast.expr]:
    """What stands behind the keys of `{key: ...}` and of `values[key] = ...`."""
    for node in ast.walk(body):
        if isinstance(node, ast.Dict):
            yield from node.values
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            yield node.value


def _list_expanded(node: ast.expr, shape: Shape, sources: Sources) -> dict[str, str]:
    """Keys of `asdict(self)`, `self.to_dict()`, `self.part.to_dict()`, `self.mapping`, or none."""
    match node:
        case ast.Attribute(value=ast.Name(id="self"), attr=field) if field in _KNOWN_MAPPINGS:
            return dict.fromkeys(_KNOWN_MAPPINGS[field], shape.meanings.get(field, ""))
        case ast.Call(func=ast.Name(id=name), args=[ast.Name(id="self")]) if name in _SERIALIZERS:
            return {field: shape.meanings.get(field, "") for field in shape.fields}
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="self"), attr=("to_dict" | "to_json") as method)
        ):
            return list_keys(shape, method, sources)
        case ast.Call(
            func=ast.Attribute(
                value=ast.Attribute(value=ast.Name(id="self"), attr=field),
                attr=("to_dict" | "to_json") as method,
            )
        ):
            owner = shape.fields[field].removesuffix(" | None")
            return list_keys(sources.find_class(shape.module, owner), method, sources)
    return {}


def _list_assigned(index: ast.expr, body: ast.FunctionDef) -> Iterator[str]:
    """Keys that `values[index] = ...` sets: a constant, or those that a loop goes through."""
    if isinstance(index, ast.Constant):
        yield str(index.value)
    for node in ast.walk(body):
        if isinstance(node, ast.For) and ast.unparse(node.target) == ast.unparse(index):
            yield from (
                str(entry.value) for entry in ast.walk(node.iter) if isinstance(entry, ast.Constant)
            )


def _write_json_lines(sources: Sources) -> str:
    parts = [
        "# The JSON line",
        "The last line on standard output of each command is one JSON object. These are its keys. "
        "A command that fails writes one with `--json` only: `verb`, `exit_code`, `error`, "
        "`message`.",
    ]
    for verb in VERBS:
        outcome = sources.find_outcome(verb)
        keys = list_keys(outcome, "to_json", sources)
        rows = [f"| `{key}` | {escape(said)} |" for key, said in keys.items()]
        parts += [f"## {verb}", escape(outcome.summary)]
        parts.append("\n".join(["| key | meaning |", "| --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def _write_files(sources: Sources, readme: str) -> str:
    section = re.search(r"^## What a run leaves\n(.*?)(?=^## )", readme, re.MULTILINE | re.DOTALL)
    assert section is not None, "README.md has no section `What a run leaves`"
    parts = ["# Files", "What commands leave, and what their files hold.", "## What a run leaves"]
    parts.append(section[1].strip())
    for title, module, names in _FORMATS:
        text = ast.get_docstring(sources.tree(module)) or ""
        parts += [f"## {title}", text]
        for name in names:
            shape = sources.find_class(module, name)
            meanings = shape.meanings
            rows = [
                f"| `{field}` | {escape(meanings.get(field, ''))} | `{kind}` |"
                for field, kind in shape.fields.items()
                if not field.startswith("_")
            ]
            table = ["| field | meaning | type |", "| --- | --- | --- |", *rows]
            parts += [f"**{name}.** {escape(shape.summary)}", "\n".join(table)]
    return "\n\n".join(parts) + "\n"
