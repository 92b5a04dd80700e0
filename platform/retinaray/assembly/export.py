"""`export`: weights as an ONNX file, written only when it finds the original's boxes."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from itertools import islice

import torch
from torch import Tensor

from retinaray.artifact import hash_content, model_kind, read_weights
from retinaray.assembly.reading import make_read_settings, make_reader
from retinaray.config.schema import ExportJob
from retinaray.errors import ExportError
from retinaray.export.onnx_graph import ExportSettings, export_onnx
from retinaray.export.parity import (
    SCORE_MARGIN,
    ParityReport,
    compare_predictors,
    make_test_canvases,
)
from retinaray.inference.manifest import list_sources
from retinaray.inference.onnxruntime_backend import OnnxRuntimePredictor
from retinaray.inference.pipeline import load_canvas
from retinaray.inference.predictor import PredictorSettings
from retinaray.inference.torch_backend import TorchPredictor
from retinaray.machine import count_cores
from retinaray.storage import Storage

logger = logging.getLogger(__name__)

_CHECK_IMAGES = 8


@dataclass(frozen=True)
class ExportOutcome:
    """An exported file.

    Attributes:
        output: Where it is.
        canvas: Height and width that it takes.
        input_type: `uint8` or `float32`.
        num_bytes: Its size.
        sha256: Its hash.
        parity: How far ONNX Runtime's boxes lie from torch's.
        exit_code: 0.
    """

    output: str
    canvas: tuple[int, int]
    input_type: str
    num_bytes: int
    sha256: str
    parity: ParityReport
    exit_code: int = 0

    def to_json(self) -> str:
        """One line for machines."""
        return json.dumps(asdict(self))

    def to_text(self) -> str:
        """A few lines for people."""
        parity = self.parity
        return (
            f"{self.output}  {self.canvas[0]}x{self.canvas[1]} (height x width), "
            f"{self.input_type} input, "
            f"{self.num_bytes / 1e6:.1f} MB\n"
            f"{parity.num_boxes} boxes in {parity.num_images} images compared with torch: "
            f"{parity.num_missing} missing, {parity.num_extra} too many, "
            f"largest difference {parity.max_box_px:.3f} px, "
            f"score {parity.max_score:.1e}"
        )


def run_export(job: ExportJob) -> ExportOutcome:
    """Export a model and compare it with the original before it is written.

    Raises:
        CheckpointError: If the weights cannot be read.
        ExportError: If the export fails, or its boxes differ by more than the tolerance.
        DatasetError, ImageError: If the images of the comparison cannot be used.
        StorageError: If a file cannot be read or written.
    """
    if model_kind(job.model) != "weights":
        raise ExportError(f"{job.model}: expected the .pth weights that `retinaray train` wrote")
    storage = Storage(endpoint_url=job.reading.endpoint_url)
    card, model = read_weights(storage.read_bytes(job.model), source=job.model)
    settings = ExportSettings(canvas=job.size or card.canvas, input_type=job.input, top_k=job.top_k)
    logger.info("exporting for %dx%d (height x width)", *settings.canvas)
    content = export_onnx(model, card, settings)
    threads = count_cores()
    torch.set_num_threads(threads)
    # As many detections as candidates: a limit could cut two equal scores one way here, the other
    # way there.
    running = PredictorSettings(
        batch=1, threads=threads, canvas=settings.canvas, max_detections=settings.top_k
    )
    report = compare_predictors(
        TorchPredictor(model, card=card, settings=running, top_k=settings.top_k),
        OnnxRuntimePredictor(content, uri=job.output, settings=running),
        _read_canvases(job, storage, settings.canvas),
    )
    _refuse_differences(job, report)
    storage.write_bytes(job.output, content)
    return ExportOutcome(
        output=job.output,
        canvas=settings.canvas,
        input_type=settings.input_type,
        num_bytes=len(content),
        sha256=hash_content(content),
        parity=report,
    )


def _refuse_differences(job: ExportJob, report: ParityReport) -> None:
    if (
        report.num_missing
        or report.num_extra
        or report.max_box_px > job.tolerance_px
        or report.max_score > SCORE_MARGIN
    ):
        raise ExportError(
            f"{job.output} was not written: of {report.num_boxes} boxes {report.num_missing} are "
            f"missing, {report.num_extra} are too many, the largest difference is "
            f"{report.max_box_px:.3f} px (tolerance {job.tolerance_px} px), of a score "
            f"{report.max_score:.4f} (tolerance {SCORE_MARGIN})"
        )
    if report.num_boxes == 0:
        logger.warning(
            "the model found nothing in %d images, so nothing was compared: "
            "give images that show its classes (--images)",
            report.num_images,
        )


def _read_canvases(job: ExportJob, storage: Storage, canvas: tuple[int, int]) -> list[Tensor]:
    if job.images is None:
        return make_test_canvases(canvas)
    sources = islice(list_sources(job.images, None, storage), _CHECK_IMAGES)
    settings = make_read_settings(job.reading)
    reader = make_reader(job.reading)
    return [
        torch.from_numpy(load_canvas(source, canvas, reader, settings)[0]).permute(2, 0, 1)
        for source in sources
    ]
