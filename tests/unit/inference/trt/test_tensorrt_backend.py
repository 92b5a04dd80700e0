"""The predictor on a recorded TensorRT: batches, buffers, streams, graphs, refusals."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import retinaray.export.trt_engine as trt_engine
import retinaray.inference.tensorrt_backend as backend
from retinaray.artifact import ModelCard
from retinaray.errors import CheckpointError, InferenceError
from retinaray.inference.onnxruntime_backend import OnnxRuntimePredictor
from retinaray.inference.plan_sidecar import GpuInfo, read_sidecar
from retinaray.inference.predictor import PredictorSettings
from retinaray.inference.tensorrt_backend import TensorRtPredictor
from retinaray.inference.tensorrt_building import EngineSettings, build_engine

LEFT, RIGHT, TOP = [0.0, 0, 48, 64], [48.0, 0, 96, 64], [0.0, 0, 96, 32]
MakePredictor = Callable[..., TensorRtPredictor]


def paint(left: int, right: int = 0, blue: int = 0) -> torch.Tensor:
    """A canvas whose scores are left/255 and right/255 (red) and blue/255 (of its upper half)."""
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)
    image[0, :, :48], image[0, :, 48:], image[2, :32] = left, right, blue
    return image


def describe(found: Any) -> list[tuple[int, list[float], float]]:
    """Label, box and score in 255ths of each detection."""
    rows = zip(found.labels.tolist(), found.boxes_xyxy.tolist(), found.scores.tolist(), strict=True)
    return [(label, box, round(score * 255, 3)) for label, box, score in rows]


@pytest.fixture
def make_predictor(world: Any, painter: bytes, tiny_card: ModelCard) -> MakePredictor:
    """A predictor on a freshly built plan: make_predictor(trt, batch=4, profile=(1, 4, 4))."""

    def make(
        trt: Any,
        *,
        content: bytes = painter,
        card: ModelCard = tiny_card,
        profile: tuple[int, int, int] = (1, 4, 4),
        version_compatible: bool = False,
        allow_host_code: bool = False,
        **settings: Any,
    ) -> TensorRtPredictor:
        building = EngineSettings(batch=profile, version_compatible=version_compatible)
        return TensorRtPredictor(
            trt,
            build_engine(trt, content, building).plan,
            card=card,
            uri="m.plan",
            settings=PredictorSettings(**({"batch": 4} | settings)),
            allow_host_code=allow_host_code,
            device=world.device,
        )

    return make


@pytest.fixture
def gpu_machine(monkeypatch: pytest.MonkeyPatch, world: Any) -> Callable[[Any, GpuInfo], None]:
    """Make this a machine with a TensorRT and a GPU: gpu_machine(trt, GpuInfo(...))."""

    def make(trt: Any, gpu: GpuInfo) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        monkeypatch.setattr(backend, "CudaDevice", lambda: world.device)
        monkeypatch.setattr(backend, "describe_gpu", lambda: gpu)
        monkeypatch.setattr(trt_engine, "describe_gpu", lambda: gpu)

    return make


H200 = GpuInfo("NVIDIA H200", (9, 0), "13.0", "580.95.05")
A30 = GpuInfo("NVIDIA A30", (8, 0), "13.0", "580.95.05")


# ---------------------------------------------------------------- what is found


def test_predict_gives_each_image_its_own_detections(
    trt: Any, make_predictor: MakePredictor
) -> None:
    predictor = make_predictor(trt)
    images = torch.stack([paint(200, 100), paint(10), paint(0, 255, 128)])
    found = predictor.predict(images)
    # The card's threshold is 0.3 for all classes: 76.5 of 255.
    assert [describe(item) for item in found] == [
        [(0, LEFT, 200), (1, RIGHT, 100)],
        [],
        [(1, RIGHT, 255), (2, TOP, 128)],
    ]
    assert found[0].boxes_xyxy.device.type == "cpu"


@pytest.mark.parametrize("input_type", ["uint8", "float32"])
@pytest.mark.parametrize("is_pixel_by_pixel", [False, True])
def test_predict_takes_every_memory_layout_and_input_type(
    trt11: Any,
    make_predictor: MakePredictor,
    make_painter: Callable[..., bytes],
    input_type: str,
    is_pixel_by_pixel: bool,
) -> None:
    predictor = make_predictor(trt11, content=make_painter(input_type=input_type))
    images = torch.stack([paint(200, 100, 90), paint(250)])
    if is_pixel_by_pixel:
        images = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert [describe(item) for item in predictor.predict(images)] == [
        [(0, LEFT, 200), (1, RIGHT, 100), (2, TOP, 90)],
        [(0, LEFT, 250)],
    ]


def test_predict_finds_what_onnxruntime_finds_in_a_real_detector(
    trt11: Any, make_predictor: MakePredictor, tiny_onnx: bytes
) -> None:
    settings = PredictorSettings(batch=2)
    predictor = make_predictor(trt11, content=tiny_onnx, profile=(1, 2, 2), batch=2)
    reference = OnnxRuntimePredictor(tiny_onnx, uri="m.onnx", settings=settings)
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (5, 3, 64, 96), dtype=torch.uint8, generator=generator)
    expected = reference.predict(images)
    for one, other in zip(predictor.predict(images), expected, strict=True):
        assert len(other) > 0
        assert torch.equal(one.labels, other.labels)
        torch.testing.assert_close(one.boxes_xyxy, other.boxes_xyxy, rtol=0, atol=1e-3)
        torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-5)


def test_predict_applies_the_card_threshold_of_each_class(
    trt11: Any, make_predictor: MakePredictor, tiny_card: ModelCard
) -> None:
    card = replace(tiny_card, score_thresholds=(0.3, 0.9, 0.5))
    found = make_predictor(trt11, card=card).predict(paint(80, 220, 130)[None])
    assert describe(found[0]) == [(2, TOP, 130), (0, LEFT, 80)]


def test_predict_applies_the_caller_threshold_and_suppression(
    trt11: Any, make_predictor: MakePredictor
) -> None:
    predictor = make_predictor(trt11, score_threshold=0.1, nms_kind="agnostic", nms_iou=0.3)
    # A quarter of the picture lies in the left and in the upper half: an overlap of a third.
    assert describe(predictor.predict(paint(200, 30, 100)[None])[0]) == [
        (0, LEFT, 200),
        (1, RIGHT, 30),
    ]


# ---------------------------------------------------------------- batches


def test_predict_fills_the_last_batch_with_black(
    trt11: Any, make_predictor: MakePredictor, world: Any
) -> None:
    predictor = make_predictor(trt11)
    predictor.predict(torch.full((8, 3, 64, 96), 255, dtype=torch.uint8))
    found = predictor.predict(paint(200)[None])
    assert [describe(item) for item in found] == [[(0, LEFT, 200)]]
    last = world.inputs[-1]
    assert last.shape == (4, 3, 64, 96)
    assert last[0].sum() == 200 * 48 * 64
    assert not last[1:].any()


@pytest.mark.parametrize("count", [0, 1, 4, 5, 13])
@pytest.mark.parametrize("is_eager", [False, True], ids=["late", "early"])
def test_predict_takes_any_number_of_images(
    trt11: Any, make_predictor: MakePredictor, world: Any, count: int, is_eager: bool
) -> None:
    world.device.is_eager = is_eager
    values = [100 + 10 * number for number in range(count)]
    images = torch.stack([paint(0), *[paint(value) for value in values]])[1:]
    found = make_predictor(trt11).predict(images)
    assert [describe(item) for item in found] == [[(0, LEFT, value)] for value in values]


@pytest.mark.parametrize(
    ("profile", "asked", "expected"),
    [((1, 4, 4), 4, 4), ((1, 4, 4), 3, 3), ((1, 2, 2), 8, 2), ((3, 4, 6), 1, 3)],
)
def test_predictor_keeps_to_the_batches_of_the_plan(
    trt: Any,
    make_predictor: MakePredictor,
    world: Any,
    profile: tuple[int, int, int],
    asked: int,
    expected: int,
) -> None:
    predictor = make_predictor(trt, profile=profile, batch=asked)
    assert predictor.batch == expected
    values = [90, 120, 150, 180, 210]
    found = predictor.predict(torch.stack([paint(value) for value in values]))
    assert [describe(item)[0][2] for item in found] == values
    assert {len(images) for images in world.inputs} == {expected}


def test_predictor_runs_a_fixed_batch(
    trt: Any, make_predictor: MakePredictor, make_painter: Callable[..., bytes]
) -> None:
    predictor = make_predictor(trt, content=make_painter(batch=3), batch=8)
    assert predictor.batch == 3
    found = predictor.predict(torch.stack([paint(value) for value in (90, 120, 150, 180)]))
    assert [describe(item)[0][2] for item in found] == [90, 120, 150, 180]


def test_predict_batches_reads_one_batch_ahead(trt11: Any, make_predictor: MakePredictor) -> None:
    taken: list[int] = []

    def give() -> Iterator[torch.Tensor]:
        for number in range(6):
            taken.append(number)
            yield torch.stack([paint(100 + number), paint(200 + number)])

    results = make_predictor(trt11).predict_batches(give())
    for number in range(6):
        found = next(results)
        assert [describe(item)[0][2] for item in found] == [100 + number, 200 + number]
        assert taken == list(range(min(number + 2, 6)))
    with pytest.raises(StopIteration):
        next(results)


def test_predict_batches_goes_on_after_a_loop_that_was_left(
    trt11: Any, make_predictor: MakePredictor
) -> None:
    predictor = make_predictor(trt11)
    left = predictor.predict_batches(paint(value)[None] for value in (90, 100, 110))
    assert describe(next(left)[0]) == [(0, LEFT, 90)]
    left.close()
    found = predictor.predict(torch.stack([paint(200 + number) for number in range(9)]))
    assert [describe(item)[0][2] for item in found] == [200 + number for number in range(9)]


def test_predict_batches_refuses_two_loops_at_once(
    trt11: Any, make_predictor: MakePredictor
) -> None:
    predictor = make_predictor(trt11)
    first = predictor.predict_batches(paint(value)[None] for value in (90, 100, 110))
    next(first)
    predictor.predict(torch.stack([paint(200)] * 8))
    with pytest.raises(InferenceError, match="one loop at a time"):
        next(first)


def test_staging_memory_is_filled_again_only_after_it_was_copied(
    trt11: Any, make_predictor: MakePredictor, world: Any
) -> None:
    predictor = make_predictor(trt11, batch=1)
    world.inputs.clear()
    # More batches than slots, and nobody reads a result, which would wait for the device too.
    for value in (50, 100, 150, 200, 250):
        predictor._submit(paint(value)[None])
    world.device.synchronize()
    assert [int(images[0, 0, 0, 0]) for images in world.inputs] == [50, 100, 150, 200, 250]


@pytest.mark.parametrize("count", [0, 5])
def test_predict_batches_refuses_other_batches(
    trt11: Any, make_predictor: MakePredictor, count: int
) -> None:
    batches = [torch.zeros(count, 3, 64, 96, dtype=torch.uint8)]
    with pytest.raises(ValueError, match=f"expected 1 to 4 images in a batch, got {count}"):
        list(make_predictor(trt11).predict_batches(batches))


# ---------------------------------------------------------------- CUDA graph


def test_predictor_replays_one_graph_for_full_and_partial_batches(
    trt: Any, make_predictor: MakePredictor, world: Any, caplog: pytest.LogCaptureFixture
) -> None:
    predictor = make_predictor(trt)
    assert predictor.uses_cuda_graph
    assert not caplog.records
    before = world.device.num_replays
    predictor.predict(torch.stack([paint(200)] * 6))
    assert world.device.num_replays - before == 2


@pytest.mark.parametrize("fault", ["refused", "empty", "broken"])
def test_predictor_runs_without_a_graph_and_says_so_once(
    trt11: Any,
    make_predictor: MakePredictor,
    world: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    def break_capture(work: Callable[[], None], stream: Any) -> Callable[[], None]:
        raise RuntimeError("CUDA error: operation not permitted\nCompile with TORCH_USE_CUDA_DSA")

    world.refuses_capture = fault == "refused"
    world.device.records_nothing = fault == "empty"
    if fault == "refused":
        # The parser would fail on it too.
        world.fail = lambda: world.log.log(trt11.ILogger.ERROR, "Error Code 1: stream is capturing")
    if fault == "broken":
        monkeypatch.setattr(world.device, "capture", break_capture)
    predictor = make_predictor(trt11)
    assert not predictor.uses_cuda_graph
    reasons = {
        "refused": "Error Code 1: stream is capturing",
        "empty": "the recording is empty",
        "broken": "(CUDA error: operation not permitted)",
    }
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert reasons[fault] in caplog.text
    found = predictor.predict(torch.stack([paint(100 + number) for number in range(9)]))
    assert [describe(item)[0][2] for item in found] == [100 + number for number in range(9)]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("is_ready", [False, True])
def test_predictor_asks_rtx_whether_it_can_be_recorded(
    make_trt: Callable[[str], Any],
    make_predictor: MakePredictor,
    world: Any,
    caplog: pytest.LogCaptureFixture,
    is_ready: bool,
) -> None:
    world.is_capturable = is_ready
    predictor = make_predictor(make_trt("rtx-1.7.1"))
    assert predictor.uses_cuda_graph == is_ready
    assert len(caplog.records) == (0 if is_ready else 1)


# ---------------------------------------------------------------- refusals


def test_predictor_says_why_a_plan_does_not_load(
    trt: Any, make_predictor: MakePredictor, world: Any
) -> None:
    world.answers_none = {"deserialize_cuda_engine"}
    # The parser would fail on it too.
    world.fail = lambda: world.log.log(trt.ILogger.ERROR, "expecting version 10.0")
    with pytest.raises(
        InferenceError,
        match=rf"m\.plan: TensorRT {trt.__version__} does not load .* expecting version 10\.0",
    ):
        make_predictor(trt)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("create_execution_context", "cannot make an execution context: .*smaller batch helps"),
        ("set_input_shape", "refuses batches of 4 images"),
        ("set_tensor_address", "refuses the memory of 'images'"),
    ],
)
def test_predictor_explains_each_failing_step(
    trt11: Any, make_predictor: MakePredictor, world: Any, method: str, message: str
) -> None:
    world.answers_none = {method}
    with pytest.raises(InferenceError, match=message):
        make_predictor(trt11)


def test_predictor_says_that_a_gpu_is_needed_when_there_is_no_runtime(
    trt11: Any, make_predictor: MakePredictor, world: Any
) -> None:
    world.without = {"Runtime"}
    with pytest.raises(InferenceError, match=r"gives no runtime .* needs a GPU and a driver"):
        make_predictor(trt11)


def test_predict_raises_with_the_reasons_when_the_engine_fails(
    trt11: Any, make_predictor: MakePredictor, world: Any
) -> None:
    predictor = make_predictor(trt11)
    world.fails_to_run = True
    world.errors = ["Error Code 2: out of memory"]
    # A recorded graph does not ask TensorRT any more.
    predictor._replay = None
    with pytest.raises(InferenceError, match="failed to run the engine: Error Code 2"):
        predictor.predict(paint(200)[None])


def test_predictor_refuses_an_engine_with_other_outputs(
    trt11: Any, make_predictor: MakePredictor, make_painter: Callable[..., bytes]
) -> None:
    with pytest.raises(CheckpointError, match="found images, boxes, points, labels"):
        make_predictor(trt11, content=make_painter(score_name="points"))


def test_predictor_refuses_an_engine_of_another_canvas(
    trt11: Any, make_predictor: MakePredictor, tiny_card: ModelCard
) -> None:
    with pytest.raises(CheckpointError, match=r"takes \(64, 96\) .* says \(32, 96\)"):
        make_predictor(trt11, card=replace(tiny_card, canvas=(32, 96)))


def test_predictor_runs_code_in_a_plan_only_when_it_is_allowed(
    trt: Any, make_predictor: MakePredictor, world: Any
) -> None:
    with pytest.raises(InferenceError, match="does not load"):
        make_predictor(trt, version_compatible=True)
    assert not world.host_code_allowed
    predictor = make_predictor(trt, version_compatible=True, allow_host_code=True)
    assert world.host_code_allowed
    assert describe(predictor.predict(paint(200)[None])[0]) == [(0, LEFT, 200)]


def test_close_frees_the_context_before_what_it_was_made_from(
    trt11: Any, make_predictor: MakePredictor, world: Any
) -> None:
    predictor = make_predictor(trt11)
    predictor.predict(paint(200)[None])
    world.freed.clear()
    predictor.close()
    assert world.freed == ["IExecutionContext", "ICudaEngine", "Runtime"]
    predictor.close()
    with pytest.raises(InferenceError, match=r"m\.plan: the predictor is closed"):
        predictor.predict(paint(200)[None])


def test_two_predictors_do_not_disturb_each_other(
    trt11: Any, make_predictor: MakePredictor, tiny_card: ModelCard
) -> None:
    strict = replace(tiny_card, score_thresholds=(0.9,) * 3)
    one, other = make_predictor(trt11), make_predictor(trt11, card=strict, batch=2)
    ones = one.predict_batches(paint(value)[None] for value in (240, 100, 150))
    others = other.predict_batches(paint(value)[None] for value in (100, 240, 90))
    pairs = [(describe(a[0]), describe(b[0])) for a, b in zip(ones, others, strict=True)]
    assert pairs == [
        ([(0, LEFT, 240)], []),
        ([(0, LEFT, 100)], [(0, LEFT, 240)]),
        ([(0, LEFT, 150)], []),
    ]


# ---------------------------------------------------------------- files


def test_load_tensorrt_predictor_builds_the_file_for_the_batch_asked_for(
    trt: Any, world: Any, painter: bytes, gpu_machine: Callable[[Any, GpuInfo], None]
) -> None:
    gpu_machine(trt, H200)
    predictor = backend.load_tensorrt_predictor(
        painter, uri="m.onnx", settings=PredictorSettings(batch=3)
    )
    assert [shape[0] for shape in world.profile] == [1, 3, 3]
    assert predictor.card.canvas == predictor.canvas == (64, 96)
    assert describe(predictor.predict(paint(0, 0, 77)[None])[0]) == [(2, TOP, 77)]


def test_load_tensorrt_predictor_runs_a_file_of_a_fixed_batch(
    trt11: Any,
    make_painter: Callable[..., bytes],
    gpu_machine: Callable[[Any, GpuInfo], None],
) -> None:
    gpu_machine(trt11, H200)
    predictor = backend.load_tensorrt_predictor(
        make_painter(batch=5), uri="m.onnx", settings=PredictorSettings(batch=2)
    )
    assert predictor.batch == 5
    assert describe(predictor.predict(paint(80)[None])[0]) == [(0, LEFT, 80)]


@pytest.mark.parametrize(("precision", "allows_tf32"), [("auto", True), ("fp32", False)])
def test_load_tensorrt_predictor_rounds_nothing_when_fp32_is_asked_for(
    trt11: Any,
    world: Any,
    painter: bytes,
    gpu_machine: Callable[[Any, GpuInfo], None],
    precision: Any,
    allows_tf32: bool,
) -> None:
    gpu_machine(trt11, H200)
    settings = PredictorSettings(precision=precision)
    backend.load_tensorrt_predictor(painter, uri="m.onnx", settings=settings)
    assert bool(world.config.flags >> int(trt11.BuilderFlag.TF32) & 1) == allows_tf32


def test_load_tensorrt_predictor_refuses_another_canvas(
    trt11: Any, painter: bytes, gpu_machine: Callable[[Any, GpuInfo], None]
) -> None:
    gpu_machine(trt11, H200)
    with pytest.raises(InferenceError, match=r"m\.onnx was exported for 64x96"):
        backend.load_tensorrt_predictor(
            painter, uri="m.onnx", settings=PredictorSettings(canvas=(128, 128))
        )


def test_load_tensorrt_plan_runs_what_build_plan_wrote(
    trt: Any, painter: bytes, gpu_machine: Callable[[Any, GpuInfo], None]
) -> None:
    gpu_machine(trt, H200)
    files = trt_engine.build_plan(
        painter, uri="m.onnx", settings=EngineSettings(batch=(1, 2, 4), allow_tf32=False)
    )
    described = read_sidecar(files.sidecar, uri="m.plan")
    assert (described.version, described.flavour) == (trt.__version__, "tensorrt")
    assert (described.gpu, described.batch) == (H200, (1, 2, 4))
    assert (described.precision, described.input_type) == ("fp32", "uint8")
    assert not described.allow_tf32
    assert files.timing_cache == b"+measured"
    predictor = backend.load_tensorrt_plan(
        files.plan, files.sidecar, uri="m.plan", settings=PredictorSettings(batch=8)
    )
    assert predictor.batch == 4
    found = predictor.predict(torch.stack([paint(100 + number) for number in range(6)]))
    assert [describe(item)[0][2] for item in found] == [100 + number for number in range(6)]


def test_load_tensorrt_plan_allows_code_only_for_version_compatible_plans(
    make_trt: Callable[[str], Any],
    world: Any,
    painter: bytes,
    gpu_machine: Callable[[Any, GpuInfo], None],
) -> None:
    gpu_machine(make_trt("trt-10.3.0"), H200)
    plain = trt_engine.build_plan(painter, uri="m.onnx", settings=EngineSettings())
    portable = trt_engine.build_plan(
        painter, uri="m.onnx", settings=EngineSettings(version_compatible=True)
    )
    settings = PredictorSettings()
    backend.load_tensorrt_plan(plain.plan, plain.sidecar, uri="m.plan", settings=settings)
    assert not world.host_code_allowed
    gpu_machine(make_trt("trt-11.4.0"), H200)
    predictor = backend.load_tensorrt_plan(
        portable.plan, portable.sidecar, uri="m.plan", settings=settings
    )
    assert world.host_code_allowed
    assert describe(predictor.predict(paint(200)[None])[0]) == [(0, LEFT, 200)]
    with pytest.raises(InferenceError, match=r"TensorRT 10\.3\.0, here is TensorRT 11\.4\.0"):
        backend.load_tensorrt_plan(plain.plan, plain.sidecar, uri="m.plan", settings=settings)


def test_load_tensorrt_plan_refuses_a_plan_of_another_gpu(
    trt11: Any, painter: bytes, gpu_machine: Callable[[Any, GpuInfo], None]
) -> None:
    gpu_machine(trt11, H200)
    files = trt_engine.build_plan(painter, uri="m.onnx", settings=EngineSettings())
    gpu_machine(trt11, A30)
    with pytest.raises(InferenceError, match=r"NVIDIA H200 .* here is NVIDIA A30"):
        backend.load_tensorrt_plan(
            files.plan, files.sidecar, uri="m.plan", settings=PredictorSettings()
        )


@pytest.mark.parametrize("fault", ["no description", "truncated", "exchanged", "canvas"])
def test_load_tensorrt_plan_checks_the_files_before_it_needs_a_gpu(
    trt11: Any,
    painter: bytes,
    gpu_machine: Callable[[Any, GpuInfo], None],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    gpu_machine(trt11, H200)
    files = trt_engine.build_plan(painter, uri="m.onnx", settings=EngineSettings())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plans = {"truncated": files.plan[:-9], "exchanged": files.plan[:-1] + b"?"}
    messages = {
        "no description": "found none",
        "truncated": "it is truncated",
        "exchanged": "do not belong together",
        "canvas": "was exported for 64x96",
    }
    canvas = (32, 32) if fault == "canvas" else None
    with pytest.raises((CheckpointError, InferenceError), match=messages[fault]):
        backend.load_tensorrt_plan(
            plans.get(fault, files.plan),
            None if fault == "no description" else files.sidecar,
            uri="m.plan",
            settings=PredictorSettings(canvas=canvas),
        )


def test_load_tensorrt_plan_says_that_there_is_no_gpu(
    trt11: Any,
    painter: bytes,
    gpu_machine: Callable[[Any, GpuInfo], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu_machine(trt11, H200)
    files = trt_engine.build_plan(painter, uri="m.onnx", settings=EngineSettings())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InferenceError, match="needs an NVIDIA GPU"):
        backend.load_tensorrt_plan(
            files.plan, files.sidecar, uri="m.plan", settings=PredictorSettings()
        )


def test_build_plan_refuses_a_foreign_file_before_it_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CheckpointError, match=r"m\.onnx"):
        trt_engine.build_plan(b"\xff", uri="m.onnx", settings=EngineSettings())
