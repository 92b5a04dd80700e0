"""Which images a training learns from, at which size, and how they reach it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from retinaray.config.nodes import Config, Flag, Location, Size, require


class TrainDataConfig(Config):
    """What is learnt from, and at which size."""

    images: Annotated[Location, Flag("--images", metavar="DIR|s3://")] = "."
    """Folder or S3 prefix of the training images."""
    annotations: Annotated[Location, Flag("--annotations", metavar="FILE")]
    """COCO JSON of the training set."""
    val_images: Annotated[Location | None, Flag("--val-images", metavar="DIR|s3://")] = None
    """Folder of the validation images; none = --images."""
    val_annotations: Annotated[Location | None, Flag("--val-annotations", metavar="FILE")] = None
    """COCO JSON of the validation set; none = no validation, the last weights are kept."""
    classes: Annotated[int | None, Field(ge=1, le=100_000), Flag("--classes", unit="classes")] = (
        None
    )
    """Number of classes without background; none = as many as the JSON has; must agree with it."""
    resize: Annotated[int, Field(ge=32, le=8192), Flag("--resize", unit="px")] = 800
    """Short side of an image after resize."""
    max_size: Annotated[int, Field(ge=32, le=8192), Flag("--max-size", unit="px")] = 1333
    """Long side after resize at most."""
    size: Annotated[Size | None, Flag("--size", unit="px", metavar="H W")] = None
    """Network canvas, height and width; none = the one that --resize and --max-size need for
    these images."""
    two_canvases: Annotated[bool, Flag("--two-canvases")] = False
    """Train images that are higher than wide in batches of their own, on a canvas turned upright:
    less padding where both shapes occur. Validation and the model have one canvas for both."""
    windows: Annotated[Size | None, Flag("--windows", unit="px", metavar="H W")] = None
    """Train on windows of this height and width, cut at random from the resized images and mostly
    around an object: small objects at full size in the memory of a small canvas. Validation and the
    model keep the whole canvas; none = whole images."""
    on_bad_box: Annotated[Literal["drop", "error"], Flag("--on-bad-box")] = "drop"
    """Boxes without area, outside the image or not finite: leave out with a warning, or refuse
    the set."""
    loader_processes: Annotated[
        int | None, Field(ge=0, le=64), Flag("--loader-processes", unit="processes")
    ] = None
    """Processes that decode for one training worker; none = chosen by the worker's cores,
    0 = in the worker."""
    cache: Annotated[Location | None, Flag("--cache", metavar="DIR")] = None
    """Folder on a local disk of each machine that keeps the training images of S3 or a network disk
    for later epochs and runs; whether a file has changed is asked at each use. None = no cache."""
    cache_gb: Annotated[float, Field(gt=0), Flag("--cache-gb", unit="GB")] = 20.0
    """Size limit of that folder, over all runs of a user; what no running training uses makes room
    first."""
    cache_decoded: Annotated[bool, Flag("--cache-decoded")] = False
    """Keep decoded pixels instead of files: for small sets, since pixels take 10 to 20 times the
    room of a JPEG. The batches are the same, bit for bit."""
    cache_recheck_s: Annotated[float, Field(ge=0), Flag("--cache-recheck", unit="s")] = 0.0
    """For so long a kept file counts as unchanged without asking its storage: spares a request per
    image; 0 = always ask."""

    @model_validator(mode="after")
    def _check_fields_together(self) -> TrainDataConfig:
        require(
            [
                (
                    self.max_size >= self.resize,
                    f"data.max_size={self.max_size} is below data.resize={self.resize}: the long "
                    "side cannot be shorter than the short side; raise --max-size or lower "
                    "--resize",
                ),
                (
                    self.val_images is None or self.val_annotations is not None,
                    f"data.val_images={self.val_images} without data.val_annotations: nothing "
                    "would be validated; give --val-annotations, or drop --val-images",
                ),
                (
                    not self.two_canvases or self.size is None,
                    f"data.two_canvases=true with data.size={self.size}: both canvases follow from "
                    "the images; drop --size, or --two-canvases",
                ),
                (
                    self.windows is None or not self.two_canvases,
                    f"data.windows={self.windows} with data.two_canvases=true: windows have one "
                    "shape whatever the images have; drop --two-canvases",
                ),
                (
                    self.windows is None
                    or self.size is None
                    or all(
                        part <= side for part, side in zip(self.windows, self.size, strict=True)
                    ),
                    f"data.windows={self.windows} is larger than data.size={self.size}: there is "
                    "nothing to cut a window from; make --windows smaller, or drop it",
                ),
                (
                    self.cache is None or "://" not in self.cache,
                    f"data.cache={self.cache}: expected a folder on a local disk; give --cache a "
                    "path such as /mnt/nvme/cache",
                ),
                (
                    self.cache is not None or not (self.cache_decoded or self.cache_recheck_s),
                    f"data.cache_decoded={self.cache_decoded} and data.cache_recheck_s="
                    f"{self.cache_recheck_s:g} without data.cache would not be used: add --cache "
                    "DIR",
                ),
            ]
        )
        return self
