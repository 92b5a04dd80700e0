"""Which runtimes and precisions of which files can be compared here, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from retinaray.artifact import ModelCard, model_kind
from retinaray.assembly.reading import read_model_file
from retinaray.errors import CheckpointError, InferenceError
from retinaray.evaluation.parity_rows import CasePrecision, ParityCase, UnrunCase
from retinaray.export.parity_gate import read_top_k
from retinaray.inference.onnx_contract import Precision, read_onnx_card, read_precision
from retinaray.inference.onnxruntime_backend import load_onnxruntime
from retinaray.inference.openvino_backend import choose_precision, list_capabilities
from retinaray.inference.plan_sidecar import read_sidecar, sidecar_uri
from retinaray.inference.predictor import Backend, ComputeType
from retinaray.inference.tensorrt_loading import load_tensorrt

# Convolutions in TF32 keep 10 bits of mantissa, as many as fp16.
_TF32_PRECISION: CasePrecision = "fp16"


@dataclass(frozen=True)
class ExportedFile:
    """A file to compare.

    Attributes:
        uri: Where it is.
        name: What its cases begin with.
        content: The file.
        card: What it says of its model.
        precision: Types of its convolutions.
        top_k: Candidates per image; none = unknown.
        sidecar: The description beside an engine.
        allow_tf32: Whether TensorRT may round its float32 convolutions.
    """

    uri: str
    name: str
    content: bytes
    card: ModelCard
    precision: Precision
    top_k: int | None
    sidecar: bytes | None = None
    allow_tf32: bool = True


@dataclass(frozen=True)
class PlannedCase:
    """A case that can run here.

    Attributes:
        case: What it is.
        file: What it runs.
        backend: The runtime.
        compute: What the runtime is asked to compute in.
    """

    case: ParityCase
    file: ExportedFile
    backend: Backend
    compute: Literal["auto"] | ComputeType = "auto"


def read_files(
    uris: Sequence[str], read: Callable[[str], bytes], model_card: ModelCard, *, model: str
) -> list[ExportedFile]:
    """Read the files and hold them to the model that they are said to come from.

    Args:
        uris: Exported files.
        read: Gives the bytes at a URI.
        model_card: Card of the weights.
        model: Name of the weights, for messages.

    Raises:
        CheckpointError: If a file is damaged or comes from another model.
        StorageError: If a file cannot be read.
    """
    bases = [uri.rstrip("/").rsplit("/", 1)[-1] for uri in uris]
    files = []
    for uri, base in zip(uris, bases, strict=True):
        name = base if bases.count(base) == 1 else uri
        file = _read_file(uri, name, read)
        for key in ("categories", "anchors", "architecture"):
            if getattr(file.card, key) != getattr(model_card, key):
                raise CheckpointError(
                    f"{uri}: its {key} are not those of {model}: it was exported from another "
                    "model; give the weights that it comes from"
                )
        files.append(file)
    return files


def _read_file(uri: str, name: str, read: Callable[[str], bytes]) -> ExportedFile:
    content, described = read_model_file(uri, read)
    if model_kind(uri) == "onnx":
        return ExportedFile(
            uri=uri,
            name=name,
            content=content,
            card=read_onnx_card(content, uri=uri)[0],
            precision=read_precision(content, uri=uri),
            top_k=read_top_k(content),
        )
    sidecar = read_sidecar(described, uri=uri)
    return ExportedFile(
        uri=uri,
        name=name,
        content=content,
        card=sidecar.card,
        precision=_check_precision(sidecar.precision, uri),
        top_k=None,
        sidecar=described,
        allow_tf32=sidecar.allow_tf32,
    )


def _check_precision(text: str, uri: str) -> Precision:
    known: dict[str, Precision] = {"fp32": "fp32", "fp16": "fp16", "int8": "int8"}
    if text not in known:
        raise CheckpointError(
            f"{sidecar_uri(uri)}: expected precision fp32, fp16 or int8, found {text!r}"
        )
    return known[text]


def plan_cases(
    files: Sequence[ExportedFile], backend: str
) -> tuple[list[PlannedCase], list[UnrunCase]]:
    """Every way to run the files.

    Args:
        files: What to run.
        backend: The only runtime that is wanted, or `auto` for all.

    Returns:
        What can run here, and what cannot, with the reason.
    """
    planned: list[PlannedCase] = []
    unrun: list[UnrunCase] = []
    obstacles: dict[str, str] = {}
    for file in files:
        for case in _list_cases(file):
            if backend not in ("auto", case.backend):
                continue
            probe = f"{case.backend} {case.compute}"
            if probe not in obstacles:
                obstacles[probe] = _find_obstacle(case)
            if obstacles[probe]:
                unrun.append(UnrunCase(case.case.name, obstacles[probe]))
            else:
                planned.append(case)
    return planned, unrun


def _list_cases(file: ExportedFile) -> Iterator[PlannedCase]:
    def make(
        backend: Backend,
        label: str,
        precision: CasePrecision,
        compute: Literal["auto"] | ComputeType = "auto",
    ) -> PlannedCase:
        case = ParityCase(f"{file.name} {backend} {label}", file.uri, backend, precision)
        return PlannedCase(case, file, backend, compute)

    if file.sidecar is None:
        yield make("onnxruntime", file.precision, file.precision)
        yield make("openvino", file.precision, file.precision, "fp32")
        if file.precision != "int8":
            yield make("openvino", "bf16", "bf16", "bf16")
    if file.precision == "fp32" and file.allow_tf32:
        yield make("tensorrt", "tf32", _TF32_PRECISION)
    else:
        yield make("tensorrt", file.precision, file.precision)


def _find_obstacle(case: PlannedCase) -> str:
    """Why this machine cannot run a kind of case; empty when it can."""
    try:
        if case.backend == "tensorrt":
            load_tensorrt()
        elif case.backend == "openvino":
            choose_precision(case.compute, case.file.precision, list_capabilities())
        elif case.backend == "onnxruntime":
            load_onnxruntime()
    except InferenceError as error:
        return str(error)
    return ""
