"""NVIDIA's own ONNX parser and engine builder as a gate for exported files, without a GPU.

They come with TensorRT for RTX, which parses and builds on a CPU and takes typed files only. Its
engines are not TensorRT's and are thrown away; speed, memory and numbers are not shown. They run in
a process of their own, so that a crash of native code is a message here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from retinaray.errors import ExportError

_BINDINGS, _LIBRARIES = "tensorrt_rtx_bindings", "tensorrt_rtx_libs"
_DISTRIBUTION = "tensorrt-rtx-cu13-libs"
_INSTALL = (
    "pip install --no-deps tensorrt-rtx-cu13-libs==1.7.1.116 tensorrt-rtx-cu13-bindings==1.7.1.116"
)
_CHILD = f"import sys; from {__name__} import run_child; run_child(sys.argv[1])"
_TIMEOUT_S = 900.0
# A layer of the plan in the builder's detailed log. It calls a convolution correlation.
_LAYER = re.compile(r"^Name: .*LayerType: correlation, Inputs: \[(.*?)\], Constants:")
_TYPE = re.compile(r"Datatype: (\w+)")
# Where in NVIDIA's sources a message was made, and that there is no GPU, which none is needed for.
_NOISE = re.compile(r" ?In \w+ at /_src/\S+|\[checkMacros\.cpp::catchCudaError.*")
# How the builder names a node: its kind of layer, its name, the reason.
_LAYER_FAULT = re.compile(r"\((I\w+Layer) ([^:]+): (.*)", re.DOTALL)


@dataclass(frozen=True)
class NvidiaBuild:
    """What NVIDIA's builder made of a file.

    Attributes:
        version: Of TensorRT for RTX.
        parse_s: Seconds to parse.
        build_s: Seconds to build.
        num_plan_bytes: Size of the engine.
        convolutions: Type of the values that convolutions take (`Float`, `Half`, `Int8`) to their
            number in the engine.
        warnings: What the parser and the builder warned of, each once.
    """

    version: str
    parse_s: float
    build_s: float
    num_plan_bytes: int
    convolutions: Mapping[str, int]
    warnings: tuple[str, ...]


def is_nvidia_parser_available() -> bool:
    """Whether the packages are installed; imports nothing."""
    return all(importlib.util.find_spec(name) is not None for name in (_BINDINGS, _LIBRARIES))


def build_with_nvidia(
    content: bytes,
    *,
    batch: tuple[int, int, int],
    canvas: tuple[int, int],
    timeout_s: float = _TIMEOUT_S,
) -> NvidiaBuild:
    """Parse a file and build an engine from it, strongly typed.

    Args:
        content: An exported file of any precision.
        batch: Smallest, usual and largest batch size; not used for a file with a fixed one.
        canvas: Height and width of the file's input.
        timeout_s: Give up after this long.

    Raises:
        ExportError: If the packages are missing, or the parser or the builder refuses the file,
            with node, operator and reason, or dies.
    """
    if not is_nvidia_parser_available():
        raise ExportError(f"NVIDIA's ONNX parser is not installed: {_INSTALL}")
    with tempfile.TemporaryDirectory(prefix="retinaray-") as folder:
        (Path(folder) / "model.onnx").write_bytes(content)
        shapes = [[size, 3, *canvas] for size in batch]
        (Path(folder) / "request.json").write_text(json.dumps({"shapes": shapes}))
        # The child finds the same modules as this process, however they were found.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            child = subprocess.run(
                [sys.executable, "-c", _CHILD, folder],
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ExportError(f"NVIDIA's builder took longer than {timeout_s:g} s") from error
        answer = Path(folder) / "answer.json"
        if child.returncode != 0 or not answer.is_file():
            raise ExportError(
                f"NVIDIA's builder died with exit status {child.returncode}: "
                f"{child.stderr.strip()[-2000:] or 'it left no message'}"
            )
        values = json.loads(answer.read_text())
    if "refusal" in values:
        raise ExportError(values["refusal"])
    return NvidiaBuild(**{**values, "warnings": tuple(values["warnings"])})


def run_child(folder: str) -> None:
    """Do the work, in the child process: reads and writes files in a folder of the parent's."""
    work = Path(folder)
    shapes = json.loads((work / "request.json").read_text())["shapes"]
    try:
        values: dict[str, Any] = asdict(_build((work / "model.onnx").read_bytes(), shapes))
    except ExportError as error:
        values = {"refusal": str(error)}
    (work / "answer.json").write_text(json.dumps(values))


def _build(content: bytes, shapes: list[list[int]]) -> NvidiaBuild:
    importlib.import_module(_LIBRARIES)
    trt = importlib.import_module(_BINDINGS)
    version = importlib.metadata.version(_DISTRIBUTION)
    log: list[tuple[Any, str]] = []
    builder = trt.Builder(_make_logger(trt, log))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    start = time.perf_counter()
    if not parser.parse(content):
        raise ExportError(f"NVIDIA's parser (TensorRT-RTX {version}) {_describe_errors(parser)}")
    parsed = time.perf_counter()
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _add_profile(builder, config, network, shapes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        errors = [text for severity, text in log if severity <= trt.ILogger.Severity.ERROR]
        raise ExportError(f"NVIDIA's builder (TensorRT-RTX {version}) {_describe_refusal(errors)}")
    warned = [text for severity, text in log if severity == trt.ILogger.Severity.WARNING]
    return NvidiaBuild(
        version=version,
        parse_s=parsed - start,
        build_s=time.perf_counter() - parsed,
        num_plan_bytes=plan.nbytes,
        convolutions=_count_convolutions(text for _, text in log),
        warnings=tuple(dict.fromkeys(text.strip() for text in warned)),
    )


def _make_logger(trt: Any, log: list[tuple[Any, str]]) -> Any:
    """A logger that keeps everything; a base class that is only there with the package."""

    def keep(_: Any, severity: Any, text: str) -> None:
        log.append((severity, text))

    class_type = type("KeepingLogger", (trt.ILogger,), {"log": keep})
    return class_type()


def _add_profile(builder: Any, config: Any, network: Any, shapes: list[list[int]]) -> None:
    """Batch sizes for a file whose batch is free; a fixed one needs none."""
    tensor = network.get_input(0)
    if -1 in tuple(tensor.shape):
        profile = builder.create_optimization_profile()
        profile.set_shape(tensor.name, *[tuple(shape) for shape in shapes])
        config.add_optimization_profile(profile)


def _describe_errors(parser: Any) -> str:
    parts = []
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        reason = _shorten(error.desc())
        parts.append(f"node {error.node_name()!r} ({error.node_operator()}): {reason}")
    return f"refuses {'; '.join(parts) or 'the file without a reason'}"


def _describe_refusal(errors: list[str]) -> str:
    texts = [_shorten(error) for error in errors]
    for text in texts:
        fault = _LAYER_FAULT.search(text)
        if fault:
            return f"refuses node {fault[2]!r} ({fault[1]}): {fault[3].removesuffix(')')}"
    return f"refuses the file: {'; '.join(filter(None, texts)) or 'it gave no reason'}"


def _shorten(message: str) -> str:
    """A message of several lines as one, each sentence once."""
    lines = (line.strip() for line in _NOISE.sub("", message).splitlines())
    return " ".join(dict.fromkeys(filter(None, lines)))


def _count_convolutions(texts: Any) -> dict[str, int]:
    """Convolutions of the engine by the type of what they take, from the builder's log."""
    layers = (_LAYER.match(line) for text in texts for line in text.splitlines())
    types = [_TYPE.findall(layer[1]) for layer in layers if layer]
    return dict(Counter(found[0] for found in types if found))
