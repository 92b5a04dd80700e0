"""Largest magnitudes for INT8: what a graph's tensors hold on real images, by three methods.

Images go through one by one and only counts stay, so that memory does not grow with their number.
ONNX Runtime's own collectors are not used: their histograms keep the bin width of the first image,
and so grow without limit after a dark one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import UInt8
from torch import Tensor

from retinaray.errors import ExportError
from retinaray.export.graph_index import load_graph
from retinaray.export.onnx_graph import set_batch
from retinaray.inference.onnx_contract import INPUT_NAME

logger = logging.getLogger(__name__)

CalibrationMethod = Literal["entropy", "minmax", "percentile"]
CALIBRATION_METHODS: tuple[CalibrationMethod, ...] = ("entropy", "minmax", "percentile")

_NUM_BINS = 2048
# Magnitudes that INT8 tells apart, zero included.
_NUM_LEVELS = 128
# The limit is searched in steps of this many bins.
_SEARCH_STEP = 8


@dataclass(frozen=True)
class CalibrationSettings:
    """How activations are quantised.

    Attributes:
        method: `entropy` loses least information, `minmax` cuts nothing off, `percentile` cuts off
            the largest.
        percentile: Share of the values that `percentile` keeps, in (0, 100].
        quantize_outputs: Quantise the last layer of each head too.
        threads: Of the runtime that runs the images.

    Raises:
        ValueError: If a value is outside its range.
    """

    method: CalibrationMethod = "entropy"
    percentile: float = 99.99
    quantize_outputs: bool = True
    threads: int = 1

    def __post_init__(self) -> None:
        if self.method not in CALIBRATION_METHODS:
            raise ValueError(
                f"method={self.method!r}: expected one of {', '.join(CALIBRATION_METHODS)}"
            )
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile={self.percentile}: expected more than 0, at most 100")


class MagnitudeHistogram:
    """Magnitudes counted in a fixed number of equal bins from 0, whose range doubles as needed.

    Attributes:
        largest: Largest magnitude so far.
    """

    def __init__(self) -> None:
        self.largest = 0.0
        self._range = 0.0
        self._counts = np.zeros(_NUM_BINS, dtype=np.int64)

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Count values of any shape; they must be finite."""
        magnitudes = np.abs(values.ravel())
        self.largest = max(self.largest, float(magnitudes.max(initial=0.0)))
        if self.largest == 0.0:
            self._counts[0] += len(magnitudes)
            return
        self._range = self._range or self.largest
        while self._range < self.largest:
            self._counts[: _NUM_BINS // 2] = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts[_NUM_BINS // 2 :] = 0
            self._range *= 2
        bins = (magnitudes * (_NUM_BINS / self._range)).astype(np.int64)
        np.minimum(bins, _NUM_BINS - 1, out=bins)
        self._counts += np.bincount(bins, minlength=_NUM_BINS)

    def find_percentile(self, percentile: float) -> float:
        """Upper edge of the bin below which this share of the values lies."""
        shares = np.cumsum(self._counts) / self._counts.sum()
        last = int(np.searchsorted(shares, percentile / 100))
        return min((last + 1) * self._range / _NUM_BINS, self.largest)

    def find_entropy_limit(self) -> float:
        """The limit whose INT8 values tell most about the values.

        Source: Migacz 2017, "8-bit inference with TensorRT": least Kullback-Leibler divergence of
        the quantised counts from the clipped ones. Exact zeros, which every limit keeps, would
        drown all else after a ReLU: as in NVIDIA's calibrators, the first bin counts as the second.
        """
        counts = self._counts.copy()
        counts[0] = counts[1]
        candidates = range(_NUM_LEVELS, _NUM_BINS + 1, _SEARCH_STEP)
        divergences = [_measure_divergence(counts, kept) for kept in candidates]
        best = candidates[int(np.argmin(divergences))]
        return min(best * self._range / _NUM_BINS, self.largest)


def _measure_divergence(counts: npt.NDArray[np.int64], kept: int) -> float:
    """How much the first `kept` bins lose when INT8's levels share them out; infinite = no data."""
    inner = counts[:kept]
    if not inner.any():
        return float("inf")
    clipped = inner.astype(np.float64)
    clipped[-1] += counts[kept:].sum()
    level = np.arange(kept) * _NUM_LEVELS // kept
    is_filled = inner > 0
    sums = np.bincount(level, inner, minlength=_NUM_LEVELS)
    filled = np.bincount(level, is_filled, minlength=_NUM_LEVELS)
    quantized = np.where(is_filled, sums[level] / np.maximum(filled[level], 1), 0.0)
    clipped, quantized = clipped / clipped.sum(), quantized / quantized.sum()
    # A bin that holds nothing but what was cut off has no counterpart: the worst that can be.
    if (quantized[clipped > 0] == 0).any():
        return float("inf")
    used = clipped > 0
    return float((clipped[used] * np.log(clipped[used] / quantized[used])).sum())


def calibrate(
    content: bytes,
    tensors: Sequence[str],
    batches: Iterable[UInt8[Tensor, "N 3 H W"]],
    settings: CalibrationSettings,
) -> dict[str, float]:
    """The largest magnitude that INT8 should hold of each tensor.

    Args:
        content: An exported float32 file.
        tensors: Names of float32 tensors of its graph.
        batches: Images of the file's canvas, preprocessed as for inference; one pass, any sizes.
        settings: Method and threads.

    Returns:
        Limit by tensor name; 0 for a tensor that was always 0. The same for the same images, in
        whatever batches they come.

    Raises:
        ExportError: If there are no images, one does not fit the file, or a tensor is not finite.
    """
    session = _make_session(content, tensors, settings.threads)
    histograms = {name: MagnitudeHistogram() for name in tensors}
    num_images = 0
    for batch in batches:
        for image in _split_batch(batch, session):
            for name, values in zip(
                tensors, session.run(tensors, {INPUT_NAME: image}), strict=True
            ):
                if not np.isfinite(values).all():
                    raise ExportError(
                        f"calibration image {num_images}: tensor {name!r} is not finite; "
                        "the weights or the image cannot be right"
                    )
                histograms[name].add(values)
            num_images += 1
    check_count(num_images)
    logger.info("calibrated %d tensors with %d images", len(tensors), num_images)
    return {name: _find_limit(histograms[name], settings) for name in tensors}


def _find_limit(histogram: MagnitudeHistogram, settings: CalibrationSettings) -> float:
    if settings.method == "minmax" or histogram.largest == 0.0:
        return histogram.largest
    if settings.method == "percentile":
        return histogram.find_percentile(settings.percentile)
    return histogram.find_entropy_limit()


def _make_session(content: bytes, tensors: Sequence[str], threads: int) -> Any:
    """A session of one image at a time that gives out inner tensors."""
    import onnxruntime
    from onnx import TensorProto, helper

    proto = load_graph(content)
    set_batch(proto, None)
    del proto.graph.output[:]
    proto.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in tensors
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _split_batch(batch: Tensor, session: Any) -> list[npt.NDArray[Any]]:
    """Single images in the input's type."""
    value = session.get_inputs()[0]
    check_images(batch, value.shape[1:])
    dtype = np.uint8 if value.type == "tensor(uint8)" else np.float32
    return list(batch.numpy().astype(dtype)[:, None])


def check_images(batch: Tensor, shape: Sequence[int]) -> None:
    """Refuse what is no batch of images for a file.

    Args:
        batch: What came.
        shape: Channels, height and width of the file's input.

    Raises:
        ExportError: If type or shape differ.
    """
    if batch.dtype != torch.uint8 or batch.ndim != 4 or list(batch.shape[1:]) != list(shape):
        raise ExportError(
            f"calibration needs uint8 images of {('N', *shape)}, got {batch.dtype} "
            f"{tuple(batch.shape)}"
        )


def check_count(num_images: int) -> None:
    """Refuse to calibrate with nothing.

    Raises:
        ExportError: If there are no images.
    """
    if num_images == 0:
        raise ExportError(
            "INT8 needs images to measure activations on, and got none: give some hundred of the "
            "training images"
        )
