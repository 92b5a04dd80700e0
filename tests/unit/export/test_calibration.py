"""Limits of activations: against numpy, against loops, and over streams of images."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from onnx import helper
from torch import Tensor

from retinaray.errors import ExportError
from retinaray.export.calibration import (
    CALIBRATION_METHODS,
    CalibrationSettings,
    MagnitudeHistogram,
    calibrate,
)

MINMAX = CalibrationSettings(method="minmax")


@pytest.fixture
def scaled_file(build_contract_file: Callable[..., bytes]) -> bytes:
    """A graph whose tensors are simple functions of the pixels."""
    nodes = [
        helper.make_node("Mul", ["pixels", "factor"], ["scaled"], name="scaled"),
        helper.make_node("Mul", ["pixels", "zero"], ["dead"], name="dead"),
    ]
    constants = {"factor": np.float32(-0.5), "zero": np.float32(0)}
    arrays = {name: np.asarray(value) for name, value in constants.items()}
    return build_contract_file(nodes, arrays, ends=("scaled", "dead", "pixels"))


def make_images(*values: int) -> Tensor:
    """One image of 8x8 for each value, all of it."""
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)


def fill(*arrays: npt.NDArray[np.float32]) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram()
    for array in arrays:
        histogram.add(array)
    return histogram


@pytest.mark.parametrize("share", [50.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("parts", [1, 7])
def test_find_percentile_is_numpys_when_data_come_in_parts(share: float, parts: int) -> None:
    values = np.random.default_rng(0).normal(size=70_000).astype(np.float32)
    histogram = fill(*np.split(values, parts))
    expected = np.percentile(np.abs(values), share)
    # The range doubles from the first part's maximum: bins are at most twice that over 1024.
    assert histogram.find_percentile(share) == pytest.approx(expected, abs=2 * 5 / 1024)
    assert histogram.find_percentile(100) == histogram.largest == np.abs(values).max()


def test_histogram_counts_every_value_once_when_its_range_doubles() -> None:
    rng = np.random.default_rng(1)
    parts = [(rng.random(1000) * scale).astype(np.float32) for scale in (1e-6, 0, 0.3, 900, 0.01)]
    histogram = fill(*parts)
    assert histogram._counts.sum() == 5000
    assert histogram.largest <= histogram._range < 2 * histogram.largest
    # The same in one go, over the range that it came to.
    expected, _ = np.histogram(np.concatenate(parts), bins=2048, range=(0, histogram._range))
    assert np.abs(histogram._counts - expected).sum() <= 4  # at the edges of bins


def test_histogram_stays_small_when_the_first_image_is_dark() -> None:
    # Bins of the first image's width would be thousands of millions.
    histogram = fill(np.full(10, 1e-7, np.float32), np.full(10, 1e3, np.float32))
    assert histogram._counts.shape == (2048,)
    assert histogram.find_percentile(100) == 1e3


def test_find_entropy_limit_finds_least_divergence_by_plain_loops() -> None:
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.laplace(size=50_000), [25.0]]).astype(np.float32)
    histogram = fill(values)
    counts = histogram._counts.astype(float)
    counts[0] = counts[1]
    best, limit = np.inf, 0.0
    for kept in range(128, 2049, 8):
        clipped = [*counts[:kept]]
        clipped[-1] += sum(counts[kept:])
        levels: list[list[int]] = [[] for _ in range(128)]
        for index in range(kept):
            levels[index * 128 // kept].append(index)
        quantized = [0.0] * kept
        for members in levels:
            filled = [index for index in members if counts[index] > 0]
            mean = sum(counts[index] for index in members) / max(1, len(filled))
            for index in filled:
                quantized[index] = mean
        divergence, total, total_quantized = 0.0, sum(clipped), sum(quantized)
        for p, q in zip(clipped, quantized, strict=True):
            if p > 0:
                p, q = p / total, q / total_quantized
                divergence += p * np.log(p / q) if q > 0 else np.inf
        if divergence < best:
            best, limit = divergence, kept * histogram._range / 2048
    assert histogram.find_entropy_limit() == pytest.approx(min(limit, 25.0))


def test_find_entropy_limit_cuts_an_outlier_off() -> None:
    values = np.random.default_rng(3).normal(size=100_000).astype(np.float32)
    values[0] = 40.0
    assert 2.5 <= fill(values).find_entropy_limit() < 10


def test_find_entropy_limit_keeps_what_has_no_tail() -> None:
    values = np.random.default_rng(4).random(100_000).astype(np.float32)
    assert fill(values).find_entropy_limit() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("value", [1e-30, 1.0, 6e4])
def test_every_limit_is_the_value_when_there_is_only_one(value: float) -> None:
    histogram = fill(np.full(100, value, np.float32))
    assert histogram.find_entropy_limit() == pytest.approx(value, rel=1e-3)
    assert histogram.find_percentile(99) == pytest.approx(value, rel=1e-3)


def test_calibrate_measures_magnitudes_of_inner_tensors(scaled_file: bytes) -> None:
    names = ["pixels", "scaled", "dead"]
    limits = calibrate(scaled_file, names, [make_images(7, 200), make_images(3)], MINMAX)
    assert limits == {"pixels": 200.0, "scaled": 100.0, "dead": 0.0}


@pytest.mark.parametrize("method", CALIBRATION_METHODS)
def test_calibrate_gives_the_same_in_whatever_batches_images_come(
    scaled_file: bytes, method: Any
) -> None:
    settings = CalibrationSettings(method=method, percentile=90)
    images = make_images(0, 7, 200, 3, 90, 90)
    whole = calibrate(scaled_file, ["scaled"], [images], settings)
    parts = calibrate(scaled_file, ["scaled"], iter(images.split([1, 3, 2])), settings)
    assert whole == parts
    assert 40 <= whole["scaled"] <= 100


def test_calibrate_keeps_no_batch(scaled_file: bytes) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def batches() -> Iterator[Tensor]:
        nonlocal most
        for value in range(6):
            batch = make_images(value, value).clone()
            alive.append(weakref.ref(batch))
            yield batch
            del batch
            most = max(most, sum(reference() is not None for reference in alive))

    calibrate(scaled_file, ["scaled"], batches(), MINMAX)
    assert len(alive) == 6
    assert most <= 1


@pytest.mark.parametrize("batches", [[], [make_images()]])
def test_calibrate_refuses_to_go_without_images(scaled_file: bytes, batches: list[Tensor]) -> None:
    with pytest.raises(ExportError, match="got none: give some hundred of the training images"):
        calibrate(scaled_file, ["scaled"], batches, MINMAX)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (make_images(1)[0], r"got torch.uint8 \(3, 8, 8\)"),
        (make_images(1)[..., :7], r"\('N', 3, 8, 8\), got torch.uint8 \(1, 3, 8, 7\)"),
        (make_images(1).float(), r"got torch.float32 \(1, 3, 8, 8\)"),
    ],
)
def test_calibrate_refuses_images_that_do_not_fit(
    scaled_file: bytes, batch: Tensor, text: str
) -> None:
    with pytest.raises(ExportError, match=text):
        calibrate(scaled_file, ["scaled"], [batch], MINMAX)


def test_calibrate_refuses_activations_that_are_not_finite(
    build_contract_file: Callable[..., bytes],
) -> None:
    node = helper.make_node("Mul", ["pixels", "factor"], ["scaled"], name="scaled")
    factor = np.array(np.inf, np.float32)
    content = build_contract_file([node], {"factor": factor}, ends=("scaled",) * 3)
    with pytest.raises(ExportError, match="calibration image 0: tensor 'scaled' is not finite"):
        calibrate(content, ["pixels", "scaled"], [make_images(1, 2)[:0], make_images(1)], MINMAX)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"method": "kl"}, "method='kl': expected one of entropy, minmax, percentile"),
        ({"percentile": 0.0}, "percentile=0.0: expected more than 0"),
        ({"percentile": 100.1}, "percentile=100.1: expected more than 0, at most 100"),
    ],
)
def test_calibration_settings_refuse_what_is_out_of_range(
    values: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        CalibrationSettings(**values)
