"""Every setting of every job, gathered in one place to import from; no torch, no ray."""

from __future__ import annotations

from retinaray.config.batch_schema import (
    DecodingConfig,
    InferJob,
    SelectionConfig,
    TilingConfig,
    WriteConfig,
)
from retinaray.config.convert_schema import ConvertJob
from retinaray.config.export_schema import (
    ENGINE_ENDINGS,
    BundleJob,
    CalibrationConfig,
    EngineConfig,
    ExportJob,
    GateConfig,
)
from retinaray.config.import_schema import ImportOdtkJob
from retinaray.config.inference_schema import (
    DemoJob,
    DetectionConfig,
    DoctorJob,
    EvaluateJob,
    KittiConfig,
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
from retinaray.config.parity_schema import ParityJob, ToleranceConfig
from retinaray.config.plan_schema import PlanJob
from retinaray.config.report_schema import ReportJob
from retinaray.config.sweep_schema import AnchorsJob, SweepConfig, TuneJob
from retinaray.config.training_schema import (
    AnchorConfig,
    AugmentConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrackingConfig,
    TrainDataConfig,
    TrainJob,
    TrainRunConfig,
)

__all__ = [
    "ENGINE_ENDINGS",
    "JOBS",
    "AnchorConfig",
    "AnchorsJob",
    "AugmentConfig",
    "BackboneName",
    "BackendName",
    "BundleJob",
    "CalibrationConfig",
    "Config",
    "ConvertJob",
    "DecodingConfig",
    "DemoJob",
    "DetectionConfig",
    "DoctorJob",
    "EngineConfig",
    "EvaluateJob",
    "ExportJob",
    "Flag",
    "GateConfig",
    "ImportOdtkJob",
    "InferJob",
    "Job",
    "KittiConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "ParityJob",
    "PlanJob",
    "ReadingConfig",
    "ReportJob",
    "SelectionConfig",
    "Size",
    "SweepConfig",
    "ThresholdsJob",
    "TilingConfig",
    "ToleranceConfig",
    "TrackingConfig",
    "TrainDataConfig",
    "TrainJob",
    "TrainRunConfig",
    "TuneJob",
    "WriteConfig",
]

JOBS: tuple[type[Job], ...] = (
    TrainJob,
    TuneJob,
    EvaluateJob,
    ThresholdsJob,
    ExportJob,
    ParityJob,
    BundleJob,
    InferJob,
    PlanJob,
    ReportJob,
    AnchorsJob,
    DoctorJob,
    ConvertJob,
    ImportOdtkJob,
    DemoJob,
)
"""Every job class, in the order of the verbs in `retinaray --help`."""
