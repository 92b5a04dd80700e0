"""Every setting of the commands that use a trained model, and of `doctor` and `demo`."""

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


class SelectionConfig(Config):
    """Which of the images that are found are taken."""

    include: Annotated[tuple[str, ...], Flag("--include", metavar="GLOB")] = ()
    """Patterns of which one must match, such as *.jpg or 2026/**; none = everything."""
    exclude: Annotated[tuple[str, ...], Flag("--exclude", metavar="GLOB")] = ()
    """Patterns of which none may match."""
    min_bytes: Annotated[int | None, Field(ge=0), Flag("--min-bytes", unit="bytes")] = None
    """Smaller files are left out."""
    max_bytes: Annotated[int | None, Field(ge=1), Flag("--max-bytes", unit="bytes")] = None
    """Larger files are left out."""
    modified_after: Annotated[str | None, Flag("--modified-after", metavar="DATE")] = None
    """Files last written before this are left out; 2026-05-31 or 2026-05-31T14:30+02:00."""
    modified_before: Annotated[str | None, Flag("--modified-before", metavar="DATE")] = None
    """Files last written at this moment or later are left out."""
    limit: Annotated[int | None, Field(ge=1), Flag("--limit", unit="images")] = None
    """Of what remains the first so many."""
    sample: Annotated[float | None, Field(gt=0), Flag("--sample", metavar="N|SHARE")] = None
    """Of what remains so many images, or a share below 1, chosen by a hash of the URI."""
    seed: Annotated[int, Field(ge=0), Flag("--sample-seed")] = 0
    """Another seed gives another sample."""

    @model_validator(mode="after")
    def _check_fields_together(self) -> SelectionConfig:
        sample = self.sample
        low, high = self.min_bytes, self.max_bytes
        require(
            [
                (
                    self.limit is None or sample is None,
                    f"select.limit={self.limit} and select.sample={sample} are both given: keep "
                    "one of them",
                ),
                (
                    sample is None or sample < 1 or sample == int(sample),
                    f"select.sample={sample}: expected a whole number of images, or a share below "
                    "1",
                ),
                (
                    low is None or high is None or low <= high,
                    f"select.min_bytes={low} is above select.max_bytes={high}: nothing could be "
                    "left",
                ),
            ]
        )
        return self


class WriteConfig(Config):
    """What a run leaves besides its record."""

    format: Annotated[
        Literal["coco-results", "coco-dataset", "jsonl", "parquet", "odtk"], Flag("--format")
    ] = "coco-results"
    """The merged result; parquet stays in parts, for sets that are too large for one file."""
    compression: Annotated[Literal["none", "gzip", "zstd"], Flag("--compression")] = "none"
    """Of the parts; a merged file is compressed when its name ends in .gz or .zst."""
    draw: Annotated[int, Field(ge=0, le=100_000), Flag("--draw", unit="images")] = 0
    """Pictures with their detections drawn, of so many images of the run."""
    crops: Annotated[bool, Flag("--crops")] = False
    """Also cut out the detections of the drawn images, a folder per class."""

    @model_validator(mode="after")
    def _check_fields_together(self) -> WriteConfig:
        require(
            [
                (
                    self.draw > 0 or not self.crops,
                    "write.crops cuts out of drawn images, and write.draw=0 draws none: give "
                    "--draw N",
                ),
            ]
        )
        return self


class TilingConfig(Config):
    """Detection in overlapping tiles, so that small objects in large photos are found."""

    tile: Annotated[Size | None, Flag("--tile", unit="px", metavar="H W")] = None
    """Height and width of a tile in the image's pixels, or one number; none = no tiles."""
    overlap: Annotated[float, Field(ge=0, lt=1), Flag("--overlap", unit="share")] = 0.2
    """Part of a tile's side that neighbours share at least: the largest object's."""
    full: Annotated[bool, Flag("--tile-full")] = True
    """Detect in the whole image too, for objects larger than a tile."""
    merge: Annotated[Literal["ios", "nms"], Flag("--tile-merge")] = "ios"
    """Boxes of different tiles are one object by intersection over the smaller box, or by IoU."""
    threshold: Annotated[float, Field(gt=0, le=1), Flag("--tile-threshold", unit="overlap")] = 0.5
    """Above this overlap the worse of two such boxes goes."""


class InferJob(Job):
    """Run a model over very many images with Ray Data and write COCO detections."""

    verb: ClassVar[str] = "infer"
    examples: ClassVar[tuple[str, ...]] = (
        "retinaray infer model.onnx --images photos --output detections.json",
        "retinaray infer s3://bucket/model.onnx --images s3://bucket/photos/ "
        "--output s3://bucket/runs/monday --workers 16",
    )

    model: Annotated[Location, Flag("model", metavar="MODEL")]
    """.pth or .onnx file, local or on S3."""
    images: Annotated[Location, Flag("--images", metavar="DIR|s3://|list|coco.json|.tar")]
    """Folder or S3 prefix of images or of tars; a list (.txt, .csv, .jsonl, .parquet with a column
    uri); tars (a-{000..012}.tar); or COCO JSON (file names are relative to its folder)."""
    annotations: Annotated[Location | None, Flag("--annotations", metavar="FILE")] = None
    """COCO JSON: its image ids are used, only its images are read, and mAP is printed."""
    output: Annotated[Location, Flag("--output", metavar="detections.json|RUN_URI")] = (
        "detections.json"
    )
    """A .json file to write (.gz and .zst compress it), or the folder / S3 prefix of a run."""
    backend: Annotated[BackendName, Flag("--backend")] = "auto"
    """Runtime; auto picks by file and hardware, and says what it picked."""
    batch: Annotated[int, Field(ge=1, le=1024), Flag("--batch", unit="images")] = 8
    """Images per network call."""
    workers: Annotated[int | None, Field(ge=1, le=65_536), Flag("--workers", unit="workers")] = None
    """Engine processes; none = one per GPU, or one per two cores without GPUs."""
    part_size: Annotated[
        int | None, Field(ge=1, le=100_000), Flag("--part-size", unit="images")
    ] = None
    """Images that are committed together; none = chosen from the number of images alone."""
    overwrite: Annotated[bool, Flag("--overwrite")] = False
    """Start over although the output holds a run with other settings; its files are removed."""
    detection: DetectionConfig = DetectionConfig()
    tiling: TilingConfig = TilingConfig()
    select: SelectionConfig = SelectionConfig()
    write: WriteConfig = WriteConfig()
    reading: ReadingConfig = ReadingConfig()


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
