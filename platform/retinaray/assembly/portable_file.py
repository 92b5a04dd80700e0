"""From weights to the ONNX file that a precision and a target take."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import UInt8
from torch import Tensor

from retinaray.artifact import ModelCard
from retinaray.assembly.reading import make_read_settings
from retinaray.config.schema import CalibrationConfig, ReadingConfig
from retinaray.detector.retinanet import RetinaNet
from retinaray.errors import DatasetError
from retinaray.export.calibration import CalibrationSettings
from retinaray.export.mixed_precision import to_fp16
from retinaray.export.modelopt_route import (
    ModeloptMethod,
    check_modelopt_target,
    quantize_with_modelopt,
)
from retinaray.export.onnx_graph import ExportSettings, InputType, export_onnx
from retinaray.export.quantization import quantize
from retinaray.export.targets import TARGETS, FileKind, Typing, check_file
from retinaray.inference.manifest import list_sources
from retinaray.inference.onnx_contract import Precision
from retinaray.inference.pipeline import IMAGE_FAULTS, ImageSource, load_canvas
from retinaray.inference.source_reading import make_source_reader
from retinaray.machine import count_cores
from retinaray.storage import Storage

logger = logging.getLogger(__name__)

# A folder of calibration images may be a whole data set; its first names are enough to draw from.
_MAX_LISTED = 100_000
# What runtimes without a target take: of INT8 that is the file whose scales are float32, which
# every runtime reads alike.
_PORTABLE: dict[Precision, FileKind] = {"fp32": "fp32", "fp16": "fp16", "int8": "int8"}


@dataclass(frozen=True)
class FileRequest:
    """What file is wanted.

    Attributes:
        canvas: Network height and width.
        precision: Type of the convolutions.
        target: Name of a target; none = any runtime.
        typing: How the target builds; none = its first way.
        input_type: none = uint8, or float32 where the target cannot feed that.
        fixed_batch: Images per call; none = any number.
        top_k: Candidates per image.
    """

    canvas: tuple[int, int]
    precision: Precision = "fp32"
    target: str | None = None
    typing: Typing | None = None
    input_type: InputType | None = None
    fixed_batch: int | None = None
    top_k: int = 1000

    @property
    def kind(self) -> FileKind:
        """Types of the file."""
        if self.target is None:
            return _PORTABLE[self.precision]
        return TARGETS[self.target].file_for(self.precision, typing=self.typing)


def read_fixed_batch_of(batch: tuple[int, int, int] | None) -> int | None:
    """The one number that least, usual and most images are, if they are one."""
    return batch[0] if batch is not None and batch[0] == batch[2] else None


def write_portable_file(
    model: RetinaNet,
    card: ModelCard,
    request: FileRequest,
    *,
    calibration: CalibrationConfig,
    reading: ReadingConfig,
) -> bytes:
    """Export a network in the types that are wanted.

    Args:
        model: The trained network.
        card: Travels in the file.
        request: What file is wanted.
        calibration: Images and method for INT8.
        reading: How these images are read.

    Raises:
        ExportError: If the file cannot be written, or the target cannot take it.
        DatasetError, StorageError: If the calibration images cannot be used.
    """
    target = None if request.target is None else TARGETS[request.target]
    is_modelopt = request.kind.startswith("int8") and calibration.quantizer == "modelopt"
    if target is not None and is_modelopt:
        check_modelopt_target(target)
    takes_uint8 = target is None or target.takes_uint8
    content = export_onnx(
        model,
        card,
        ExportSettings(
            canvas=request.canvas,
            input_type=request.input_type or ("uint8" if takes_uint8 else "float32"),
            top_k=request.top_k,
            fixed_batch=request.fixed_batch,
        ),
    )
    if request.kind.startswith("int8"):
        batches = read_calibration(calibration, reading, request.canvas)
        content = _quantize(content, batches, calibration)
    if request.kind in ("fp16", "int8-fp16"):
        content = to_fp16(content)
    if target is not None:
        check_file(content, target, typing=request.typing)
    return content


def _quantize(
    content: bytes, batches: Iterator[UInt8[Tensor, "N 3 H W"]], calibration: CalibrationConfig
) -> bytes:
    if calibration.quantizer == "modelopt" and calibration.modelopt_python is not None:
        method: ModeloptMethod = "max" if calibration.method == "minmax" else "entropy"
        return quantize_with_modelopt(
            content,
            batches,
            python=calibration.modelopt_python,
            method=method,
        )
    settings = CalibrationSettings(
        method=calibration.method, percentile=calibration.percentile, threads=count_cores()
    )
    return quantize(content, batches, settings)


def read_calibration(
    calibration: CalibrationConfig, reading: ReadingConfig, canvas: tuple[int, int]
) -> Iterator[UInt8[Tensor, "N 3 H W"]]:
    """Batches of calibration images, drawn from all of them, the same ones each time.

    Yields:
        Full batches, and a smaller last one; images that cannot be used are left out and logged.

    Raises:
        DatasetError: If no image can be used.
        StorageError: If the images cannot be listed or read.
    """
    if calibration.images is None:
        raise DatasetError(
            "expected calibration images for INT8, got none: give --calibration-images with "
            "images like those that the model will see"
        )
    storage = Storage(endpoint_url=reading.endpoint_url)
    sources = list(islice(list_sources(calibration.images, None, storage), _MAX_LISTED))
    random.Random(0).shuffle(sources)
    wanted = calibration.batches * calibration.batch
    canvases = islice(_load_usable(sources, canvas, reading), wanted)
    count = 0
    while batch := list(islice(canvases, calibration.batch)):
        count += len(batch)
        yield torch.stack(batch)
    if count == 0:
        raise DatasetError(f"{calibration.images}: no image could be used for calibration")


def _load_usable(
    sources: list[ImageSource], canvas: tuple[int, int], reading: ReadingConfig
) -> Iterator[UInt8[Tensor, "3 H W"]]:
    storage = Storage(endpoint_url=reading.endpoint_url)
    read, settings = make_source_reader(sources, storage), make_read_settings(reading)
    for source in sources:
        try:
            pixels, _ = load_canvas(source, canvas, read, settings)
        except IMAGE_FAULTS as error:
            logger.warning("calibration goes on without an image: %s", error)
            continue
        yield torch.from_numpy(pixels).permute(2, 0, 1)
