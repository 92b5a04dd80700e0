"""What a report tells of: runs and what is known of each, as plain values that need no file.

A run that lacks something has None or nothing there, and a sentence in `gaps` that says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from retinaray.anchoring.coverage import CoverageReport
from retinaray.evaluation.coco_map import CocoScores
from retinaray.evaluation.confusion import ConfusionMatrix
from retinaray.evaluation.error_taxonomy import ErrorReport
from retinaray.evaluation.operating_points import OperatingPoint
from retinaray.evaluation.pr_curves import PrecisionRecallCurve
from retinaray.evaluation.score_calibration import CalibrationReport
from retinaray.evaluation.size_bins import SizeReport

RunKind = Literal["train", "tune", "evaluate", "infer", "parity"]
KIND_NAMES: Mapping[RunKind, str] = {
    "train": "training",
    "tune": "sweep",
    "evaluate": "evaluation",
    "infer": "batch inference",
    "parity": "parity check",
}


@dataclass(frozen=True)
class Picture:
    """A picture of a section.

    Attributes:
        caption: What is seen.
        content: The file.
        media_type: Such as `image/webp`.
    """

    caption: str
    content: bytes
    media_type: str


@dataclass(frozen=True, eq=False)
class DetectionAnalysis:
    """Detections of one run against ground truth.

    Attributes:
        set_name: Which images, in words.
        scores: COCO's numbers.
        sizes: Recall and AP50 by size.
        curves: Precision and recall of each class at IoU 0.5.
        points: The thresholds that everything else here uses, one per class, in the order of the
            curves.
        points_source: Where they come from, in words.
        confusion: At these thresholds and IoU 0.5.
        errors: What kind of errors cost how much AP50.
        calibration: Scores of hits and false detections.
    """

    set_name: str
    scores: CocoScores
    sizes: SizeReport
    curves: tuple[PrecisionRecallCurve, ...]
    points: tuple[OperatingPoint, ...]
    points_source: str
    confusion: ConfusionMatrix
    errors: ErrorReport
    calibration: CalibrationReport


@dataclass(frozen=True)
class AnchorCoverage:
    """Which training boxes the anchors of a run reach.

    Attributes:
        report: The numbers.
        picture: The map.
    """

    report: CoverageReport
    picture: Picture


@dataclass(frozen=True)
class SweepContent:
    """The trials of a sweep.

    Attributes:
        rows: As in trials.csv: trial, status, score, epoch, `point.KEY`, metrics, error.
        pictures: Those that the sweep drew.
    """

    rows: tuple[Mapping[str, Any], ...]
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportedRun:
    """One run.

    Attributes:
        name: Short, and different from those of the others.
        kind: Which command made it.
        source: Where it lies.
        facts: Names and values for the head of the page, in their order.
        command: Command line that makes it again; empty when that is not known.
        settings: By dotted key, as plain values; empty when the run keeps none.
        unusual: Keys of settings that differ from their defaults.
        versions: Package versions and commit.
        scores: COCO's numbers by name, when known without detections; else empty.
        events: Of a training, as `read_events` gives them.
        speed: Of a batch inference, as `RunPace.summary` gives it.
        sweep: Of a sweep.
        parity: As `ParityResult.to_dict` gives it.
        analysis: Of detections.
        coverage: Of anchors.
        gaps: Sentences that say what is missing and why.
    """

    name: str
    kind: RunKind
    source: str
    facts: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    unusual: frozenset[str] = frozenset()
    versions: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()
    speed: Mapping[str, Any] = field(default_factory=dict)
    sweep: SweepContent | None = None
    parity: Mapping[str, Any] | None = None
    analysis: DetectionAnalysis | None = None
    coverage: AnchorCoverage | None = None
    gaps: tuple[str, ...] = ()

    def with_gap(self, sentence: str) -> ReportedRun:
        """The run, with one more sentence in `gaps`."""
        return replace(self, gaps=(*self.gaps, sentence))


Numbered = Sequence[tuple[int, ReportedRun]]
"""Runs with their numbers, which say their colours."""
Analysed = Sequence[tuple[int, ReportedRun, DetectionAnalysis]]
"""Those of them that have detections."""


def list_analysed(runs: Numbered) -> Analysed:
    """The runs with detections, with their analyses."""
    return [(number, run, run.analysis) for number, run in runs if run.analysis is not None]
