"""Settings of reading as functions that read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retinaray.artifact import ModelCard, model_kind, read_weights
from retinaray.assembly.versioned_reading import VersionedReader
from retinaray.config.schema import DetectionConfig, ReadingConfig, TrainDataConfig
from retinaray.data.cache_folder import CacheFolder
from retinaray.data.decoded_cache import DecodedCache
from retinaray.data.read_cache import CheckedCache, ReadCache
from retinaray.errors import DatasetError, MissingFileError
from retinaray.inference.onnx_contract import read_onnx_card
from retinaray.inference.pipeline import ReadSettings
from retinaray.inference.plan_sidecar import read_sidecar, sidecar_uri
from retinaray.inference.predictor import PredictorSettings
from retinaray.storage import Storage, is_s3, local_path


def make_reader(reading: ReadingConfig) -> Callable[[str], bytes]:
    """A function that gives the bytes at a URI."""
    return Storage(endpoint_url=reading.endpoint_url).read_bytes


def make_image_sources(
    data: TrainDataConfig, reading: ReadingConfig
) -> tuple[Callable[[str], bytes], DecodedCache | None]:
    """How training images are read, and how they are decoded if not from what is read.

    Args:
        data: Whether something is kept on this machine, what, and where; the folder is made here.
        reading: How it is read.

    Returns:
        What gives the bytes at a URI, and what gives pixels in its place; none = nothing does.
    """
    if data.cache is None:
        return make_reader(reading), None
    cache = CheckedCache(
        CacheFolder(Path(data.cache), max_bytes=int(data.cache_gb * 1e9)),
        VersionedReader(Storage(endpoint_url=reading.endpoint_url)),
        recheck_s=data.cache_recheck_s,
    )
    if not data.cache_decoded:
        return ReadCache(cache), None
    decoded = DecodedCache(
        cache, max_pixels=reading.max_pixels, allow_truncated=reading.allow_truncated
    )
    return make_reader(reading), decoded


def make_read_settings(reading: ReadingConfig) -> ReadSettings:
    """Reading as the pipeline wants it."""
    return ReadSettings(
        threads=reading.threads,
        max_pixels=reading.max_pixels,
        allow_truncated=reading.allow_truncated,
        max_bytes=reading.max_file_bytes,
        max_seconds=reading.max_seconds,
        decode_bytes=reading.decode_memory_mib << 20,
    )


def make_predictor_settings(
    detection: DetectionConfig, *, batch: int, threads: int
) -> PredictorSettings:
    """Detection as a predictor wants it; `resize` and `max_size` become a landscape canvas."""
    canvas = detection.size
    if detection.resize is not None and detection.max_size is not None:
        canvas = (detection.resize, detection.max_size)
    return PredictorSettings(
        batch=batch,
        threads=threads,
        canvas=canvas,
        precision=detection.precision,
        score_threshold=detection.score_threshold,
        nms_iou=detection.nms_iou,
        max_detections=detection.max_detections,
        nms_kind=detection.nms_kind,
    )


def read_model_file(uri: str, read: Callable[[str], bytes]) -> tuple[bytes, bytes | None]:
    """A model file, and the description beside it if it is an engine that has one.

    Args:
        uri: The file.
        read: Gives the bytes at a URI.

    Raises:
        StorageError: If it cannot be read.
    """
    content = read(uri)
    if model_kind(uri) != "plan":
        return content, None
    try:
        return content, read(sidecar_uri(uri))
    except MissingFileError:
        # Whoever loads it says what is missing and what to do.
        return content, None


def read_model_card(content: bytes, sidecar: bytes | None, uri: str) -> ModelCard:
    """The card of a model file of any kind.

    Raises:
        CheckpointError: If the file is damaged or none of ours.
    """
    kind = model_kind(uri)
    if kind == "plan":
        return read_sidecar(sidecar, uri=uri).card
    if kind == "onnx":
        return read_onnx_card(content, uri=uri)[0]
    return read_weights(content, source=uri)[0]


def read_json(uri: str, reading: ReadingConfig) -> Any:
    """A JSON file, local or on S3.

    Raises:
        StorageError: If it cannot be read.
        DatasetError: If it is not JSON.
    """
    content = make_reader(reading)(uri)
    try:
        return json.loads(content)
    except ValueError as error:
        raise DatasetError(f"{uri}: expected JSON: {error}") from error


def absolute_uri(uri: str) -> str:
    """A local path made absolute, so that workers in other folders find it; S3 URIs as they are.

    Raises:
        StorageError: If the URI has another scheme than s3:// or file://.
    """
    return uri if is_s3(uri) else str(local_path(uri).expanduser().resolve())
