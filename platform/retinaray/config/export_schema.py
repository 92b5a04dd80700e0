"""Every setting of the commands that take a model to other runtimes: `export` and `bundle`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from retinaray.config.nodes import Config, Flag, Job, Location, ReadingConfig, Size, require

ENGINE_ENDINGS = (".plan", ".engine")
BUNDLE_TARGETS = ("jetpack5", "jetpack6", "jetpack7", "deepstream-dgpu", "triton")

TargetName = Literal["jetpack5", "jetpack6", "jetpack7", "tensorrt11", "deepstream-dgpu", "triton"]
PrecisionName = Literal["fp32", "fp16", "int8"]


def _expect_export_name(value: str) -> str:
    if not value.endswith((".onnx", *ENGINE_ENDINGS)):
        raise ValueError(
            "expected a name that ends in .onnx, or in .plan or .engine for a TensorRT engine of "
            "this machine's GPU"
        )
    return value


def _repeat_one_number(value: object) -> object:
    """Turn one number, alone or in a list, into three; leave everything else to the type check."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    is_one_number = len(numbers) == 1 and isinstance(numbers[0], (int, str))
    return (numbers[0],) * 3 if is_one_number else value


BatchSize = Annotated[int, Field(ge=1, le=1024)]
BatchRange = Annotated[tuple[BatchSize, BatchSize, BatchSize], BeforeValidator(_repeat_one_number)]
"""Least, usual and most images per call; one number means exactly that many."""


class CalibrationConfig(Config):
    """The images that show INT8 which ranges of values matter."""

    images: Annotated[
        Location | None, Flag("--calibration-images", metavar="DIR|s3://|list.txt")
    ] = None
    """Images like those the model will see, a few hundred; needed by --precision int8."""
    batches: Annotated[int, Field(ge=1, le=10_000), Flag("--calibration-batches")] = 16
    """Batches of these images that are used at most."""
    batch: Annotated[int, Field(ge=1, le=256), Flag("--calibration-batch", unit="images")] = 8
    """Images per batch."""
    method: Annotated[Literal["entropy", "minmax", "percentile"], Flag("--calibration-method")] = (
        "entropy"
    )
    """How the range of a tensor follows from the values that were seen."""
    percentile: Annotated[float, Field(gt=90, le=100), Flag("--percentile", unit="%")] = 99.99
    """Share of the values inside the range, for the method of that name."""
    quantizer: Annotated[Literal["onnxruntime", "modelopt"], Flag("--quantizer")] = "onnxruntime"
    """Who writes the INT8 file: ONNX Runtime's tool, or NVIDIA ModelOpt in an environment of its
    own (opset 19, which TensorRT 8 cannot read)."""
    modelopt_python: Annotated[Location | None, Flag("--modelopt-python", metavar="FILE")] = None
    """Python of the environment that holds nvidia-modelopt."""


class EngineConfig(Config):
    """How TensorRT builds an engine; for outputs that end in .plan or .engine."""

    workspace_mib: Annotated[int, Field(ge=64, le=1_048_576), Flag("--workspace", unit="MiB")] = (
        2048
    )
    """GPU memory that the builder may try tactics with."""
    timing_cache: Annotated[Location | None, Flag("--timing-cache", metavar="FILE")] = None
    """Measurements of earlier builds, read if there and written back."""
    optimization_level: Annotated[int, Field(ge=0, le=5), Flag("--optimization-level")] = 3
    """How long the builder searches."""
    version_compatible: Annotated[bool, Flag("--version-compatible")] = False
    """Build an engine that newer TensorRT versions can run; it may be slower."""
    hardware_compatibility: Annotated[
        Literal["none", "ampere+", "same-compute-capability"], Flag("--hardware-compatibility")
    ] = "none"
    """Other GPUs that may run the engine; it may be slower."""


class GateConfig(Config):
    """The comparison with the original that every export has to pass."""

    images: Annotated[Location | None, Flag("--images", metavar="DIR|s3://")] = None
    """Images for the comparison; none = sample pictures made from noise and edges."""
    tolerance_px: Annotated[float | None, Field(gt=0), Flag("--tolerance", unit="px")] = None
    """Largest difference of a matched box; none = 0.05 for fp32, and for fp16 and int8 the share
    of changed detections decides."""
    nvidia: Annotated[Literal["auto", "require", "skip"], Flag("--nvidia-check")] = "auto"
    """Parse and build the file with NVIDIA's own code (tensorrt-rtx, no GPU needed): where it is
    installed, always, or never."""


class ExportJob(Job):
    """Write a trained model as ONNX or a TensorRT engine and check it box by box."""

    verb: ClassVar[str] = "export"
    examples: ClassVar[tuple[str, ...]] = (
        "retinaray export model.pth model.onnx --size 640 960",
        "retinaray export model.pth int8.onnx --precision int8 --calibration-images data/train",
        "retinaray export model.pth engine.plan --precision fp16 --batch 1 8 32",
        "retinaray export model.pth deepstream.onnx --config jobs/configs/export_deepstream.yaml",
    )

    model: Annotated[Location, Flag("model", metavar="model.pth")]
    """Trained weights."""
    output: Annotated[
        Location,
        AfterValidator(_expect_export_name),
        Flag("export", metavar="model.onnx|engine.plan"),
    ]
    """File to write."""
    size: Annotated[Size | None, Flag("--size", unit="px", metavar="H W")] = None
    """Canvas of the exported network; none = the one it was trained with. Any height and width
    are right."""
    precision: Annotated[PrecisionName, Flag("--precision")] = "fp32"
    """Type of the convolutions; normalisation, anchors and decoding stay float32."""
    target: Annotated[TargetName | None, Flag("--target")] = None
    """Where the file will run: picks what that TensorRT can read; none = strongly typed, for any
    TensorRT from 10.3 and for OpenVINO and ONNX Runtime."""
    batch: Annotated[BatchRange | None, Flag("--batch", unit="images", metavar="MIN OPT MAX")] = (
        None
    )
    """Images per call: least, usual and most, or one number for a file of exactly that batch;
    none = any number for ONNX, 1 8 8 for an engine."""
    input: Annotated[Literal["uint8", "float32"] | None, Flag("--input")] = None
    """Type of the input tensor, RGB 0..255; none = uint8, or float32 where the target feeds
    that."""
    top_k: Annotated[int, Field(ge=1, le=3839), Flag("--top-k", unit="per image")] = 1000
    """Candidates that leave the network per image (TensorRT takes fewer than 3840)."""
    gate: GateConfig = GateConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    engine: EngineConfig = EngineConfig()
    reading: ReadingConfig = ReadingConfig()

    @model_validator(mode="after")
    def _check_fields_together(self) -> ExportJob:
        require(
            [
                *_calibration_rules(self.precision, self.calibration, self.target),
                *_batch_rules(self.batch),
            ]
        )
        return self


class BundleJob(Job):
    """Write everything a Jetson, a DeepStream host or Triton needs, with a self-test inside."""

    verb: ClassVar[str] = "bundle"
    examples: ClassVar[tuple[str, ...]] = (
        "retinaray bundle model.pth cells_orin --target jetpack6 --precision fp16 "
        "--images data/test",
        "retinaray bundle model.pth cells_triton --target triton --batch 1 8 8",
    )

    model: Annotated[Location, Flag("model", metavar="model.pth")]
    """Trained weights."""
    output: Annotated[Location, Flag("bundle", metavar="DIR")]
    """Folder to write; it must not exist yet, or hold an earlier bundle."""
    target: Annotated[
        Literal["jetpack5", "jetpack6", "jetpack7", "deepstream-dgpu", "triton"], Flag("--target")
    ]
    """The device and its software."""
    size: Annotated[Size | None, Flag("--size", unit="px", metavar="H W")] = None
    """Canvas of the exported network; none = the one it was trained with."""
    precision: Annotated[PrecisionName, Flag("--precision")] = "fp16"
    """Type of the convolutions; normalisation, anchors and decoding stay float32."""
    batch: Annotated[BatchRange, Flag("--batch", unit="images", metavar="MIN OPT MAX")] = (1, 1, 1)
    """Images per call: least, usual and most (a camera each), or one number."""
    top_k: Annotated[int, Field(ge=1, le=3839), Flag("--top-k", unit="per image")] = 1000
    """Candidates that leave the network per image, 24 bytes each; fewer cost AP."""
    deepstream: Annotated[str | None, Flag("--deepstream", metavar="VERSION")] = None
    """DeepStream on the device, such as 7.1; none = the newest that the target has."""
    frame: Annotated[Size, Flag("--frame", unit="px", metavar="H W")] = (1080, 1920)
    """Height and width of the frames that the device's cameras or files give."""
    samples: Annotated[int, Field(ge=1, le=64), Flag("--samples", unit="images")] = 4
    """Images that travel with the bundle for its self-test."""
    gate: GateConfig = GateConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    reading: ReadingConfig = ReadingConfig()

    @model_validator(mode="after")
    def _check_fields_together(self) -> BundleJob:
        require(
            [
                *_calibration_rules(self.precision, self.calibration, self.target),
                *_batch_rules(self.batch),
            ]
        )
        return self


def _calibration_rules(
    precision: str, calibration: CalibrationConfig, target: str | None
) -> list[tuple[bool, str]]:
    is_modelopt = calibration.quantizer == "modelopt"
    return [
        (
            precision != "int8" or calibration.images is not None,
            "calibration.images is missing: --precision int8 needs --calibration-images with "
            "images like those that the model will see",
        ),
        (
            precision == "int8" or calibration.images is None,
            f"calibration.images={calibration.images} without effect: precision={precision} needs "
            "no calibration; give --precision int8 or leave it out",
        ),
        (
            not is_modelopt or calibration.modelopt_python is not None,
            "calibration.modelopt_python is missing: --quantizer modelopt needs --modelopt-python "
            "with the python of the environment that holds nvidia-modelopt",
        ),
        (
            not is_modelopt or target != "jetpack5",
            "calibration.quantizer=modelopt writes opset 19, which TensorRT 8 of target=jetpack5 "
            "cannot read: use --quantizer onnxruntime",
        ),
    ]


def _batch_rules(batch: tuple[int, int, int] | None) -> list[tuple[bool, str]]:
    least, usual, most = batch or (1, 1, 1)
    return [
        (
            least <= usual <= most,
            f"batch={least} {usual} {most}: expected least <= usual <= most images",
        )
    ]
