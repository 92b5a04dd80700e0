"""Building an engine: what is asked for arrives, what fails is explained."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from retinaray.errors import InferenceError
from retinaray.inference.tensorrt_building import EngineSettings, build_engine

IMAGE = (3, 64, 96)


def test_build_engine_asks_for_strong_typing_by_the_version_own_number(
    trt: Any, world: Any, painter: bytes
) -> None:
    build_engine(trt, painter, EngineSettings())
    # 10.x calls it 1, 11.x 0.
    number = 0 if trt.__version__.startswith("11") else 1
    assert world.network_flags == 1 << number


def test_build_engine_passes_every_setting_on(trt: Any, world: Any, painter: bytes) -> None:
    settings = EngineSettings(
        batch=(2, 4, 6),
        workspace_bytes=12345,
        version_compatible=True,
        hardware_compatibility="ampere+",
        optimization_level=1,
        allow_tf32=False,
    )
    built = build_engine(trt, painter, settings)
    config = world.config
    assert world.profile == ((2, *IMAGE), (4, *IMAGE), (6, *IMAGE))
    assert config.pools == {"WORKSPACE": 12345}
    assert config.builder_optimization_level == 1
    assert config.hardware_compatibility_level.name == "AMPERE_PLUS"
    # TF32 was cleared, and nothing but this is set: its number moved from 13 to 12 in 11.x.
    number = 12 if trt.__version__.startswith("11") else 13
    assert config.flags == 1 << number
    assert built.batch == (2, 4, 6)
    assert built.timing_cache == b"+measured"


def test_build_engine_leaves_defaults_alone(trt11: Any, world: Any, painter: bytes) -> None:
    build_engine(trt11, painter, EngineSettings())
    assert world.config.flags == 1 << int(trt11.BuilderFlag.TF32)
    assert world.config.hardware_compatibility_level.name == "NONE"


def test_build_engine_says_what_an_old_version_lacks(
    make_trt: Callable[[str], Any], painter: bytes
) -> None:
    settings = EngineSettings(hardware_compatibility="same-compute-capability")
    with pytest.raises(InferenceError, match=r"not known to TensorRT 10\.3\.0.*'ampere\+'"):
        build_engine(make_trt("trt-10.3.0"), painter, settings)


def test_build_engine_takes_same_compute_capability_where_it_exists(
    make_trt: Callable[[str], Any], world: Any, painter: bytes
) -> None:
    settings = EngineSettings(hardware_compatibility="same-compute-capability")
    build_engine(make_trt("trt-10.16.1"), painter, settings)
    assert world.config.hardware_compatibility_level.name == "SAME_COMPUTE_CAPABILITY"


def test_build_engine_names_node_operator_and_reason_when_the_parser_refuses(
    trt: Any, world: Any, painter: bytes
) -> None:
    world.parser_faults = [
        ("node_topk", "TopK", "K exceeds 3840"),
        ("", "Foo", "no such plugin"),
        ("", "", "the file is damaged"),
    ]
    with pytest.raises(InferenceError) as caught:
        build_engine(trt, painter, EngineSettings())
    assert str(caught.value).endswith(
        "cannot read the exported file: node_topk (TopK): K exceeds 3840; "
        "node 17 (Foo): no such plugin; the file is damaged"
    )
    assert f"TensorRT {trt.__version__}" in str(caught.value)


def test_build_engine_gives_the_log_when_the_parser_gives_no_error(
    trt11: Any, world: Any, painter: bytes
) -> None:
    world.answers_none = {"parse"}
    world.errors = ["Error Code 4: out of names"]
    with pytest.raises(InferenceError, match=r"cannot read .*Error Code 4: out of names"):
        build_engine(trt11, painter, EngineSettings())


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        (["no runner", "no runner", "Error Code 10"], "no runner; Error Code 10"),
        ([], "its log gives no reason"),
    ],
    ids=["reasons", "silent"],
)
def test_build_engine_gives_the_builder_reasons_when_it_answers_none(
    trt11: Any, world: Any, painter: bytes, errors: list[str], reason: str
) -> None:
    world.answers_none = {"build_serialized_network"}
    # The parser fails on errors too, so they come only when the builder speaks.
    world.fail = lambda: [world.log.log(trt11.ILogger.ERROR, text) for text in errors]
    with pytest.raises(InferenceError, match=f"could not build an engine: {reason}"):
        build_engine(trt11, painter, EngineSettings())


def test_build_engine_says_that_a_gpu_is_needed_when_there_is_no_builder(
    trt: Any, world: Any, painter: bytes
) -> None:
    world.without = {"Builder"}
    with pytest.raises(InferenceError, match=r"gives no builder .* needs a GPU and a driver"):
        build_engine(trt, painter, EngineSettings())


def test_build_engine_goes_on_from_a_timing_cache(trt: Any, painter: bytes) -> None:
    first = build_engine(trt, painter, EngineSettings())
    second = build_engine(trt, painter, EngineSettings(timing_cache=first.timing_cache))
    assert second.timing_cache == b"+measured+measured"


@pytest.mark.parametrize("fault", ["another GPU", "damaged"])
def test_build_engine_starts_over_when_the_timing_cache_does_not_fit(
    trt: Any, world: Any, painter: bytes, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    world.cache_fits = fault == "damaged"
    world.answers_none = {"create_timing_cache"} if fault == "damaged" else set()
    built = build_engine(trt, painter, EngineSettings(timing_cache=b"foreign"))
    assert built.timing_cache == b"+measured"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "timing cache (7 bytes)" in caplog.text


def test_build_engine_has_no_timing_cache_when_there_is_none(
    trt11: Any, world: Any, painter: bytes
) -> None:
    world.answers_none = {"get_timing_cache"}
    assert build_engine(trt11, painter, EngineSettings()).timing_cache is None


def test_build_engine_gives_a_fixed_batch_no_profile(
    trt: Any, world: Any, make_painter: Callable[..., bytes]
) -> None:
    built = build_engine(trt, make_painter(batch=4), EngineSettings(batch=(1, 8, 8)))
    assert built.batch == (4, 4, 4)
    assert world.profile is None


def test_build_engine_refuses_batches_that_a_fixed_file_cannot_have(
    trt11: Any, make_painter: Callable[..., bytes]
) -> None:
    with pytest.raises(InferenceError, match="exactly 4 images at a time, asked for 5 to 8"):
        build_engine(trt11, make_painter(batch=4), EngineSettings(batch=(5, 8, 8)))


def test_build_engine_says_which_batches_are_refused(
    trt11: Any, world: Any, painter: bytes
) -> None:
    world.answers_none = {"add_optimization_profile"}
    with pytest.raises(InferenceError, match="batches of 1, 2 and 3 images"):
        build_engine(trt11, painter, EngineSettings(batch=(1, 2, 3)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch": (0, 1, 1)}, r"batch=\(0, 1, 1\)"),
        ({"batch": (2, 1, 3)}, r"batch=\(2, 1, 3\)"),
        ({"batch": (1, 4, 3)}, r"batch=\(1, 4, 3\)"),
        ({"optimization_level": 6}, "optimization_level=6"),
        ({"optimization_level": -1}, "optimization_level=-1"),
        ({"workspace_bytes": 0}, "workspace_bytes=0"),
        ({"hardware_compatibility": "turing+"}, "'turing.'"),
    ],
)
def test_engine_settings_refuse_what_no_builder_takes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineSettings(**values)


def test_build_engine_builds_an_exported_detector_with_nvidia_own_builder(
    rtx: Any, tiny_onnx: bytes
) -> None:
    built = build_engine(rtx, tiny_onnx, EngineSettings(batch=(1, 2, 4), workspace_bytes=1 << 30))
    # Its weights alone have as many bytes.
    assert len(built.plan) > len(tiny_onnx) // 2
    assert built.batch == (1, 2, 4)
    assert built.timing_cache is None


@pytest.mark.parametrize("input_type", ["uint8", "float32"])
@pytest.mark.parametrize("batch", [None, 3])
def test_build_engine_builds_every_kind_of_input_with_nvidia_own_builder(
    rtx: Any, make_painter: Callable[..., bytes], input_type: str, batch: int | None
) -> None:
    content = make_painter(input_type=input_type, batch=batch)
    built = build_engine(rtx, content, EngineSettings(batch=(1, 2, 4)))
    assert built.batch == ((1, 2, 4) if batch is None else (3, 3, 3))
    assert built.plan


def test_build_engine_explains_a_damaged_file_with_nvidia_own_parser(rtx: Any) -> None:
    with pytest.raises(
        InferenceError,
        match=rf"TensorRT-RTX {rtx.__version__} cannot read the exported file: .*ONNX model",
    ):
        build_engine(rtx, b"not an onnx file", EngineSettings())


def test_build_engine_names_the_node_that_nvidia_own_parser_refuses(rtx: Any) -> None:
    shape = [1, 3, 64, 96]
    graph = helper.make_graph(
        [helper.make_node("NonZero", ["images"], ["places"], name="find_objects")],
        "unsupported",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("places", TensorProto.INT64, [4, "M"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    with pytest.raises(InferenceError, match=r"exported file: find_objects \(NonZero\): .+"):
        build_engine(rtx, model.SerializeToString(), EngineSettings())


def test_build_engine_explains_what_nvidia_own_builder_cannot_do(rtx: Any, painter: bytes) -> None:
    # It has no lean runtime to put into the plan.
    with pytest.raises(InferenceError, match=r"could not build an engine: .*libnvinfer_lean"):
        build_engine(rtx, painter, EngineSettings(version_compatible=True))


def test_build_engine_does_not_accept_that_a_setting_is_ignored(rtx: Any, painter: bytes) -> None:
    with pytest.raises(InferenceError, match=r"'ampere.' is not supported by TensorRT-RTX"):
        build_engine(rtx, painter, EngineSettings(hardware_compatibility="ampere+"))
