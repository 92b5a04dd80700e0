"""A model repository for NVIDIA Triton: the file, its settings, and how to make its engine.

Source: Triton's model_config.proto and its documents on model repositories and configurations.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

from retinaray.artifact import hash_content
from retinaray.data.label_lines import label_lines
from retinaray.errors import ExportError
from retinaray.export.edge_bundle.signature import Signature, read_signature
from retinaray.inference.onnx_contract import INPUT_NAME, OUTPUT_NAMES

Platform = Literal["tensorrt_plan", "onnxruntime_onnx"]
_INPUT_TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"}
_OUTPUT_TYPES = ("TYPE_FP32", "TYPE_FP32", "TYPE_INT32")


@dataclass(frozen=True)
class TritonSettings:
    """How a server runs the model.

    Attributes:
        name: The model's name on the server: letters, digits, `_`, `-`, `.`.
        platform: `tensorrt_plan` for an engine, `onnxruntime_onnx` for the ONNX file itself.
        batch: Least, usual and most images per call.
        instances: Copies of the model on each GPU, or on the processor.
        kind: Where it runs; an engine runs on GPUs only.
        max_queue_delay_us: How long a request may wait for others to share its batch.
        trtexec_flags: Of the engine's build, where it has to be built on the server.
    """

    name: str
    platform: Platform = "tensorrt_plan"
    batch: tuple[int, int, int] = (1, 8, 8)
    instances: int = 1
    kind: Literal["gpu", "cpu"] = "gpu"
    max_queue_delay_us: int = 2000
    trtexec_flags: tuple[str, ...] = ("--stronglyTyped",)


def build_triton_repository(
    content: bytes, settings: TritonSettings, *, plan: bytes | None = None
) -> dict[str, bytes]:
    """Write a model repository.

    Args:
        content: The ONNX file.
        settings: How it is run.
        plan: The engine, built with the server's TensorRT on its kind of GPU; none with
            `tensorrt_plan` = the repository holds the ONNX file and the command that builds it.

    Returns:
        Path below the repository to content, by rising path: `NAME/config.pbtxt`,
        `NAME/1/model.onnx` or `NAME/1/model.plan`, `NAME/labels.txt`, `NAME/README.md`.

    Raises:
        CheckpointError: If `content` is no exported file.
        ExportError: If the settings contradict each other or the file.
    """
    signature = read_signature(content, uri=f"{settings.name}.onnx")
    _check_settings(settings, signature, has_plan=plan is not None)
    files = {
        "config.pbtxt": write_triton_config(signature, settings).encode(),
        "labels.txt": "".join(f"{x}\n" for x in label_lines(signature.card.categories)).encode(),
        "README.md": _write_readme(
            signature, settings, content, has_plan=plan is not None
        ).encode(),
    }
    if settings.platform == "onnxruntime_onnx":
        files["1/model.onnx"] = content
    elif plan is not None:
        files["1/model.plan"] = plan
    else:
        # Beside the version folder, where the server does not look for models.
        files["model.onnx"] = content
        files["1/.keep"] = b""
    return {f"{settings.name}/{path}": files[path] for path in sorted(files)}


def write_triton_config(signature: Signature, settings: TritonSettings) -> str:
    """config.pbtxt as text.

    A file of a fixed batch is described with its batch as an axis (max_batch_size 0), because the
    server would add one of its own.
    """
    height, width = signature.card.canvas
    count, fixed = signature.num_candidates, signature.fixed_batch
    batch_axis = [fixed] if fixed else []
    outputs = zip(OUTPUT_NAMES, _OUTPUT_TYPES, ([count, 4], [count], [count]), strict=True)
    tensors = [
        _tensor(
            "input", INPUT_NAME, _INPUT_TYPES[signature.input_type], [*batch_axis, 3, height, width]
        ),
        *(_tensor("output", name, kind, [*batch_axis, *dims]) for name, kind, dims in outputs),
    ]
    most, usual = settings.batch[2], settings.batch[1]
    blocks = [
        f"name: {_quote(settings.name)}",
        f"platform: {_quote(settings.platform)}",
        f"max_batch_size: {0 if fixed else most}",
        *tensors,
        f"instance_group [ {{ count: {settings.instances} kind: KIND_{settings.kind.upper()} }} ]",
        "version_policy { latest { num_versions: 1 } }",
    ]
    if not fixed and most > 1:
        preferred = ", ".join(map(str, sorted({usual, most})))
        blocks.append(
            f"dynamic_batching {{\n  preferred_batch_size: [ {preferred} ]\n"
            f"  max_queue_delay_microseconds: {settings.max_queue_delay_us}\n}}"
        )
    blocks += [_parameter(key, value) for key, value in _list_parameters(signature).items()]
    return "\n".join(blocks) + "\n"


def _check_settings(settings: TritonSettings, signature: Signature, *, has_plan: bool) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", settings.name):
        raise ExportError(
            f"Triton model name {settings.name!r}: expected letters, digits, '_', '-' and '.'"
        )
    if settings.platform == "onnxruntime_onnx" and has_plan:
        raise ExportError("platform onnxruntime_onnx runs the ONNX file: leave the engine out")
    if settings.platform == "tensorrt_plan" and settings.kind != "gpu":
        raise ExportError("platform tensorrt_plan runs on GPUs only, asked for kind 'cpu'")
    least, usual, most = settings.batch
    fixed = signature.fixed_batch
    if not 1 <= least <= usual <= most:
        raise ExportError(f"batch {settings.batch}: expected 1 <= least <= usual <= most")
    if fixed is not None and settings.batch != (fixed, fixed, fixed):
        raise ExportError(
            f"batch {settings.batch}: the ONNX file takes batches of {fixed} only; export it "
            f"without a fixed batch, or give --batch {fixed}"
        )


def _tensor(kind: str, name: str, data_type: str, dims: list[int]) -> str:
    shape = ", ".join(map(str, dims))
    return f"{kind} [\n  {{ name: {_quote(name)} data_type: {data_type} dims: [ {shape} ] }}\n]"


def _list_parameters(signature: Signature) -> dict[str, str]:
    """What a client needs to finish the work: the server gives candidates, not detections."""
    card = signature.card
    return {
        "score_thresholds": json.dumps(list(card.score_thresholds)),
        "nms_iou": json.dumps(card.nms_iou),
        "nms_kind": card.nms_kind,
        "max_detections": str(card.max_detections),
        "preprocessing": card.preprocessing,
        "run_id": card.run_id,
    }


def _parameter(key: str, value: str) -> str:
    return (
        f"parameters {{ key: {_quote('retinaray.' + key)} "
        f"value {{ string_value: {_quote(value)} }} }}"
    )


def _quote(text: str) -> str:
    """A string of protobuf's text format; its escapes are those of C."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _write_readme(
    signature: Signature, settings: TritonSettings, content: bytes, *, has_plan: bool
) -> str:
    height, width = signature.card.canvas
    name = settings.name
    lines = [
        f"# {name}: a retinaray detector for Triton",
        "",
        f"Input `{INPUT_NAME}`: {signature.input_type} RGB 0..255, [N, 3, {height}, {width}]; "
        f"{signature.card.preprocessing}.",
        f"Outputs: {signature.num_candidates} candidates per image by falling score: `boxes` "
        "(left, top, right, bottom in network pixels), `scores`, `labels` (lines of labels.txt).",
        "Thresholds and suppression of overlaps are the client's; their values are in the",
        "parameters of config.pbtxt.",
        "",
        f"ONNX SHA-256 {hash_content(content)}, training run {signature.card.run_id or 'unknown'}.",
    ]
    if settings.platform == "tensorrt_plan" and not has_plan:
        shapes = [
            f"  --{which}Shapes={INPUT_NAME}:{count}x3x{height}x{width} \\"
            for which, count in zip(("min", "opt", "max"), settings.batch, strict=True)
        ]
        lines += [
            "",
            "## The engine is missing",
            "",
            "Build it inside the server's container, on its GPU, then start the server:",
            "",
            "```",
            f"cd {name}",
            "trtexec --onnx=model.onnx " + " ".join(settings.trtexec_flags) + " \\",
            *([] if signature.fixed_batch else shapes),
            "  --saveEngine=1/model.plan",
            "```",
        ]
    return "\n".join(lines) + "\n"
