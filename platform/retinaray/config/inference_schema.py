"""Every setting of `evaluate` and `thresholds`, and of `doctor` and `demo`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from retinaray.config.nodes import (
    BackendName,
    Config,
    Flag,
    Job,
    Location,
    ReadingConfig,
    Size,
    expect_rule,
    require,
)


def _name_given(resize: int | None, max_size: int | None) -> str:
    sides = {"detection.resize": resize, "detection.max_size": max_size}
    return " with ".join(f"{key}={side}" for key, side in sides.items() if side is not None)


class DetectionConfig(Config):
    """From network outputs to detections."""

    size: Annotated[Size | None, Flag("--size", unit="px", metavar="H W")] = None
    """Network canvas of a .pth model; none = the one it was trained with. An exported file has
    its own."""
    resize: Annotated[int | None, Field(ge=32, le=8192), Flag("--resize", unit="px")] = None
    """Short side of the canvas, with --max-size: another way to say --size."""
    max_size: Annotated[int | None, Field(ge=32, le=8192), Flag("--max-size", unit="px")] = None
    """Long side of the canvas, with --resize."""
    precision: Annotated[Literal["auto", "fp32", "bf16"], Flag("--precision")] = "auto"
    """What a processor computes in: auto = bf16 with OpenVINO where it has that, else fp32. On GPUs
    an exported file has its own types."""
    score_threshold: Annotated[float | None, Field(ge=0, lt=1), Flag("--score-threshold")] = None
    """Detections below this score are dropped; none = the thresholds stored in the model (0.05
    when trained)."""
    nms_iou: Annotated[float | None, Field(gt=0, le=1), Flag("--nms-iou", unit="IoU")] = None
    """Of two boxes of one class that overlap more than this the better one stays; none = the
    model's (0.5)."""
    nms_kind: Annotated[Literal["class", "agnostic", "none"] | None, Flag("--nms")] = None
    """Which boxes suppress each other: those of one class, all, or none; none given = the model's
    (class)."""
    max_detections: Annotated[
        int | None, Field(ge=1, le=3839), Flag("--max-detections", unit="per image")
    ] = None
    """Detections kept per image; none = the model's (100)."""

    @model_validator(mode="after")
    def _check_fields_together(self) -> DetectionConfig:
        resize, max_size = self.resize, self.max_size
        require(
            [
                (
                    (resize is None) == (max_size is None),
                    f"{_name_given(resize, max_size)} alone does not make a canvas: give both "
                    "--resize and --max-size, or --size H W",
                ),
                (
                    self.size is None or (resize is None and max_size is None),
                    f"detection.size={self.size} and {_name_given(resize, max_size)} are both "
                    "given: keep --size, or --resize with --max-size",
                ),
                (
                    resize is None or max_size is None or max_size >= resize,
                    f"detection.max_size={max_size} is below detection.resize={resize}: raise "
                    "--max-size or lower --resize",
                ),
            ]
        )
        return self


class KittiConfig(Config):
    """Detections that DeepStream dumped on a device, instead of a model's."""

    dump: Annotated[Location | None, Flag("--kitti-dump", metavar="DIR")] = None
    """Folder of gie-kitti-output-dir, one .txt per frame."""
    order: Annotated[Location | None, Flag("--kitti-order", metavar="FILE")] = None
    """File names of the images in the order in which the device saw them, one per line; none = by
    name."""
    frame: Annotated[Size | None, Flag("--kitti-frame", unit="px", metavar="H W")] = None
    """Height and width of the frames that the muxer made; none = those of each image."""
    has_track_ids: Annotated[bool, Flag("--kitti-track")] = False
    """The dump is that of kitti-track-output-dir, with an identity after the label."""
    stream: Annotated[int | None, Field(ge=0), Flag("--kitti-stream")] = None
    """Which stream of the dump; none = there is only one."""


class EvaluateJob(Job):
    """Score a model or a detections file against ground truth with COCO's twelve numbers."""

    verb: ClassVar[str] = "evaluate"
    examples: ClassVar[tuple[str, ...]] = (
        "retinaray evaluate model.pth --images data/test --annotations data/test.json",
        "retinaray evaluate detections.json --annotations data/test.json",
        "retinaray evaluate --kitti-dump dump --annotations data/test.json",
    )

    model: Annotated[Location | None, Flag("model", metavar="MODEL|detections.json")] = None
    """.pth, .onnx or .plan file, or a detections.json to score as it is; none with
    --kitti-dump."""
    images: Annotated[Location, Flag("--images", metavar="DIR|s3://")] = "."
    """Folder or S3 prefix of the images."""
    annotations: Annotated[Location, Flag("--annotations", metavar="FILE")]
    """COCO JSON with the ground truth."""
    backend: Annotated[BackendName, Flag("--backend")] = "auto"
    """Runtime; auto picks by file and hardware, and says what it picked."""
    batch: Annotated[int, Field(ge=1, le=1024), Flag("--batch", unit="images")] = 4
    """Images per network call."""
    output: Annotated[Location | None, Flag("--output", metavar="FILE")] = None
    """Also write the detections there as COCO results."""
    detection: DetectionConfig = DetectionConfig()
    kitti: KittiConfig = KittiConfig()
    reading: ReadingConfig = ReadingConfig()

    @model_validator(mode="after")
    def _check_fields_together(self) -> EvaluateJob:
        require(
            [
                (
                    bool(self.model) != (self.kitti.dump is not None),
                    f"model={self.model or 'none'} and kitti.dump={self.kitti.dump or 'none'}: "
                    "expected a model, a detections.json or --kitti-dump, and one of them only",
                ),
            ]
        )
        return self


class DoctorJob(Job):
    """Look for every known fault of a COCO data set."""

    verb: ClassVar[str] = "doctor"
    examples: ClassVar[tuple[str, ...]] = (
        "retinaray doctor --annotations data/train.json --images data/train",
        "retinaray doctor --annotations data/train.json --fix data/train_fixed.json",
    )

    images: Annotated[Location | None, Flag("--images", metavar="DIR")] = None
    """Image folder; none = the files are not looked at."""
    annotations: Annotated[Location, Flag("--annotations", metavar="FILE")]
    """COCO JSON."""
    fix: Annotated[Location | None, Flag("--fix", metavar="OUT.json")] = None
    """Write a repaired copy there."""
    threads: Annotated[int, Field(ge=1, le=256), Flag("--read-threads", unit="threads")] = 8
    """Image headers read at once."""


class DemoJob(Job):
    """Train, export, infer from S3 to S3 and evaluate on embedded data: no downloads, no GPU."""

    verb: ClassVar[str] = "demo"
    examples: ClassVar[tuple[str, ...]] = (
        "retinaray demo",
        "retinaray demo --data my_coco_folder --output my_demo --workers 4",
    )

    data: Annotated[Location | None, Flag("--data", metavar="DIR")] = None
    """Your own COCO folder (train.json, val.json, images/, optionally test.json); none =
    handwritten digits on photographs."""
    output: Annotated[Location, Flag("--output", metavar="DIR")] = "demo_run"
    """Folder for everything that the demo makes; replaced when it holds an earlier demo."""
    epochs: Annotated[int | None, Field(ge=1), Flag("--epochs", unit="epochs")] = None
    """Training length; none = chosen for a few minutes on two cores."""
    workers: Annotated[int, Field(ge=1, le=64), Flag("--workers", unit="workers")] = 2
    """Ray workers for training and inference."""


class ThresholdsJob(Job):
    """Choose thresholds and NMS for a trained model on validation images, without training."""

    verb: ClassVar[str] = "thresholds"
    examples: ClassVar[tuple[str, ...]] = (
        "retinaray thresholds model.pth --images data/val --annotations data/val.json "
        "--output tuned.pth",
        "retinaray thresholds model.pth --images data/val --annotations data/val.json "
        "--rule precision=0.9 --test-images data/test --test-annotations data/test.json",
    )

    model: Annotated[Location, Flag("model", metavar="MODEL")]
    """.pth or .onnx file."""
    images: Annotated[Location, Flag("--images", metavar="DIR|s3://")] = "."
    """Folder or S3 prefix of the validation images."""
    annotations: Annotated[Location, Flag("--annotations", metavar="FILE")]
    """COCO JSON of the validation set, on which the thresholds are chosen."""
    test_images: Annotated[Location | None, Flag("--test-images", metavar="DIR|s3://")] = None
    """Folder of the test images; none = --images."""
    test_annotations: Annotated[Location | None, Flag("--test-annotations", metavar="FILE")] = None
    """COCO JSON of the test set, on which the chosen thresholds are reported."""
    rule: Annotated[Location, AfterValidator(expect_rule), Flag("--rule", metavar="RULE")] = "f1"
    """Operating point per class: f1 (best F1), precision=P or recall=R (reached with as much as
    possible of the other), fppi=X (false positives per image at most)."""
    output: Annotated[Location | None, Flag("--output", metavar="MODEL")] = None
    """Write the model there with the chosen thresholds and NMS inside."""
    table: Annotated[Location | None, Flag("--table", metavar="FILE.csv")] = None
    """Write every setting that was tried and its AP."""
    plots: Annotated[Location | None, Flag("--plots", metavar="DIR")] = None
    """Folder for the pictures: AP against threshold, PR curves with the chosen points."""
    backend: Annotated[BackendName, Flag("--backend")] = "auto"
    """Runtime; auto picks by file and hardware, and says what it picked."""
    batch: Annotated[int, Field(ge=1, le=1024), Flag("--batch", unit="images")] = 4
    """Images per network call."""
    detection: DetectionConfig = DetectionConfig()
    reading: ReadingConfig = ReadingConfig()
