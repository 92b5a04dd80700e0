"""Every setting of `convert`: from which label format to which."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from retinaray.config.nodes import Flag, Job, Location, require

SourceFormat = Literal["coco", "coco-results", "voc", "yolo", "kitti", "open-images", "labelme"]
TargetFormat = Literal["coco", "voc", "yolo", "kitti", "open-images", "labelme", "label-studio"]

_WITHOUT_SIZES = ("yolo", "kitti", "open-images")


def _expect_local(value: str) -> str:
    if "://" in value:
        raise ValueError("expected a path of this machine; copy the files here first")
    return value


LocalPath = Annotated[Location, AfterValidator(_expect_local)]


class ConvertJob(Job):
    """Convert labels between COCO and the formats of other tools; images are not copied."""

    verb: ClassVar[str] = "convert"
    examples: ClassVar[tuple[str, ...]] = (
        "retinaray convert data/voc data/train.json --from voc",
        "retinaray convert data/train.json labels --to yolo",
        "retinaray convert labels back.json --from yolo --images data/train "
        "--reference data/train.json",
        "retinaray convert detections.json review --from coco-results "
        "--reference data/test.json --to label-studio",
    )

    source: Annotated[LocalPath, Flag("source", metavar="SOURCE")]
    """COCO JSON, or the folder of labels (Open Images: also the CSV of boxes)."""
    output: Annotated[LocalPath, Flag("output", metavar="OUTPUT")]
    """What is written: NAME.json for COCO, else a new folder."""
    source_format: Annotated[SourceFormat, Flag("--from")] = "coco"
    """Format of SOURCE; coco-results is a list of detections, as infer writes it."""
    target_format: Annotated[TargetFormat, Flag("--to")] = "coco"
    """Format of OUTPUT."""
    images: Annotated[LocalPath | None, Flag("--images", metavar="DIR")] = None
    """Folder of the images, for formats without image sizes: yolo, kitti, open-images."""
    reference: Annotated[LocalPath | None, Flag("--reference", metavar="FILE.json")] = None
    """COCO JSON with these images: its ids, sizes, order and classes are taken, its boxes are
    not."""
    class_names: Annotated[LocalPath | None, Flag("--class-names", metavar="FILE")] = None
    """Class names in class order: one a line, or a data.yaml; none = those of --reference, or of
    classes.txt, obj.names or data.yaml beside the labels, or those found, by alphabet."""
    voc_origin: Annotated[Literal["auto", "zero", "one"], Flag("--voc-origin")] = "auto"
    """Where VOC counts pixels from: one = as the VOC devkit, the last pixel included; auto = one
    for files whose database is a VOC year, zero for others and when writing."""
    difficult: Annotated[Literal["keep", "crowd", "drop"], Flag("--difficult")] = "keep"
    """Boxes marked difficult: ordinary ones, regions to ignore (as VOC scores), or left out."""
    image_prefix: Annotated[str, Flag("--image-prefix", metavar="TEXT")] = "/data/local-files/?d="
    """label-studio: what stands before each file name; the address or folder of the images."""
    threads: Annotated[int, Field(ge=1, le=256), Flag("--read-threads", unit="threads")] = 8
    """Image headers read at once."""

    @model_validator(mode="after")
    def _check_fields_together(self) -> ConvertJob:
        source, target = self.source_format, self.target_format
        has_sizes = source not in _WITHOUT_SIZES or self.images or self.reference
        require(
            [
                (
                    source != target or self.reference is not None or self.difficult != "keep",
                    f"source_format (--from) and target_format (--to) are both {source}: "
                    + (
                        "give --from or --to"
                        if source != "coco" or self.source.endswith(".json")
                        else f"{self.source} is no JSON file; say which labels it holds, such as "
                        "--from voc"
                    ),
                ),
                (
                    bool(has_sizes),
                    f"source_format={source} tells no image sizes: give images (--images DIR) or "
                    "reference (--reference FILE.json)",
                ),
                (
                    source != "coco-results" or self.reference is not None,
                    "source_format=coco-results names no images and classes: give reference "
                    "(--reference FILE.json)",
                ),
                (
                    target != "coco" or self.output.endswith(".json"),
                    f"output={self.output}: target_format=coco writes one file, NAME.json",
                ),
                (
                    target == "coco" or not self.output.endswith(".json"),
                    f"output={self.output}: target_format={target} writes a folder; name one",
                ),
            ]
        )
        return self
