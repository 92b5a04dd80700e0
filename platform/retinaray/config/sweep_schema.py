"""Every setting of `anchors` and `tune`, as typed, frozen trees."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from retinaray.config.nodes import (
    Config,
    Flag,
    Job,
    Location,
    ReadingConfig,
    Size,
    expect_rule,
    require,
)
from retinaray.config.search_space import find_space_faults
from retinaray.config.training_schema import AnchorConfig, TrainJob


class AnchorsJob(Job):
    """Say which ground truth the anchors can reach, and propose anchors that reach more."""

    verb: ClassVar[str] = "anchors"
    examples: ClassVar[tuple[str, ...]] = (
        "retinaray anchors --annotations data/train.json --resize 800 --max-size 1333",
        "retinaray anchors --annotations data/train.json --anchor-scales 2 2.52 3.17 --levels 2-7",
        "retinaray anchors --annotations data/train.json --fit --scales 3 --ratios 3",
    )

    annotations: Annotated[Location, Flag("--annotations", metavar="FILE")]
    """COCO JSON of the training set."""
    resize: Annotated[int, Field(ge=32, le=8192), Flag("--resize", unit="px")] = 800
    """Short side of an image after resize, as in train."""
    max_size: Annotated[int, Field(ge=32, le=8192), Flag("--max-size", unit="px")] = 1333
    """Long side after resize at most."""
    size: Annotated[Size | None, Flag("--size", unit="px", metavar="H W")] = None
    """Network canvas; none = the one that --resize and --max-size need for these images."""
    fit: Annotated[bool, Flag("--fit")] = False
    """Propose scales, ratios, levels and input size that reach more per anchor."""
    num_scales: Annotated[int, Field(ge=1, le=9), Flag("--scales", unit="per level")] = 3
    """Scales of the proposal."""
    num_ratios: Annotated[int, Field(ge=1, le=9), Flag("--ratios", unit="per level")] = 3
    """Aspect ratios of the proposal."""
    fpn_channels: Annotated[
        int, Field(ge=16, le=1024, multiple_of=8), Flag("--fpn-channels", unit="channels")
    ] = 256
    """Width of the heads, for their cost."""
    head_depth: Annotated[int, Field(ge=0, le=8), Flag("--head-depth", unit="convolutions")] = 4
    """Convolutions in each head before the output layer, for their cost."""
    picture: Annotated[Location | None, Flag("--picture", metavar="FILE.png")] = (
        "anchor_coverage.png"
    )
    """Heat map of box size and aspect with the area that the anchors reach; none = no picture."""
    on_bad_box: Annotated[Literal["drop", "error"], Flag("--on-bad-box")] = "drop"
    """Boxes without area, outside the image or not finite: leave out with a warning, or refuse
    the set."""
    anchors: AnchorConfig = AnchorConfig()
    reading: ReadingConfig = ReadingConfig()

    @model_validator(mode="after")
    def _check_fields_together(self) -> AnchorsJob:
        require(
            [
                (
                    self.max_size >= self.resize,
                    f"max_size={self.max_size} is below resize={self.resize}: the long side cannot "
                    "be shorter than the short side; raise --max-size or lower --resize",
                ),
            ]
        )
        return self


class SweepConfig(Config):
    """How the space is searched."""

    trials: Annotated[int, Field(ge=1, le=100_000), Flag("--trials", unit="trials")] = 16
    """Settings to try; a grid tries all its points."""
    concurrent: Annotated[
        int | None, Field(ge=1, le=10_000), Flag("--concurrent", unit="trials")
    ] = None
    """Trials at once, each with --workers workers; none = as many as the cluster holds."""
    search: Annotated[Literal["tpe", "random", "grid"], Flag("--search")] = "tpe"
    """Optuna's TPE, random, or every point of the choices."""
    scheduler: Annotated[Literal["asha", "none"], Flag("--scheduler")] = "asha"
    """asha stops trials whose validation is weak beside that of others of their age."""
    grace_epochs: Annotated[int, Field(ge=1), Flag("--grace-epochs", unit="epochs")] = 3
    """No trial is stopped before."""
    reduction: Annotated[float, Field(gt=1, le=16), Flag("--reduction")] = 3.0
    """One of so many trials goes on at each of asha's stages."""
    warm_start: Annotated[bool, Flag("--warm-start")] = True
    """The first trials are the default, the halved and the fitted anchor scales, as far as the
    space holds them."""
    retries: Annotated[int, Field(ge=0, le=100), Flag("--retries")] = 1
    """A failed trial is run again so many times, from its last checkpoint."""
    time_budget_s: Annotated[int | None, Field(ge=1), Flag("--time-budget", unit="s")] = None
    """Stop the sweep after this time with what there is; none = when the trials are done."""
    rule: Annotated[Location, AfterValidator(expect_rule), Flag("--rule", metavar="RULE")] = "f1"
    """Operating point per class: f1, precision=P, recall=R or fppi=X; see `thresholds --help`."""


class TuneJob(TrainJob):
    """Search anchors and any other setting of `train` with Ray Tune, by validation AP."""

    verb: ClassVar[str] = "tune"
    examples: ClassVar[tuple[str, ...]] = (
        "retinaray tune --config jobs/configs/tune_anchors.yaml",
        "retinaray tune sweep --config jobs/configs/tune_anchors.yaml --trials 32 --workers 2 "
        "--objective AP_small",
    )

    output: Annotated[Location, Flag("sweep", metavar="SWEEP_DIR")]
    """Folder for the sweep: best.pth, best.yaml, trials.csv, plots, every trial. The same command
    again resumes it."""
    space: Annotated[dict[str, Any], Field(min_length=1)]
    """What is searched, by YAML key: a list of choices, or {uniform: [low, high]},
    {loguniform: [low, high]}, {quniform: [low, high, step]}. Keys are those of train, and
    anchors.base_scale and anchors.num_scales (so many scales per octave from the base)."""
    sweep: SweepConfig = SweepConfig()

    @model_validator(mode="after")
    def _check_sweep(self) -> TuneJob:
        tree = self.model_dump(mode="json", exclude={"space", "sweep"})
        require(
            [
                (
                    self.data.val_annotations is not None,
                    "data.val_annotations (--val-annotations): required for a sweep: trials are "
                    "compared by validation AP",
                ),
                (
                    self.run.min_workers is None and self.run.storage is None,
                    "run.min_workers (--min-workers) and run.storage (--checkpoints): a sweep's "
                    "trials keep their number of workers, and their checkpoints in its folder; "
                    "leave these options out",
                ),
                *((False, fault) for fault in find_space_faults(self.space, TrainJob, tree)),
                (
                    self.sweep.search != "grid" or all(is_choice(d) for d in self.space.values()),
                    "sweep.search=grid: every entry of space must be a list of choices; give "
                    "lists, or --search random",
                ),
            ]
        )
        return self


def is_choice(domain: object) -> bool:
    """Whether an entry of the space is a list of choices."""
    return isinstance(domain, list)
