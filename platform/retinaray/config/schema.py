"""Every setting of every job, gathered in one place to import from; no torch, no ray."""

from __future__ import annotations

from retinaray.config.inference_schema import (
    DemoJob,
    DetectionConfig,
    DoctorJob,
    EvaluateJob,
    ExportJob,
    InferJob,
    ThresholdsJob,
)
from retinaray.config.nodes import (
    BackboneName,
    BackendName,
    Config,
    Flag,
    Job,
    ReadingConfig,
    Size,
)
from retinaray.config.sweep_schema import AnchorsJob, SweepConfig, TuneJob
from retinaray.config.training_schema import (
    AnchorConfig,
    AugmentConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainDataConfig,
    TrainJob,
    TrainRunConfig,
)

__all__ = [
    "JOBS",
    "AnchorConfig",
    "AnchorsJob",
    "AugmentConfig",
    "BackboneName",
    "BackendName",
    "Config",
    "DemoJob",
    "DetectionConfig",
    "DoctorJob",
    "EvaluateJob",
    "ExportJob",
    "Flag",
    "InferJob",
    "Job",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "ReadingConfig",
    "Size",
    "SweepConfig",
    "ThresholdsJob",
    "TrainDataConfig",
    "TrainJob",
    "TrainRunConfig",
    "TuneJob",
]

JOBS: tuple[type[Job], ...] = (
    TrainJob,
    TuneJob,
    EvaluateJob,
    ThresholdsJob,
    ExportJob,
    InferJob,
    AnchorsJob,
    DoctorJob,
    DemoJob,
)
"""Every job class, in the order of the verbs in `retinaray --help`."""
