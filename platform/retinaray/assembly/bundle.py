"""`bundle`: a model with all that a Jetson, a DeepStream host or Triton needs to run it."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import torch
from jaxtyping import UInt8
from torch import Tensor

from retinaray.assembly.file_gate import (
    describe_parity,
    read_canvases,
    read_model,
    write_checked_file,
)
from retinaray.assembly.portable_file import FileRequest, read_fixed_batch_of
from retinaray.config.schema import BundleJob
from retinaray.errors import ExportError
from retinaray.evaluation.parity_rows import ParityRow
from retinaray.export.edge_bundle.bundle import BundleSettings, build_bundle, write_bundle
from retinaray.export.edge_bundle.self_test import Sample, candidate_settings
from retinaray.export.edge_bundle.signature import read_signature
from retinaray.export.targets import TARGETS
from retinaray.export.triton import TritonSettings, build_triton_repository
from retinaray.inference.onnxruntime_backend import OnnxRuntimePredictor
from retinaray.machine import count_cores
from retinaray.storage import is_s3, local_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BundleOutcome:
    """A bundle.

    Attributes:
        output: Its folder.
        target: What it is for.
        precision: Of the convolutions on the device.
        files: Names in the folder.
        num_bytes: All together.
        parity: How far ONNX Runtime's boxes lie from torch's, for the file inside.
        exit_code: 0.
    """

    output: str
    target: str
    precision: str
    files: tuple[str, ...]
    num_bytes: int
    parity: ParityRow
    exit_code: int = 0

    def to_json(self) -> str:
        """One line for machines."""
        return json.dumps({**vars(self), "parity": self.parity.to_dict()})

    def to_text(self) -> str:
        """A few lines for people."""
        return "\n".join(
            [
                f"{self.output}  {self.target}, {self.precision}, {len(self.files)} files, "
                f"{self.num_bytes / 1e6:.1f} MB",
                describe_parity(self.parity),
                "next: copy the folder to the device and follow its README.md",
            ]
        )


def run_bundle(job: BundleJob) -> BundleOutcome:
    """Write a bundle after its file has passed the comparison with the original.

    Raises:
        CheckpointError: If the weights cannot be read.
        ExportError: If the file cannot be exported, differs from the original, or the folder holds
            something else.
        DatasetError, ImageError: If the images cannot be used.
        StorageError: If a file cannot be read, or the folder is not local.
    """
    if is_s3(job.output):
        raise ExportError(f"{job.output}: expected a local folder, to be copied to a device")
    card, model, _ = read_model(job.model, job.reading)
    is_triton = job.target == "triton"
    request = FileRequest(
        canvas=job.size or card.canvas,
        precision=job.precision,
        target=job.target,
        # nvinfer feeds float32 only.
        input_type=None if is_triton else "float32",
        fixed_batch=read_fixed_batch_of(job.batch),
        top_k=job.top_k,
    )
    content, row, _ = write_checked_file(model, card, request, job)
    files = _list_files(job, content, request)
    write_bundle(files, local_path(job.output))
    return BundleOutcome(
        output=job.output,
        target=job.target,
        precision=job.precision,
        files=tuple(files),
        num_bytes=sum(map(len, files.values())),
        parity=row,
    )


def _list_files(job: BundleJob, content: bytes, request: FileRequest) -> dict[str, bytes]:
    target = TARGETS[job.target]
    if job.target == "triton":
        settings = TritonSettings(
            name=PurePosixPath(job.output).name,
            batch=job.batch,
            trtexec_flags=target.trtexec_flags(job.precision),
        )
        return build_triton_repository(content, settings)
    return build_bundle(
        content,
        BundleSettings(
            target=target,
            precision=job.precision,
            batch=job.batch,
            deepstream=job.deepstream,
            frame=job.frame,
        ),
        _make_samples(job, content, request),
    )


def _make_samples(job: BundleJob, content: bytes, request: FileRequest) -> list[Sample]:
    """Images of the self-test, and what the file itself proposes in them."""
    signature = read_signature(content, uri=job.output)
    settings = replace(candidate_settings(signature.num_candidates), threads=count_cores())
    predictor = OnnxRuntimePredictor(content, uri=job.output, settings=settings)
    canvases = read_canvases(job, request.canvas, limit=job.samples)
    return [
        _make_sample(predictor, f"sample {number}", canvas)
        for number, canvas in enumerate(canvases, start=1)
    ]


def _make_sample(
    predictor: OnnxRuntimePredictor, name: str, canvas: UInt8[Tensor, "3 H W"]
) -> Sample:
    (candidates,) = predictor.predict(canvas[None])
    pixels = torch.permute(canvas, (1, 2, 0)).contiguous().numpy()
    return Sample(name=name, canvas=pixels, candidates=candidates)
