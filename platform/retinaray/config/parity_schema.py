"""Every setting of `parity`: the comparison of exported files with the weights they come from."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, model_validator

from retinaray.config.nodes import (
    BackendName,
    Config,
    Flag,
    Job,
    Location,
    ReadingConfig,
    require,
)

EXPORTED_ENDINGS = (".onnx", ".plan", ".engine")

Share = Annotated[float, Field(ge=0, le=1)]


def _expect_exported(values: tuple[str, ...]) -> tuple[str, ...]:
    wrong = [value for value in values if not value.lower().endswith(EXPORTED_ENDINGS)]
    if wrong:
        raise ValueError(
            f"expected exported files that end in {', '.join(EXPORTED_ENDINGS)}, got "
            f"{', '.join(wrong)}"
        )
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)}: given more than once")
    return values


class ToleranceConfig(Config):
    """How much a runtime may differ from torch in float32."""

    box_px: Annotated[float, Field(ge=0), Flag("--tolerance-px", unit="px")] = 0.05
    """Largest difference of a box before suppression, for fp32."""
    score: Annotated[float, Field(ge=0, le=1), Flag("--tolerance-score")] = 1e-4
    """Largest difference of a score before suppression, for fp32."""
    ap_fp32: Annotated[Share, Flag("--tolerance-ap-fp32", unit="AP")] = 0.0005
    """Largest difference of AP for fp32, where there are annotations."""
    ap_bf16: Annotated[Share, Flag("--tolerance-ap-bf16", unit="AP")] = 0.005
    """The same for bf16."""
    ap_fp16: Annotated[Share, Flag("--tolerance-ap-fp16", unit="AP")] = 0.002
    """The same for fp16."""
    ap_int8: Annotated[Share, Flag("--tolerance-ap-int8", unit="AP")] = 0.01
    """The same for int8."""
    changed_bf16: Annotated[Share, Flag("--tolerance-changed-bf16", unit="share")] = 0.03
    """Largest share of detections that come, go or change their class for bf16."""
    changed_fp16: Annotated[Share, Flag("--tolerance-changed-fp16", unit="share")] = 0.01
    """The same for fp16."""
    changed_int8: Annotated[Share, Flag("--tolerance-changed-int8", unit="share")] = 0.1
    """The same for int8."""


class ParityJob(Job):
    """Compare exported files with their weights: boxes, scores, AP and latency on every runtime."""

    verb: ClassVar[str] = "parity"
    examples: ClassVar[tuple[str, ...]] = (
        "retinaray parity model.pth model.onnx --images data/test --annotations data/test.json",
        "retinaray parity model.pth fp16.onnx int8.onnx engine.plan --images data/test "
        "--report parity.html",
    )

    model: Annotated[Location, Flag("model", metavar="model.pth")]
    """Trained weights, run by torch in float32: what is right."""
    files: Annotated[
        tuple[Location, ...],
        Field(min_length=1),
        AfterValidator(_expect_exported),
        Flag("files", metavar="FILE"),
    ]
    """Exported files: .onnx, or .plan and .engine with their .json beside them."""
    images: Annotated[Location, Flag("--images", metavar="DIR|s3://")]
    """Images like those that the model will see."""
    annotations: Annotated[Location | None, Flag("--annotations", metavar="FILE")] = None
    """COCO JSON of these images: AP is compared, too."""
    limit: Annotated[int | None, Field(ge=1), Flag("--limit", unit="images")] = 100
    """Images to compare, the first ones; none = all."""
    backend: Annotated[BackendName, Flag("--backend")] = "auto"
    """Runtime to check; auto = every one that can run here."""
    batch: Annotated[int, Field(ge=1, le=1024), Flag("--batch", unit="images")] = 1
    """Images per network call, for the latencies."""
    threads: Annotated[int | None, Field(ge=1, le=1024), Flag("--threads", unit="threads")] = None
    """Processor threads per runtime; none = all cores."""
    output: Annotated[Location | None, Flag("--output", metavar="FILE.json")] = None
    """Write all numbers there."""
    report: Annotated[Location | None, Flag("--report", metavar="FILE.html")] = None
    """Write a page there: the table, histograms, and the images that differ most."""
    tolerance: ToleranceConfig = ToleranceConfig()
    reading: ReadingConfig = ReadingConfig()

    @model_validator(mode="after")
    def _check_fields_together(self) -> ParityJob:
        plans = [name for name in self.files if not name.lower().endswith(".onnx")]
        require(
            [
                (
                    self.backend != "torch",
                    "backend=torch runs no exported file: it is the reference; leave --backend out",
                ),
                (
                    self.backend in ("auto", "tensorrt") or not plans,
                    f"backend={self.backend} cannot run {', '.join(plans)}: leave --backend out, "
                    "or these files",
                ),
                (
                    self.output is None or self.output != self.report,
                    f"output and report are both {self.output}: give them different names",
                ),
            ]
        )
        return self
