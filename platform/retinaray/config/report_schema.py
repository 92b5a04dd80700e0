"""Every setting of `report`: which runs a page tells of, and how large it may get."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, model_validator

from retinaray.config.nodes import (
    BackendName,
    Flag,
    Job,
    Location,
    ReadingConfig,
    expect_rule,
    require,
)


def _expect_different(values: tuple[str, ...]) -> tuple[str, ...]:
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)}: given more than once; name each run once")
    return values


class ReportJob(Job):
    """Write one HTML page about runs, alone or compared: curves, errors, and a gallery."""

    verb: ClassVar[str] = "report"
    examples: ClassVar[tuple[str, ...]] = (
        "retinaray report model_run --detect",
        "retinaray report first_run second_run --output compared.html",
        "retinaray report detections.json --annotations data/test.json --images data/images",
    )

    runs: Annotated[
        tuple[Location, ...],
        Field(min_length=1, max_length=8),
        AfterValidator(_expect_different),
        Flag("runs", metavar="RUN"),
    ]
    """Folders that train, tune or infer left, or JSON files: detections (COCO results), what
    evaluate printed, what parity wrote to --output."""
    output: Annotated[Location, Flag("--output", metavar="FILE.html")] = "report.html"
    """The page; it needs nothing beside it."""
    annotations: Annotated[Location | None, Flag("--annotations", metavar="FILE")] = None
    """COCO JSON that detections are compared with; none = the run's own."""
    images: Annotated[Location | None, Flag("--images", metavar="DIR|s3://")] = None
    """Folder or S3 prefix of the images for the gallery; none = the run's own."""
    detect: Annotated[bool, Flag("--detect")] = False
    """Run the weights of a training over its validation images, which takes as long as
    evaluate: for the sections that need detections."""
    backend: Annotated[BackendName, Flag("--backend")] = "auto"
    """Runtime for --detect."""
    batch: Annotated[int, Field(ge=1, le=1024), Flag("--batch", unit="images")] = 4
    """Images per network call for --detect."""
    rule: Annotated[Location, AfterValidator(expect_rule), Flag("--rule", metavar="RULE")] = "f1"
    """Operating point of each class where the model has no thresholds of its own: f1,
    precision=P, recall=R or fppi=X."""
    gallery: Annotated[int, Field(ge=0, le=1000), Flag("--gallery", unit="images")] = 24
    """Images in each of best, worst, most confused and random; 0 = no gallery."""
    picture_side: Annotated[int, Field(ge=64, le=4096), Flag("--picture-side", unit="px")] = 640
    """Longer side of an image in the page; larger ones are shrunk."""
    reading: ReadingConfig = ReadingConfig()

    @model_validator(mode="after")
    def _check_fields_together(self) -> ReportJob:
        require(
            [
                (
                    self.output.lower().endswith((".html", ".htm")),
                    f"output={self.output} (--output): expected a name that ends in .html",
                ),
                (
                    self.output not in self.runs,
                    f"output={self.output} is also a run: give the page another name",
                ),
            ]
        )
        return self
