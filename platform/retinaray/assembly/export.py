"""`export`: weights as an ONNX file or an engine, written only if it finds the original's boxes."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from typing import Any

from retinaray.artifact import hash_content
from retinaray.assembly.file_gate import (
    DEFAULT_BATCH,
    describe_build,
    describe_parity,
    read_model,
    write_checked_file,
)
from retinaray.assembly.portable_file import FileRequest, read_fixed_batch_of
from retinaray.config.schema import ENGINE_ENDINGS, EngineConfig, ExportJob
from retinaray.errors import MissingFileError
from retinaray.evaluation.parity_rows import ParityRow
from retinaray.export.nvidia_parser import NvidiaBuild
from retinaray.export.trt_engine import EngineSettings, build_plan, load_tensorrt, sidecar_uri
from retinaray.inference.onnx_contract import read_onnx_card
from retinaray.storage import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportOutcome:
    """An exported file.

    Attributes:
        output: Where it is.
        canvas: Height and width that it takes.
        kind: Types of the ONNX file: fp32, fp16, int8 or int8-fp16.
        input_type: `uint8` or `float32`.
        num_bytes: Its size.
        sha256: Its hash.
        parity: How far ONNX Runtime's boxes lie from torch's.
        nvidia: What NVIDIA's builder made of it; none = not asked.
        exit_code: 0.
    """

    output: str
    canvas: tuple[int, int]
    kind: str
    input_type: str
    num_bytes: int
    sha256: str
    parity: ParityRow
    nvidia: NvidiaBuild | None = None
    exit_code: int = 0

    def to_json(self) -> str:
        """One line for machines."""
        values: dict[str, Any] = {
            **vars(self),
            "parity": self.parity.to_dict(),
            "nvidia": asdict(self.nvidia) if self.nvidia else None,
        }
        return json.dumps(values)

    def to_text(self) -> str:
        """A few lines for people."""
        lines = [
            f"{self.output}  {self.canvas[0]}x{self.canvas[1]} (height x width), {self.kind}, "
            f"{self.input_type} input, {self.num_bytes / 1e6:.1f} MB",
            describe_parity(self.parity),
        ]
        if self.nvidia is not None:
            lines.append(describe_build(self.nvidia))
        return "\n".join(lines)


def run_export(job: ExportJob) -> ExportOutcome:
    """Export a model and compare it with the original before it is written.

    Raises:
        CheckpointError: If the weights cannot be read.
        ExportError: If the export fails, its boxes differ by more than the tolerance, or NVIDIA's
            builder refuses it.
        InferenceError: If an engine is asked for and cannot be built here.
        DatasetError, ImageError: If the images of the comparison cannot be used.
        StorageError: If a file cannot be read or written.
    """
    card, model, storage = read_model(job.model, job.reading)
    is_engine = job.output.endswith(ENGINE_ENDINGS)
    if is_engine:
        # What is missing is said before minutes of work.
        load_tensorrt()
    request = FileRequest(
        canvas=job.size or card.canvas,
        precision=job.precision,
        # An engine is built by strong typing, as everything else than TensorRT 8 can.
        target=job.target or ("tensorrt11" if is_engine else None),
        typing="strong" if is_engine else None,
        input_type=job.input,
        fixed_batch=read_fixed_batch_of(job.batch),
        top_k=job.top_k,
    )
    logger.info("exporting for %dx%d (height x width)", *request.canvas)
    content, row, nvidia = write_checked_file(model, card, request, job)
    written = content
    if is_engine:
        written = _write_engine(job, content, storage)
    storage.write_bytes(job.output, written)
    return ExportOutcome(
        output=job.output,
        canvas=request.canvas,
        kind=request.kind,
        input_type=read_onnx_card(content, uri=job.output)[1],
        num_bytes=len(written),
        sha256=hash_content(written),
        parity=row,
        nvidia=nvidia,
    )


def _write_engine(job: ExportJob, content: bytes, storage: Storage) -> bytes:
    """Build the engine, write what goes beside it, and give it."""
    settings = _make_engine_settings(job.engine, job.batch or DEFAULT_BATCH, storage)
    files = build_plan(content, uri=job.output, settings=settings)
    storage.write_bytes(sidecar_uri(job.output), files.sidecar)
    if job.engine.timing_cache is not None and files.timing_cache is not None:
        storage.write_bytes(job.engine.timing_cache, files.timing_cache)
    return files.plan


def _make_engine_settings(
    config: EngineConfig, batch: tuple[int, int, int], storage: Storage
) -> EngineSettings:
    """Settings of the builder, with the timing cache read where there is one."""
    cache = None
    if config.timing_cache is not None:
        try:
            cache = storage.read_bytes(config.timing_cache)
        except MissingFileError:
            logger.info(
                "%s: no timing cache yet; it is written after the build", config.timing_cache
            )
    return EngineSettings(
        batch=batch,
        workspace_bytes=config.workspace_mib << 20,
        timing_cache=cache,
        version_compatible=config.version_compatible,
        hardware_compatibility=config.hardware_compatibility,
        optimization_level=config.optimization_level,
    )
