"""Every TensorRT name that the package uses exists in every version that it supports.

The sources are read, never imported. Parameters and attributes that hold a TensorRT object have a
name that says its class (CLASSES), which is checked as well, so that its methods can be looked up.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import retinaray
from retinaray.inference import tensorrt_building

CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "network_input": "ITensor",
    "parser": "OnnxParser",
    "fault": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "timing_cache": "ITimingCache",
    "serialized": "IHostMemory",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
}
# Members that some versions lack, each behind hasattr.
GUARDED = {"IExecutionContext.is_stream_capturable"}
RECORDS = ["trt-10.3.0", "trt-10.16.1", "trt-11.4.0", "rtx-1.7.1"]
PACKAGE = Path(retinaray.__file__).parent
Record = dict[str, Any]
ParseSignature = Callable[[str], tuple[inspect.Signature | None, str]]


def uses_tensorrt(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "trt" for node in ast.walk(tree))


@functools.cache
def list_sources() -> dict[str, ast.Module]:
    """Every module of the package in which TensorRT's own module is a variable."""
    texts = {path: path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    trees = {
        path.relative_to(PACKAGE).as_posix(): ast.parse(text)
        for path, text in texts.items()
        if "trt" in text
    }
    return {name: tree for name, tree in trees.items() if uses_tensorrt(tree)}


class Checker:
    """Holds one source to one record.

    Args:
        record: The public interface of a version.
        parse: Reads a recorded signature.
    """

    def __init__(self, record: Record, parse: ParseSignature) -> None:
        self.record = record
        self.parse = parse
        self.seen: set[str] = set()
        self.guards: set[str] = set()
        self.local_classes: dict[str, str] = {}
        self.functions: dict[str, list[str]] = {}

    def find_faults(self, tree: ast.Module) -> Iterator[str]:
        functions = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        self.functions = {
            function.name: [argument.arg for argument in function.args.args]
            for function in functions
        }
        for function in functions:
            self.local_classes = {}
            self.local_classes = self.list_locals(function)
            self.guards = self.list_guards(function)
            for node in ast.walk(function):
                yield from self.check(node)

    def list_locals(self, function: ast.AST) -> dict[str, str]:
        """Classes of the variables that a function assigns itself."""
        return {
            target.id: owner
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and (owner := self.class_of(node.value))
            for target in node.targets
            if isinstance(target, ast.Name)
        }

    def list_guards(self, function: ast.AST) -> set[str]:
        """What hasattr asks for in a function, as `Class.member`."""
        return {
            f"{self.class_of(node.args[0])}.{node.args[1].value}"
            for node in ast.walk(function)
            if isinstance(node, ast.Call)
            and ast.unparse(node.func) == "hasattr"
            and isinstance(node.args[1], ast.Constant)
        }

    def check(self, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Attribute):
            yield from self.check_member(node)
        elif isinstance(node, ast.Call):
            yield from self.check_call(node)
            yield from self.check_parameters(node)
        elif isinstance(node, ast.Assign) and (owner := self.class_of(node.value)):
            for target in node.targets:
                if owner in CLASSES.values() and self.class_of(target) != owner:
                    yield f"line {node.lineno}: a {owner} is called {ast.unparse(target)}"

    def class_of(self, node: ast.expr) -> str:
        """TensorRT's class of an expression; empty when it is another thing."""
        if isinstance(node, ast.Name):
            return self.local_classes.get(node.id) or CLASSES.get(node.id, "")
        if isinstance(node, ast.Attribute):
            is_own = isinstance(node.value, ast.Name) and node.value.id == "self"
            return CLASSES.get(node.attr.removeprefix("_"), "") if is_own else ""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "trt":
                return node.func.attr
            text = self.signature_text(node.func)
            answer = self.parse(text)[1].rstrip("]") if text else ""
            # `nvonnxparser::IParserError` of C++ is `ParserError` in Python.
            return {"IParserError": "ParserError"}.get(answer, answer)
        return ""

    def signature_text(self, function: ast.expr) -> str:
        """The recorded signature behind `builder.create_network` or `trt.Builder`."""
        if not isinstance(function, ast.Attribute):
            return ""
        if isinstance(function.value, ast.Name) and function.value.id == "trt":
            members = self.record.get(function.attr, {}).get("members", {})
            return members.get("__init__", "") if isinstance(members, dict) else ""
        owner = self.record.get(self.class_of(function.value), {})
        text = owner.get("members", {}).get(function.attr, "")
        return text if isinstance(text, str) and not text.startswith("property") else ""

    def check_member(self, node: ast.Attribute) -> Iterator[str]:
        where = f"line {node.lineno}"
        if isinstance(node.value, ast.Name) and node.value.id == "trt":
            self.seen.add(node.attr)
            if not node.attr.startswith("__") and node.attr not in self.record:
                yield f"{where}: trt.{node.attr} does not exist"
            return
        inner = node.value
        owner = self.class_of(inner)
        if (
            isinstance(inner, ast.Attribute)
            and isinstance(inner.value, ast.Name)
            and inner.value.id == "trt"
        ):
            owner = inner.attr
        if not owner or owner not in self.record:
            return
        name = f"{owner}.{node.attr}"
        self.seen.add(name)
        if name in GUARDED and name in self.guards:
            return
        if node.attr not in self.record[owner]["members"]:
            yield f"{where}: {name} does not exist"

    def check_call(self, node: ast.Call) -> Iterator[str]:
        text = self.signature_text(node.func)
        signature = self.parse(text)[0] if text else None
        if signature is None or any(isinstance(value, ast.Starred) for value in node.args):
            return
        keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
        try:
            signature.bind(*node.args, **keywords)
        except TypeError as error:
            yield f"line {node.lineno}: {ast.unparse(node.func)}: {error}"

    def check_parameters(self, node: ast.Call) -> Iterator[str]:
        """What a function of the same module gets is called there by its class."""
        if not isinstance(node.func, ast.Name) or node.func.id not in self.functions:
            return
        for argument, name in zip(node.args, self.functions[node.func.id], strict=False):
            owner = self.class_of(argument)
            if owner in CLASSES.values() and CLASSES.get(name) != owner:
                yield f"line {node.lineno}: {node.func.id} calls a {owner} {name}"


@pytest.fixture(params=RECORDS)
def record(read_record: Callable[[str], Record], request: pytest.FixtureRequest) -> Record:
    return read_record(request.param)


@pytest.fixture
def checker(record: Record, parse_recorded: ParseSignature) -> Checker:
    return Checker(record, parse_recorded)


@pytest.mark.parametrize("name", list_sources())
def test_used_names_and_arguments_exist_in_every_version(name: str, checker: Checker) -> None:
    faults = list(checker.find_faults(list_sources()[name]))
    assert not faults, f"{name}: " + "; ".join(faults)


def test_check_sees_the_modules_and_names_that_matter(checker: Checker) -> None:
    assert {f"inference/tensorrt_{stem}.py" for stem in ("building", "engine", "loading")} <= set(
        list_sources()
    )
    for tree in list_sources().values():
        list(checker.find_faults(tree))
    assert {
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "BuilderFlag.TF32",
        "MemoryPoolType.WORKSPACE",
        "ILogger.INTERNAL_ERROR",
        "Builder.build_serialized_network",
        "INetworkDefinition.get_input",
        "ITensor.shape",
        "OnnxParser.num_errors",
        "ParserError.node_operator",
        "IBuilderConfig.builder_optimization_level",
        "IOptimizationProfile.set_shape",
        "ITimingCache.serialize",
        "Runtime.engine_host_code_allowed",
        "ICudaEngine.get_tensor_profile_shape",
        "IExecutionContext.execute_async_v3",
    } <= checker.seen


def test_records_agree_with_the_bindings_of_this_machine(
    read_record: Callable[[str], Record], rtx: Any, live_record: Record
) -> None:
    if not rtx.__version__.startswith("1.7.1."):
        pytest.skip(f"the record is of TensorRT-RTX 1.7.1, here is {rtx.__version__}")
    recorded = read_record("rtx-1.7.1")
    for owner in CLASSES.values():
        expected, found = recorded[owner]["members"], live_record[owner]["members"]
        missing = {name: text for name, text in expected.items() if name not in found}
        assert not missing, owner
        # The record cuts long lines.
        others = [
            name
            for name, text in expected.items()
            if "(self" in text and not found[name].startswith(text)
        ]
        assert not others, owner
    assert live_record["BuilderFlag"]["members"] == recorded["BuilderFlag"]["members"]


def test_hardware_compatibility_levels_are_those_of_the_bindings(
    read_record: Callable[[str], Record],
) -> None:
    # Reached by name through getattr, so that the check above does not see them.
    levels = set(tensorrt_building._LEVELS.values())
    for name in RECORDS:
        lacking = levels - set(read_record(name)["HardwareCompatibilityLevel"]["members"])
        assert lacking == ({"SAME_COMPUTE_CAPABILITY"} if name == "trt-10.3.0" else set())


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("builder.create_netwrk(0)", "Builder.create_netwrk does not exist"),
        ("self._context.execute_async_v2(1, 2)", "execute_async_v2 does not exist"),
        ("trt.BuilderFlags", "trt.BuilderFlags does not exist"),
        ("trt.MemoryPoolType.WORKSPACES", "MemoryPoolType.WORKSPACES does not exist"),
        ("builder.create_network(0, 1)", "too many positional arguments"),
        ("self._context.execute_async_v3()", "missing a required argument: 'stream_handle'"),
        ("config.set_timing_cache(timing_cache, False, strict=True)", "unexpected keyword"),
        ("self._run = trt.Runtime(log)", "a Runtime is called self._run"),
        ("net = builder.create_network(0)\n    net.get_inputs(0)", "get_inputs does not exist"),
        ("thing = parser.get_error(0)\n    thing.name()", "ParserError.name does not exist"),
        ("g(builder)\ndef g(maker):\n    maker.anything()", "g calls a Builder maker"),
        ("self._context.is_stream_capturable(1)", "is_stream_capturable does not exist"),
        ("hasattr(config, 'max_num_tactics')\n    config.max_num_tactics", "does not exist"),
    ],
)
def test_check_finds_each_kind_of_fault(
    read_record: Callable[[str], Record], parse_recorded: ParseSignature, source: str, fault: str
) -> None:
    checker = Checker(read_record("trt-10.3.0"), parse_recorded)
    tree = ast.parse(f"def f(self, trt, builder, config, parser, timing_cache, log):\n    {source}")
    faults = list(checker.find_faults(tree))
    assert len(faults) == 1
    assert fault in faults[0]


@pytest.mark.parametrize(
    "source",
    [
        "network = builder.create_network(flags=int(trt.BuilderFlag.TF32))",
        "hasattr(self._context, 'is_stream_capturable')\n    self._context.is_stream_capturable(1)",
        "trt.__version__",
        "settings.profile.anything, other.config.anything",
        "config.set_timing_cache(cache=timing_cache, ignore_mismatch=False)",
    ],
)
def test_check_is_silent_when_all_is_well(
    read_record: Callable[[str], Record], parse_recorded: ParseSignature, source: str
) -> None:
    checker = Checker(read_record("trt-10.3.0"), parse_recorded)
    tree = ast.parse(f"def f(self, trt, builder, config, timing_cache):\n    {source}")
    assert list(checker.find_faults(tree)) == []
