"""Is an exported file right? Compared with its original, and built by NVIDIA's own code.

Every file that leaves the house passes here first, whatever command writes it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch
from jaxtyping import UInt8
from torch import Tensor

from retinaray.artifact import ModelCard, model_kind, read_weights
from retinaray.assembly.portable_file import FileRequest, write_portable_file
from retinaray.assembly.reading import make_read_settings
from retinaray.config.schema import (
    BundleJob,
    ExportJob,
    GateConfig,
    ReadingConfig,
)
from retinaray.detector.retinanet import RetinaNet
from retinaray.errors import ExportError
from retinaray.evaluation.parity_rows import ParityCase, ParityRow, ParityTolerance
from retinaray.export.nvidia_parser import (
    NvidiaBuild,
    build_with_nvidia,
    is_nvidia_parser_available,
)
from retinaray.export.parity_gate import (
    GateEntry,
    compare_runtimes,
    make_gate_settings,
    read_top_k,
)
from retinaray.export.sample_canvases import make_test_canvases
from retinaray.inference.manifest import list_sources
from retinaray.inference.onnx_contract import read_precision
from retinaray.inference.onnxruntime_backend import OnnxRuntimePredictor
from retinaray.inference.pipeline import load_canvas
from retinaray.inference.predictor import PredictorSettings
from retinaray.inference.source_reading import make_source_reader
from retinaray.inference.torch_backend import TOP_K, TorchPredictor
from retinaray.machine import count_cores
from retinaray.storage import Storage

logger = logging.getLogger(__name__)

DEFAULT_BATCH = (1, 8, 8)
_CHECK_IMAGES = 8
# A share of fewer detections than this says nothing about a precision.
_MIN_JUDGED = 20


def read_model(uri: str, reading: ReadingConfig) -> tuple[ModelCard, RetinaNet, Storage]:
    """The weights to export.

    Raises:
        CheckpointError: If they cannot be read.
        ExportError: If the file holds no weights.
        StorageError: If it cannot be read.
    """
    if model_kind(uri) != "weights":
        raise ExportError(f"{uri}: expected the .pth weights that `retinaray train` wrote")
    storage = Storage(endpoint_url=reading.endpoint_url)
    card, model = read_weights(storage.read_bytes(uri), source=uri)
    return card, model, storage


def write_checked_file(
    model: RetinaNet, card: ModelCard, request: FileRequest, job: ExportJob | BundleJob
) -> tuple[bytes, ParityRow, NvidiaBuild | None]:
    """Export a network and hold the file to it.

    Args:
        model: The trained network.
        card: The network's.
        request: What file is wanted.
        job: Images and tolerances of the comparison, calibration, batch and name.

    Returns:
        The ONNX file, how far it lies from the original, and what NVIDIA's builder made of it.

    Raises:
        ExportError: If the file cannot be written, differs too much from the original, or the
            builder refuses it.
        DatasetError, ImageError, StorageError: If images cannot be used.
    """
    content = write_portable_file(
        model, card, request, calibration=job.calibration, reading=job.reading
    )
    row = _compare(content, model, card, request, job)
    nvidia = _ask_nvidia(content, job, canvas=request.canvas)
    return content, row, nvidia


def _compare(
    content: bytes,
    model: RetinaNet,
    card: ModelCard,
    request: FileRequest,
    job: ExportJob | BundleJob,
) -> ParityRow:
    """Hold an exported file to its original, by ONNX Runtime."""
    name = job.output
    threads = count_cores()
    torch.set_num_threads(threads)
    running = make_gate_settings(PredictorSettings(batch=1, threads=threads, canvas=request.canvas))
    top_k = read_top_k(content)
    case = ParityCase(
        name=name, file=name, backend="onnxruntime", precision=read_precision(content, uri=name)
    )
    row = compare_runtimes(
        # A GPU would round the inputs of float32 convolutions otherwise.
        TorchPredictor(
            model, card=card, settings=replace(running, precision="fp32"), top_k=top_k or TOP_K
        ),
        GateEntry(case, OnnxRuntimePredictor(content, uri=name, settings=running), top_k),
        read_canvases(job, request.canvas),
        tolerance=_make_tolerance(job.gate),
        reference_top_k=top_k,
    )
    _refuse_differences(name, row, has_images=_name_images(job) is not None)
    return row


def _make_tolerance(gate: GateConfig) -> ParityTolerance:
    if gate.tolerance_px is None:
        return ParityTolerance()
    return replace(ParityTolerance(), box_px=gate.tolerance_px)


def _refuse_differences(name: str, row: ParityRow, *, has_images: bool) -> None:
    if row.candidates.num_reference == 0:
        logger.warning(
            "the model found nothing in %d images, so nothing was compared: "
            "give images that show its classes (--images)",
            row.num_images,
        )
        return
    if not row.reasons:
        return
    if row.case.precision != "fp32" and (
        not has_images or row.detections.num_reference < _MIN_JUDGED
    ):
        logger.warning(
            "%d detections are too few to judge %s (%s): give images that show the model's "
            "classes (--images), or compare with `retinaray parity`",
            row.detections.num_reference,
            row.case.precision,
            "; ".join(row.reasons),
        )
        return
    raise ExportError(f"{name} was not written: {'; '.join(row.reasons)}")


def _ask_nvidia(
    content: bytes, job: ExportJob | BundleJob, *, canvas: tuple[int, int]
) -> NvidiaBuild | None:
    wish = job.gate.nvidia
    if wish == "skip" or (wish == "auto" and not is_nvidia_parser_available()):
        return None
    return build_with_nvidia(content, batch=job.batch or DEFAULT_BATCH, canvas=canvas)


def _name_images(job: ExportJob | BundleJob) -> str | None:
    """Where the images of the comparison are; those of the calibration serve where it has none."""
    return job.gate.images or job.calibration.images


def read_canvases(
    job: ExportJob | BundleJob, canvas: tuple[int, int], *, limit: int = _CHECK_IMAGES
) -> Iterator[UInt8[Tensor, "3 H W"]]:
    """A few images as network inputs: the first ones there, or pictures of noise and edges.

    Raises:
        DatasetError, ImageError, StorageError: If they cannot be used.
    """
    images, reading = _name_images(job), job.reading
    if images is None:
        yield from make_test_canvases(canvas)
        return
    storage = Storage(endpoint_url=reading.endpoint_url)
    sources = list(islice(list_sources(images, None, storage), limit))
    settings, reader = make_read_settings(reading), make_source_reader(sources, storage)
    for source in sources:
        yield torch.from_numpy(load_canvas(source, canvas, reader, settings)[0]).permute(2, 0, 1)


def describe_parity(row: ParityRow) -> str:
    """One comparison in a line."""
    found, kept = row.candidates, row.detections
    return (
        f"{found.num_reference} candidates in {row.num_images} images compared with torch: "
        f"largest difference {found.box_px.max:.3f} px, score {found.scores.max:.1e}; of "
        f"{kept.num_reference} detections {kept.num_missing} missing, {kept.num_extra} too many, "
        f"{kept.num_flips} of another class"
    )


def describe_build(build: NvidiaBuild) -> str:
    """What NVIDIA's builder made of a file, in a line."""
    types = ", ".join(f"{count} {name}" for name, count in sorted(build.convolutions.items()))
    return (
        f"TensorRT for RTX {build.version} parses and builds it in {build.build_s:.1f} s "
        f"(engine {build.num_plan_bytes / 1e6:.1f} MB; convolutions: {types or 'none told'})"
    )
