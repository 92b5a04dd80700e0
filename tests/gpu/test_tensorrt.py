"""Engines that are really built and run: parity with torch, graphs, threads, refusals, speed."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torchvision.ops import box_iou

from retinaray.detector.postprocess import Detections
from retinaray.errors import InferenceError
from retinaray.export.mixed_precision import to_fp16
from retinaray.export.quantization import quantize
from retinaray.export.trt_engine import EngineSettings, PlanFiles, build_plan
from retinaray.inference.plan_sidecar import read_sidecar
from retinaray.inference.predictor import Predictor, PredictorSettings
from retinaray.inference.tensorrt_backend import (
    TensorRtPredictor,
    load_tensorrt_plan,
    load_tensorrt_predictor,
)
from retinaray.inference.tensorrt_loading import flavour_of, load_tensorrt
from retinaray.inference.torch_backend import TorchPredictor

HAS_PACKAGE = any(map(importlib.util.find_spec, ("tensorrt", "tensorrt_rtx_bindings")))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not HAS_PACKAGE, reason="needs tensorrt or tensorrt_rtx_bindings"),
]

BATCH = 4
# TF32 rounds to 10 bits of mantissa; what is compared with float32 must not.
EXACT = EngineSettings(batch=(1, BATCH, BATCH), allow_tf32=False, optimization_level=1)
SETTINGS = PredictorSettings(batch=BATCH)
# A detection this close to its threshold may fall on either side of it.
MARGIN = 0.05


@pytest.fixture(scope="module")
def trt() -> Any:
    """TensorRT, or TensorRT-RTX where only that is installed."""
    return load_tensorrt()


@pytest.fixture(scope="module")
def needs_tensorrt(trt: Any) -> None:
    """What TensorRT-RTX does not have."""
    if flavour_of(trt) != "tensorrt":
        pytest.skip("needs the tensorrt package; here is TensorRT-RTX only")


@pytest.fixture(scope="module")
def images(detector: Any) -> torch.Tensor:
    """Ten pictures: two full batches and half of one."""
    return detector.make_images(10)


@pytest.fixture(scope="module")
def expected(detector: Any, images: torch.Tensor) -> list[Detections]:
    """What torch finds in them on the CPU, in float32."""
    predictor = TorchPredictor(detector.model, card=detector.card, settings=SETTINGS)
    found = predictor.predict(images)
    assert all(len(item) > 20 for item in found)
    return found


@pytest.fixture(scope="module")
def fp32(detector: Any) -> bytes:
    return detector.export()


@pytest.fixture(scope="module")
def files(trt: Any, fp32: bytes) -> PlanFiles:
    """The float32 plan; most tests share it."""
    return build_plan(fp32, uri="m.onnx", settings=EXACT)


@pytest.fixture
def predictor(files: PlanFiles) -> Iterator[TensorRtPredictor]:
    loaded = load_tensorrt_plan(files.plan, files.sidecar, uri="m.plan", settings=SETTINGS)
    yield loaded
    loaded.close()


def find_differences(
    expected: list[Detections], found: list[Detections], thresholds: tuple[float, ...]
) -> tuple[float, float, float]:
    """Largest corner difference, largest score difference, and share of boxes without a partner.

    Boxes that score clearly above their threshold are looked for, by class and overlap.
    """
    boxes, scores, num_missing, num_clear = 0.0, 0.0, 0, 0
    for right, other in zip(expected, found, strict=True):
        clear = right.scores > torch.tensor(thresholds)[right.labels] + MARGIN
        overlaps = box_iou(right.boxes_xyxy[clear], other.boxes_xyxy)
        overlaps = overlaps * (right.labels[clear][:, None] == other.labels[None])
        best, partner = overlaps.max(dim=1) if len(other) else (torch.zeros(0), None)
        is_matched = best > 0.5
        num_clear += int(clear.sum())
        num_missing += int(clear.sum()) - int(is_matched.sum())
        if partner is not None and is_matched.any():
            pairs = partner[is_matched]
            shifts = (right.boxes_xyxy[clear][is_matched] - other.boxes_xyxy[pairs]).abs()
            boxes = max(boxes, float(shifts.max()))
            changes = (right.scores[clear][is_matched] - other.scores[pairs]).abs()
            scores = max(scores, float(changes.max()))
    assert num_clear
    return boxes, scores, num_missing / num_clear


def assert_same(found: list[Detections], other: list[Detections]) -> None:
    """The same engine on the same pixels."""
    for one, two in zip(found, other, strict=True):
        assert torch.equal(one.labels, two.labels)
        torch.testing.assert_close(one.boxes_xyxy, two.boxes_xyxy, rtol=0, atol=1e-3)
        torch.testing.assert_close(one.scores, two.scores, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- parity


def test_fp32_engine_finds_the_boxes_of_torch(
    predictor: TensorRtPredictor, images: torch.Tensor, expected: list[Detections]
) -> None:
    found = predictor.predict(images)
    boxes, scores, missing = find_differences(expected, found, predictor.card.score_thresholds)
    assert missing == 0
    assert boxes < 0.05
    assert scores < 1e-3


@pytest.mark.usefixtures("trt")
def test_fp16_engine_stays_close_to_torch(
    detector: Any, fp32: bytes, images: torch.Tensor, expected: list[Detections]
) -> None:
    built = build_plan(to_fp16(fp32), uri="m.onnx", settings=EXACT)
    assert read_sidecar(built.sidecar, uri="m.plan").precision == "fp16"
    predictor = load_tensorrt_plan(built.plan, built.sidecar, uri="m.plan", settings=SETTINGS)
    boxes, scores, missing = find_differences(
        expected, predictor.predict(images), detector.card.score_thresholds
    )
    assert missing < 0.02
    assert boxes < 1.0
    assert scores < 0.05


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize("rest", ["fp32", "fp16"])
def test_int8_engine_stays_close_to_torch(
    detector: Any, fp32: bytes, images: torch.Tensor, expected: list[Detections], rest: str
) -> None:
    content = quantize(fp32, detector.make_images(16, seed=1).split(BATCH))
    content = to_fp16(content) if rest == "fp16" else content
    built = build_plan(content, uri="m.onnx", settings=EXACT)
    assert read_sidecar(built.sidecar, uri="m.plan").precision == "int8"
    predictor = load_tensorrt_plan(built.plan, built.sidecar, uri="m.plan", settings=SETTINGS)
    _, _, missing = find_differences(
        expected, predictor.predict(images), detector.card.score_thresholds
    )
    # Random weights suffer more from rounding than trained ones.
    assert missing < 0.25


@pytest.mark.usefixtures("trt")
@pytest.mark.parametrize("fixed_batch", [None, 3])
def test_float32_input_and_fixed_batches_find_the_same(
    detector: Any, images: torch.Tensor, expected: list[Detections], fixed_batch: int | None
) -> None:
    content = detector.export("float32", fixed_batch)
    settings = PredictorSettings(batch=BATCH, precision="fp32")
    predictor = load_tensorrt_predictor(content, uri="m.onnx", settings=settings)
    assert predictor.batch == (fixed_batch or BATCH)
    boxes, scores, missing = find_differences(
        expected, predictor.predict(images), detector.card.score_thresholds
    )
    assert (missing, boxes < 0.05, scores < 1e-3) == (0, True, True)


# ---------------------------------------------------------------- running


def test_predictor_replays_a_cuda_graph_that_finds_the_same_as_single_launches(
    trt: Any, predictor: TensorRtPredictor, images: torch.Tensor
) -> None:
    if flavour_of(trt) != "tensorrt" and not predictor.uses_cuda_graph:
        pytest.skip("TensorRT-RTX does not let this engine be recorded")
    assert predictor.uses_cuda_graph
    replayed = predictor.predict(images)
    predictor._replay = None
    assert_same(predictor.predict(images), replayed)


def test_last_batch_is_padded_without_a_trace(
    predictor: TensorRtPredictor, images: torch.Tensor
) -> None:
    together = predictor.predict(images)
    assert len(together) == len(images) == 10
    alone = [predictor.predict(image[None])[0] for image in images]
    assert_same(alone, together)


def test_predict_batches_finds_the_same_in_every_layout(
    predictor: TensorRtPredictor, images: torch.Tensor
) -> None:
    by_pixel = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    many = list(predictor.predict_batches(list(by_pixel.split(BATCH)) * 20))
    for round_number in range(20):
        parts = many[3 * round_number : 3 * round_number + 3]
        assert_same([found for part in parts for found in part], predictor.predict(images))


def test_predictors_on_two_threads_load_capture_and_run_at_once(
    files: PlanFiles, images: torch.Tensor, predictor: TensorRtPredictor
) -> None:
    barrier = Barrier(2)

    def work(_: int) -> tuple[bool, list[Detections]]:
        barrier.wait(timeout=60)
        own = load_tensorrt_plan(files.plan, files.sidecar, uri="m.plan", settings=SETTINGS)
        found = [own.predict(images) for _ in range(30)][-1]
        return own.uses_cuda_graph, found

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, range(2)))
    for uses_graph, found in results:
        assert uses_graph == predictor.uses_cuda_graph
        assert_same(found, predictor.predict(images))


def test_capture_survives_a_thread_that_allocates(
    files: PlanFiles, images: torch.Tensor, predictor: TensorRtPredictor
) -> None:
    is_done = False

    def allocate() -> int:
        """What a recording forbids to its own thread, and by default to all."""
        kept, count = [], 0
        while not is_done:
            event = torch.cuda.Event()
            event.record()
            event.query()
            if len(kept) < 100:
                # Too large to come from memory that torch keeps.
                kept.append(torch.empty(20 << 20, dtype=torch.uint8, device="cuda"))
            count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        allocating = pool.submit(allocate)
        try:
            own = [
                load_tensorrt_plan(files.plan, files.sidecar, uri="m.plan", settings=SETTINGS)
                for _ in range(3)
            ]
        finally:
            is_done = True
        assert allocating.result() > 0
    assert [item.uses_cuda_graph for item in own] == [predictor.uses_cuda_graph] * 3
    assert_same(own[-1].predict(images), predictor.predict(images))


def test_close_gives_the_memory_back(files: PlanFiles, images: torch.Tensor) -> None:
    def measure() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def run() -> None:
        own = load_tensorrt_plan(files.plan, files.sidecar, uri="m.plan", settings=SETTINGS)
        own.predict(images)
        own.close()

    run()
    before = measure()
    for _ in range(5):
        run()
    # Five engines that stayed would hold their weights, 20 MB each.
    assert before - measure() < len(files.plan)


def test_predictor_runs_on_another_than_the_first_gpu(
    files: PlanFiles, images: torch.Tensor, predictor: TensorRtPredictor
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(1):
        other = load_tensorrt_plan(files.plan, files.sidecar, uri="m.plan", settings=SETTINGS)
    assert_same(other.predict(images), predictor.predict(images))


# ---------------------------------------------------------------- plans


def test_plan_is_refused_by_another_version(files: PlanFiles) -> None:
    values = json.loads(files.sidecar) | {"version": "10.0.1"}
    with pytest.raises(InferenceError, match=r"10\.0\.1, here is .*retinaray export model\.pth"):
        load_tensorrt_plan(files.plan, json.dumps(values).encode(), uri="m.plan", settings=SETTINGS)


def test_plan_is_refused_on_another_gpu(files: PlanFiles) -> None:
    values = json.loads(files.sidecar)
    values["gpu"] |= {"name": "Tesla T4", "compute_capability": [7, 5]}
    with pytest.raises(InferenceError, match=r"Tesla T4 .* here is"):
        load_tensorrt_plan(files.plan, json.dumps(values).encode(), uri="m.plan", settings=SETTINGS)


def test_damaged_plan_is_an_error_with_tensorrt_own_reason(
    trt: Any, files: PlanFiles, detector: Any
) -> None:
    with pytest.raises(InferenceError, match=r"m\.plan: TensorRT.* does not load this engine: .+"):
        TensorRtPredictor(trt, bytes(4096), card=detector.card, uri="m.plan", settings=SETTINGS)


@pytest.mark.usefixtures("needs_tensorrt")
@pytest.mark.parametrize(
    "settings",
    [
        EngineSettings(batch=(1, BATCH, BATCH), allow_tf32=False, version_compatible=True),
        EngineSettings(batch=(1, BATCH, BATCH), allow_tf32=False, hardware_compatibility="ampere+"),
    ],
    ids=["version", "hardware"],
)
def test_portable_plans_find_the_same(
    fp32: bytes,
    detector: Any,
    images: torch.Tensor,
    expected: list[Detections],
    settings: EngineSettings,
) -> None:
    if settings.hardware_compatibility != "none" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs an Ampere GPU or a newer one")
    built = build_plan(fp32, uri="m.onnx", settings=settings)
    predictor = load_tensorrt_plan(built.plan, built.sidecar, uri="m.plan", settings=SETTINGS)
    boxes, scores, missing = find_differences(
        expected, predictor.predict(images), detector.card.score_thresholds
    )
    assert (missing, boxes < 0.05, scores < 1e-3) == (0, True, True)


@pytest.mark.usefixtures("needs_tensorrt")
def test_timing_cache_of_one_build_is_taken_by_the_next(
    fp32: bytes, files: PlanFiles, caplog: pytest.LogCaptureFixture
) -> None:
    assert files.timing_cache
    settings = EngineSettings(
        batch=EXACT.batch,
        allow_tf32=False,
        optimization_level=1,
        timing_cache=files.timing_cache,
    )
    again = build_plan(fp32, uri="m.onnx", settings=settings)
    assert again.timing_cache
    assert "timing cache" not in caplog.text


# ---------------------------------------------------------------- speed


def test_throughput_is_measured(
    predictor: TensorRtPredictor,
    detector: Any,
    images: torch.Tensor,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    batch = images[:BATCH]
    reference: Predictor = TorchPredictor(
        detector.model.to("cuda"), card=detector.card, settings=SETTINGS
    )
    try:
        speeds = {
            "torch": measure_speed(lambda: [reference.predict(batch) for _ in range(50)]),
            "predict": measure_speed(lambda: [predictor.predict(batch) for _ in range(50)]),
            "predict_batches": measure_speed(lambda: list(predictor.predict_batches([batch] * 50))),
        }
    finally:
        detector.model.to("cpu")
    report = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
    record_property("images_per_s", report)
    with capsys.disabled():
        sys.stdout.write(f"\n{torch.cuda.get_device_name()}, images per second: {report}\n")
    # A figure, not a promise; but reading ahead must not cost.
    assert speeds["predict_batches"] > 0.8 * speeds["predict"]


def measure_speed(run: Callable[[], list[Any]]) -> float:
    """Images per second of 50 batches, the best of three."""
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        assert len(run()) == 50
        times.append(time.perf_counter() - start)
    return 50 * BATCH / min(times[1:])
