"""Every setting of `train`, as a typed, frozen tree.

A field's docstring is its help text; `Flag` gives it a short command-line name (ODTK's, where ODTK
had one). Fields without a `Flag` are reached by their dotted path: `--loss.focal_gamma 1.5`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from retinaray.config.nodes import (
    BackboneName,
    ClusterConfig,
    Config,
    Flag,
    Job,
    Location,
    ReadingConfig,
    require,
)
from retinaray.config.optim_schema import LossConfig, OptimConfig
from retinaray.config.train_data_schema import TrainDataConfig

__all__ = [
    "METRICS",
    "AnchorConfig",
    "AugmentConfig",
    "LevelsName",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "TrackingConfig",
    "TrainDataConfig",
    "TrainJob",
    "TrainRunConfig",
]

Positive = Annotated[float, Field(gt=0)]
METRICS = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR_1",
    "AR_10",
    "AR_100",
    "AR_small",
    "AR_medium",
    "AR_large",
)
"""COCO's twelve numbers, by the names in which they are reported."""
LevelsName = Literal["3-7", "2-7"]


def _expect_metric(value: str) -> str:
    if value not in METRICS and not (value.startswith("AP/") and len(value) > len("AP/")):
        raise ValueError(f"expected one of {', '.join(METRICS)}, or a class's AP as in AP/car")
    return value


class ModelConfig(Config):
    """The network."""

    backbone: Annotated[BackboneName, Flag("--backbone")] = "ResNet50FPN"
    """Feature extractor below the feature pyramid."""
    norm: Annotated[Literal["auto", "frozen_bn", "bn", "sync_bn", "gn"], Flag("--norm")] = "auto"
    """Normalisation of the backbone; auto = frozen_bn with pretrained weights, gn from scratch;
    sync_bn = bn over the images of all workers, where these have GPUs."""
    backbone_weights: Annotated[
        Location | None, Flag("--backbone-weights", metavar="NAME|FILE")
    ] = None
    """torchvision weights name (DEFAULT, IMAGENET1K_V1, ...: downloaded) or a local
    .pth/.safetensors file; none = from scratch."""
    fine_tune: Annotated[Location | None, Flag("--fine-tune", metavar="FILE")] = None
    """Weights file of a whole model to start from, instead of --backbone-weights: all that fits is
    taken, the class head's last layer too when the classes are the same."""
    freeze_at: Annotated[int, Field(ge=0, le=4), Flag("--freeze", unit="stages")] = 0
    """Stem and first stages of the backbone that keep their pretrained weights; 0 = all are
    trained."""
    stride_in_1x1: bool | None = None
    """Bottlenecks stride in their first 1x1 (Caffe weights) instead of the 3x3; none = as the
    weights file says, else 3x3."""
    fpn_channels: Annotated[
        int, Field(ge=16, le=1024, multiple_of=8), Flag("--fpn-channels", unit="channels")
    ] = 256
    """Width of the pyramid and of both heads."""
    head_depth: Annotated[int, Field(ge=0, le=8), Flag("--head-depth", unit="convolutions")] = 4
    """3x3 convolutions in each head before the output layer."""
    head_norm: Annotated[Literal["none", "gn"], Flag("--head-norm")] = "none"
    """Group norms behind these convolutions; none = as in the paper and in ODTK."""

    @property
    def is_random(self) -> bool:
        """Whether no weights are given to start from."""
        return self.backbone_weights is None and self.fine_tune is None


class AnchorConfig(Config):
    """Anchor boxes: data that travels with the weights, never a constant in the source."""

    scales: Annotated[
        tuple[Positive, ...],
        Field(min_length=1, max_length=9),
        Flag("--anchor-scales", unit="strides"),
    ] = (4.0, 4.0 * 2 ** (1 / 3), 4.0 * 2 ** (2 / 3))
    """Anchor side over stride; halve all (2 2.52 3.17) when objects are small."""
    ratios: Annotated[
        tuple[Positive, ...],
        Field(min_length=1, max_length=9),
        Flag("--anchor-ratios", unit="height/width"),
    ] = (1.0, 2.0, 0.5)
    """Aspect ratios, height over width."""
    levels: Annotated[LevelsName, Flag("--levels")] = "3-7"
    """Pyramid levels with anchors; 2-7 adds stride 4 for very small objects (4x the anchors)."""
    convention: Annotated[Literal["centered", "odtk", "odtk-legacy"], Flag("--anchors")] = (
        "centered"
    )
    """Where an anchor lies in its cell; odtk and odtk-legacy reproduce the two generations of
    ODTK weights."""

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of each level."""
        first, last = (int(level) for level in self.levels.split("-"))
        return tuple(2**level for level in range(first, last + 1))


class AugmentConfig(Config):
    """Random changes to training images."""

    flip: Annotated[float, Field(ge=0, le=1), Flag("--flip", unit="probability")] = 0.5
    """Mirror left-right."""
    vertical_flip: Annotated[
        float, Field(ge=0, le=1), Flag("--vertical-flip", unit="probability")
    ] = 0.0
    """Mirror top-bottom: for views from above or through a microscope."""
    jitter: Annotated[
        tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None,
        Flag("--jitter", unit="px", metavar="MIN MAX"),
    ] = None
    """Short side drawn from this range; none = 0.8 to 1.25 times --resize, or the short side of
    --size; equal numbers turn it off."""
    crop: Annotated[float, Field(ge=0, le=1), Flag("--crop", unit="probability")] = 0.3
    """Zoom into a random part that keeps at least one box whole."""
    brightness: Annotated[float, Field(ge=0, le=1), Flag("--augment-brightness")] = 0.2
    """Brightness factor drawn evenly from 1 +- this, not from a normal distribution as in ODTK."""
    contrast: Annotated[float, Field(ge=0, le=1), Flag("--augment-contrast")] = 0.2
    """Contrast factor drawn evenly from 1 +- this, not from a normal distribution as in ODTK."""
    saturation: Annotated[float, Field(ge=0, le=1), Flag("--augment-saturation")] = 0.2
    """Saturation factor drawn evenly from 1 +- this, not from a normal distribution as in ODTK."""
    hue: Annotated[float, Field(ge=0, le=0.5), Flag("--augment-hue", unit="turns")] = 0.02
    """Hue shift drawn evenly from +- this part of the colour circle, not from a normal distribution
    as in ODTK."""
    mosaic: Annotated[float, Field(ge=0, le=1), Flag("--mosaic", unit="probability")] = 0.0
    """Four images in one canvas."""

    @model_validator(mode="after")
    def _check_fields_together(self) -> AugmentConfig:
        if self.jitter is not None and self.jitter[0] > self.jitter[1]:
            raise ValueError(
                f"augment.jitter={self.jitter} (--jitter): expected MIN <= MAX; swap the two"
            )
        return self


class TrainRunConfig(Config):
    """Length, workers and bookkeeping of a training."""

    batch: Annotated[int, Field(ge=1, le=65_536), Flag("--batch", unit="images")] = 8
    """Images per step over all workers; the loss is the same for any number of workers."""
    epochs: Annotated[int | None, Field(ge=1), Flag("--epochs", unit="epochs")] = None
    """Passes over the training set; none = 40, unless --iters is given."""
    iters: Annotated[int | None, Field(ge=1), Flag("--iters", unit="steps")] = None
    """Optimizer steps, instead of --epochs."""
    workers: Annotated[int, Field(ge=1, le=4096), Flag("--workers", unit="workers")] = 1
    """Ray Train workers: one per GPU, or CPU processes that share the cores."""
    accumulate: Annotated[int, Field(ge=1, le=4096), Flag("--accumulate", unit="parts")] = 1
    """Parts in which each worker's share of a batch goes through the network, for less memory; the
    gradient is that of the whole batch (batch norms see a part)."""
    precision: Annotated[Literal["auto", "bf16", "fp16", "fp32"], Flag("--precision")] = "auto"
    """auto = bf16 autocast where the device has it; fp16 = autocast with a scaled loss, on GPUs
    without bf16."""
    compile: Annotated[bool, Flag("--compile")] = False
    """Compile the network in each worker (torch.compile): minutes at the start, faster steps
    after it; needs a C++ compiler there."""
    seed: Annotated[int, Field(ge=0, lt=2**31), Flag("--seed")] = 0
    """Seed of weights, order and augmentation."""
    val_every: Annotated[int, Field(ge=1), Flag("--val-every", unit="epochs")] = 1
    """Validate, and keep a checkpoint, after this many epochs (and at the end)."""
    patience: Annotated[int, Field(ge=0), Flag("--patience", unit="validations")] = 20
    """Stop after this many validations without a better AP; 0 = never."""
    log_every: Annotated[int, Field(ge=1), Flag("--log-every", unit="steps")] = 10
    """Steps between two progress reports."""
    objective: Annotated[
        Location, AfterValidator(_expect_metric), Flag("--objective", metavar="METRIC")
    ] = "AP"
    """What the kept weights are best at: one of COCO's twelve numbers (AP, AP50, AP_small, AR_100,
    ...) or a class's AP, as in AP/car."""
    latency_price: Annotated[float, Field(ge=0), Flag("--latency-price", unit="per ms")] = 0.0
    """Taken off the objective for each millisecond that one image takes on the training device; 0 =
    speed does not count."""
    strict_anchors: Annotated[bool, Flag("--strict-anchors")] = False
    """Refuse to train when more than 1 % of the ground truth has no anchor with IoU 0.5."""
    min_workers: Annotated[int | None, Field(ge=1), Flag("--min-workers", unit="workers")] = None
    """Go on with as few when nodes are lost, and grow back; none = always --workers."""
    storage: Annotated[Location | None, Flag("--checkpoints", metavar="DIR|s3://")] = None
    """Folder or S3 prefix of this run alone for its checkpoints; none = the run folder."""
    keep_every: Annotated[int, Field(ge=0), Flag("--keep-every", unit="epochs")] = 0
    """Keep the weights of every so many epochs for good, beside best and last: those of the first
    checkpoint at or after each; 0 = none."""
    checkpoint_minutes: Annotated[
        float | None, Field(gt=0), Flag("--checkpoint-minutes", unit="minutes")
    ] = None
    """Between validations, keep a checkpoint after this time too, unvalidated, to go on from; none
    = only after validations."""
    max_failures: Annotated[int, Field(ge=0), Flag("--max-failures")] = 3
    """Worker failures that are survived by going back to the last checkpoint."""
    override: Annotated[bool, Flag("--override")] = False
    """Start over although a run of this name exists with other settings; its folder is
    replaced."""

    @model_validator(mode="after")
    def _check_fields_together(self) -> TrainRunConfig:
        require(
            [
                (
                    self.epochs is None or self.iters is None,
                    f"run.epochs={self.epochs} and run.iters={self.iters} are both given: "
                    "keep one (--epochs or --iters)",
                ),
                (
                    self.batch % self.workers == 0,
                    f"run.batch={self.batch} does not divide among run.workers={self.workers}: "
                    f"make --batch a multiple of {self.workers * self.accumulate}",
                ),
                (
                    self.batch % self.workers != 0
                    or self.batch // self.workers % self.accumulate == 0,
                    f"run.batch={self.batch} of run.workers={self.workers} does not divide into "
                    f"run.accumulate={self.accumulate} parts each: make --batch a multiple of "
                    f"{self.workers * self.accumulate}, or lower --accumulate",
                ),
                (
                    self.min_workers is None or self._takes(self.min_workers),
                    f"run.min_workers={self.min_workers}: expected at most run.workers="
                    f"{self.workers}, and run.batch={self.batch} a multiple of it times "
                    f"run.accumulate={self.accumulate}",
                ),
            ]
        )
        return self

    def _takes(self, num_workers: int) -> bool:
        return num_workers <= self.workers and self.batch % (num_workers * self.accumulate) == 0


class TrackingConfig(Config):
    """Trackers of experiments that are told of a run, besides the files in its folder."""

    mlflow: Annotated[bool, Flag("--mlflow")] = False
    """Report settings, metrics, the outcome and its files to MLflow (pip install
    'retinaray[mlflow]')."""
    mlflow_uri: Annotated[Location | None, Flag("--mlflow-uri", metavar="URI")] = None
    """MLflow's server or store; none = MLFLOW_TRACKING_URI, else mlflow.db in this folder."""
    wandb: Annotated[bool, Flag("--wandb")] = False
    """Report the same to Weights & Biases (pip install 'retinaray[wandb]'); WANDB_MODE=offline
    keeps it in the run folder."""
    experiment: Annotated[Location, Flag("--experiment", metavar="NAME")] = "retinaray"
    """MLflow's experiment and Weights & Biases' project."""
    upload_model: Annotated[bool, Flag("--upload-model")] = True
    """Hand the kept weights to the trackers too, not only their path."""

    @model_validator(mode="after")
    def _check_fields_together(self) -> TrackingConfig:
        require(
            [
                (
                    self.mlflow or self.mlflow_uri is None,
                    f"tracking.mlflow_uri={self.mlflow_uri} (--mlflow-uri) without tracking.mlflow "
                    "would not be used: add --mlflow",
                ),
            ]
        )
        return self


class TrainJob(Job):
    """Train a RetinaNet with Ray Train and keep the best weights."""

    verb: ClassVar[str] = "train"
    examples: ClassVar[tuple[str, ...]] = (
        "retinaray train model.pth --images data/train --annotations data/train.json "
        "--val-images data/val --val-annotations data/val.json",
        "retinaray train model.pth --config jobs/configs/train_small_objects.yaml --workers 4 "
        "--batch 32",
        "retinaray train model.pth --annotations data/train.json --anchor-scales 2 2.52 3.17 "
        "loss.focal_gamma=1.5",
    )

    output: Annotated[Location, Flag("model", metavar="model.pth")]
    """Weights file to write; its run folder (checkpoints, logs, curves) stands beside it."""
    model: ModelConfig = ModelConfig()
    anchors: AnchorConfig = AnchorConfig()
    data: TrainDataConfig
    reading: ReadingConfig = ReadingConfig()
    cluster: ClusterConfig = ClusterConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    run: TrainRunConfig = TrainRunConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check_sections_together(self) -> TrainJob:
        is_random = self.model.is_random
        require(
            [
                (
                    self.model.norm != "frozen_bn" or not is_random,
                    "model.norm=frozen_bn with model.backbone_weights=none: frozen statistics of "
                    "random weights cannot be trained; give --backbone-weights or --fine-tune, or "
                    "--norm gn",
                ),
                (
                    self.model.freeze_at == 0 or not is_random,
                    f"model.freeze_at={self.model.freeze_at} with model.backbone_weights=none: "
                    "random layers would never learn; give --backbone-weights or --fine-tune, or "
                    "drop --freeze",
                ),
                (
                    self.model.backbone_weights is None or self.model.fine_tune is None,
                    f"model.backbone_weights={self.model.backbone_weights} and model.fine_tune="
                    f"{self.model.fine_tune} are both given: a whole model has its backbone; keep "
                    "--fine-tune or --backbone-weights",
                ),
            ]
        )
        return self
