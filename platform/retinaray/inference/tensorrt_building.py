"""An ONNX file made into an engine for one TensorRT version and one kind of GPU.

Strongly typed always: the file's own types are the precision, the only way that 11.x has.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

from retinaray.errors import InferenceError
from retinaray.inference.onnx_contract import INPUT_NAME
from retinaray.inference.tensorrt_loading import (
    collect_errors,
    describe_errors,
    flavour_of,
    product_name,
    tensorrt_log,
)

logger = logging.getLogger(__name__)

HardwareCompatibility = Literal["none", "ampere+", "same-compute-capability"]
_LEVELS: dict[str, str] = {
    "ampere+": "AMPERE_PLUS",
    "same-compute-capability": "SAME_COMPUTE_CAPABILITY",
}
_MAX_OPTIMIZATION_LEVEL = 5


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is built.

    Attributes:
        batch: Fewest images per call, the number that it is tuned for, most images.
        workspace_bytes: GPU memory that a layer may use while it works.
        timing_cache: What an earlier build measured, to save time; none = measure everything.
        version_compatible: Runs on newer TensorRT as well, perhaps slower. The plan then holds a
            runtime, which is code that its reader executes.
        hardware_compatibility: Which other GPUs may run it: none; all since Ampere; those of the
            same compute capability.
        optimization_level: Effort in 0..5: higher builds longer and may run faster.
        allow_tf32: Let float32 convolutions round their inputs to 10 bits of mantissa.

    Raises:
        ValueError: If a number is out of range or the batches do not rise.
    """

    batch: tuple[int, int, int] = (1, 8, 8)
    workspace_bytes: int = 4 << 30
    timing_cache: bytes | None = None
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    optimization_level: int = 3
    allow_tf32: bool = True

    def __post_init__(self) -> None:
        fewest, tuned, most = self.batch
        if not 1 <= fewest <= tuned <= most:
            raise ValueError(f"batch={self.batch}: expected 1 <= min <= opt <= max")
        if not 0 <= self.optimization_level <= _MAX_OPTIMIZATION_LEVEL:
            raise ValueError(f"optimization_level={self.optimization_level}: expected 0 to 5")
        if self.workspace_bytes < 1:
            raise ValueError(f"workspace_bytes={self.workspace_bytes}: expected at least 1")
        if self.hardware_compatibility not in ("none", *_LEVELS):
            raise ValueError(
                f"hardware_compatibility={self.hardware_compatibility!r}: expected one of none, "
                f"{', '.join(_LEVELS)}"
            )


@dataclass(frozen=True)
class BuiltEngine:
    """What came of a build.

    Attributes:
        plan: The serialized engine.
        timing_cache: What was measured, for the next build; none where there is no such thing
            (TensorRT-RTX).
        batch: Fewest, tuned and most images per call; all the same for a file of a fixed batch.
    """

    plan: bytes
    timing_cache: bytes | None
    batch: tuple[int, int, int]


def build_engine(trt: Any, content: bytes, settings: EngineSettings) -> BuiltEngine:
    """Build an engine for the GPU of this process; takes seconds to minutes.

    Args:
        trt: The tensorrt module, or tensorrt_rtx_bindings, which builds without a GPU too.
        content: The ONNX file.
        settings: How to build.

    Raises:
        InferenceError: If the parser refuses the file (the text names node, operator and reason),
            the builder fails (its own reasons), or this version lacks what is asked for.
    """
    log = tensorrt_log(trt)
    with collect_errors(log) as faults:
        builder = _make_builder(trt, log, faults)
        # Required by 10.x, accepted and ignored by 11.x. The enum's value moved between them:
        # never a number.
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, log)
        if not parser.parse(content):
            raise InferenceError(
                f"{_name(trt)} cannot read the exported file: {_describe_parser(parser, faults)}"
            )
        config = builder.create_builder_config()
        _configure(trt, config, settings)
        batch = _add_profile(builder, network, config, settings)
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise InferenceError(
                f"{_name(trt)} could not build an engine: {describe_errors(faults)}. Where memory "
                "is short, a smaller batch or workspace helps"
            )
        return BuiltEngine(
            plan=bytes(serialized), timing_cache=_read_timing_cache(trt, config), batch=batch
        )


def _name(trt: Any) -> str:
    return f"{product_name(flavour_of(trt))} {trt.__version__}"


def _make_builder(trt: Any, log: Any, faults: list[str]) -> Any:
    try:
        builder = trt.Builder(log)
    # What the bindings raise when the library gives no object, without a usable driver say.
    except TypeError as error:
        raise InferenceError(
            f"{_name(trt)} gives no builder ({describe_errors(faults)}): it needs a GPU and a "
            "driver that it supports"
        ) from error
    return builder


def _describe_parser(parser: Any, faults: list[str]) -> str:
    lines = []
    for index in range(parser.num_errors):
        fault = parser.get_error(index)
        where = fault.node_name() or f"node {fault.node()}"
        operator = fault.node_operator()
        # The file as a whole has no node.
        prefix = f"{where} ({operator}): " if operator else ""
        lines.append(f"{prefix}{fault.desc()}")
    return "; ".join(lines) or describe_errors(faults)


def _configure(trt: Any, config: Any, settings: EngineSettings) -> None:
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    config.builder_optimization_level = settings.optimization_level
    if not settings.allow_tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware_compatibility != "none":
        _set_hardware_compatibility(trt, config, settings.hardware_compatibility)
    if flavour_of(trt) == "tensorrt":
        _set_timing_cache(config, settings.timing_cache or b"")


def _set_hardware_compatibility(trt: Any, config: Any, level: str) -> None:
    # By name and guarded: SAME_COMPUTE_CAPABILITY is younger than 10.3.
    wanted = getattr(trt.HardwareCompatibilityLevel, _LEVELS[level], None)
    if wanted is None:
        raise InferenceError(
            f"hardware_compatibility={level!r} is not known to {_name(trt)}: take 'ampere+' or "
            "'none', or a newer version"
        )
    config.hardware_compatibility_level = wanted
    # TensorRT-RTX ignores it with a warning.
    if config.hardware_compatibility_level != wanted:
        raise InferenceError(
            f"hardware_compatibility={level!r} is not supported by {_name(trt)}: take 'none'"
        )


def _set_timing_cache(config: Any, content: bytes) -> None:
    timing_cache = config.create_timing_cache(content)
    if timing_cache is not None and config.set_timing_cache(timing_cache, False):
        return
    logger.warning(
        "the timing cache (%d bytes) is damaged, or of another GPU or TensorRT version: "
        "everything is measured again",
        len(content),
    )
    timing_cache = config.create_timing_cache(b"")
    config.set_timing_cache(timing_cache, False)


def _read_timing_cache(trt: Any, config: Any) -> bytes | None:
    # In TensorRT-RTX all of this is deprecated and does nothing.
    if flavour_of(trt) != "tensorrt":
        return None
    timing_cache = config.get_timing_cache()
    if timing_cache is None:
        return None
    serialized = timing_cache.serialize()
    return None if serialized is None else bytes(serialized)


def _add_profile(
    builder: Any, network: Any, config: Any, settings: EngineSettings
) -> tuple[int, int, int]:
    """Give the network its batches; those that it has afterwards."""
    network_input = network.get_input(0)
    fixed, *shape = tuple(network_input.shape)
    fewest, tuned, most = settings.batch
    if fixed >= 0:
        if not fewest <= fixed <= most:
            raise InferenceError(
                f"the exported file takes exactly {fixed} images at a time, asked for "
                f"{fewest} to {most}: ask for {fixed}, or export it again with a free batch"
            )
        return fixed, fixed, fixed
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT_NAME, (fewest, *shape), (tuned, *shape), (most, *shape))
    if config.add_optimization_profile(profile) < 0:
        raise InferenceError(
            f"TensorRT refuses batches of {fewest}, {tuned} and {most} images of {tuple(shape)}"
        )
    return settings.batch
