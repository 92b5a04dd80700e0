"""Every setting of `infer`: which images, cut and decoded how, where to, and on what."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from retinaray.config.inference_schema import DetectionConfig
from retinaray.config.nodes import (
    BackendName,
    ClusterConfig,
    Config,
    Flag,
    Job,
    Location,
    ReadingConfig,
    Size,
    require,
)


def divides_a_gpu(share: float) -> bool:
    """Whether a share is 1/2, 1/3 ... as people write it; Ray never joins pieces of two GPUs."""
    return abs(share - 1 / max(1, round(1 / share))) <= 0.005


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


class DecodingConfig(Config):
    """Where compressed images become pixels."""

    device: Annotated[Literal["cpu", "gpu"], Flag("--decode")] = "cpu"
    """gpu: JPEG files on the engine's GPU (nvJPEG); its pixels differ a little from a processor's,
    so do scores."""
    num_cpus: Annotated[int, Field(ge=0, le=65_536), Flag("--decode-cpus", unit="CPUs")] = 0
    """Processors anywhere in the cluster that fetch and decode for the engines, for GPU nodes that
    have too few; 0 = each worker for itself."""
    resource: Annotated[str | None, Flag("--decode-resource", metavar="NAME")] = None
    """Custom resource of the nodes that decode; none = any node."""

    @model_validator(mode="after")
    def _check_fields_together(self) -> DecodingConfig:
        require(
            [
                (
                    self.device == "cpu" or self.num_cpus == 0,
                    f"decoding.device=gpu and decoding.num_cpus={self.num_cpus} are both given: "
                    "images are decoded in one place, keep --decode gpu or --decode-cpus",
                ),
                (
                    self.resource is None or self.num_cpus > 0,
                    f"decoding.resource={self.resource} says where --decode-cpus are, and there "
                    "are none: give --decode-cpus N",
                ),
            ]
        )
        return self


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
    gpus_per_worker: Annotated[float, Field(gt=0, le=1), Flag("--gpus-per-worker", unit="GPUs")] = (
        1.0
    )
    """Part of a GPU that each worker takes: 0.5 puts two engines on every GPU."""
    part_size: Annotated[
        int | None, Field(ge=1, le=100_000), Flag("--part-size", unit="images")
    ] = None
    """Images that are committed together; none = chosen from the number of images alone."""
    overwrite: Annotated[bool, Flag("--overwrite")] = False
    """Start over although the output holds a run with other settings; its files are removed."""
    detection: DetectionConfig = DetectionConfig()
    tiling: TilingConfig = TilingConfig()
    decoding: DecodingConfig = DecodingConfig()
    select: SelectionConfig = SelectionConfig()
    write: WriteConfig = WriteConfig()
    reading: ReadingConfig = ReadingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check_fields_together(self) -> InferJob:
        is_elsewhere = self.decoding.device == "gpu" or self.decoding.num_cpus > 0
        require(
            [
                (
                    self.tiling.tile is None or not is_elsewhere,
                    f"tiling.tile={self.tiling.tile}: tiles are decoded by the workers "
                    "themselves: leave out --decode gpu and --decode-cpus",
                ),
                (
                    divides_a_gpu(self.gpus_per_worker),
                    f"gpus_per_worker={self.gpus_per_worker:g} does not divide a GPU: give 1, 0.5, "
                    "0.33, 0.25, ...",
                ),
            ]
        )
        return self
