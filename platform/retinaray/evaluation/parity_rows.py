"""What a comparison of two runtimes found, and whether that is close enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from retinaray.evaluation.difference_histogram import DifferenceHistogram
from retinaray.evaluation.parity_matching import ImageDifferences

CasePrecision = Literal["fp32", "bf16", "fp16", "int8"]


@dataclass(frozen=True)
class ParityCase:
    """One way to run one file.

    Attributes:
        name: Short and unique among the cases of a report, such as `m.onnx openvino bf16`.
        file: The file.
        backend: The runtime.
        precision: The coarsest type of its convolutions, by which it is judged.
    """

    name: str
    file: str
    backend: str
    precision: CasePrecision


@dataclass(frozen=True)
class ParityTolerance:
    """How much a runtime may differ from torch in float32.

    Attributes:
        box_px: Largest corner difference of a candidate, for fp32.
        score: Largest difference of a candidate's score, for fp32.
        ap: Largest difference of AP, per precision; where there is ground truth.
        changed: Largest share of detections that come, go or change their class, for bf16, fp16
            and int8; a single one is always allowed.
    """

    box_px: float = 0.05
    score: float = 1e-4
    ap: Mapping[CasePrecision, float] = field(
        default_factory=lambda: {"fp32": 0.0005, "bf16": 0.005, "fp16": 0.002, "int8": 0.01}
    )
    changed: Mapping[CasePrecision, float] = field(
        default_factory=lambda: {"bf16": 0.03, "fp16": 0.01, "int8": 0.1}
    )


class DifferenceTally:
    """Differences of many images, in flat memory.

    Attributes:
        box_px: Largest corner difference of each pair, in network pixels.
        scores: Difference of score of each pair.
        num_reference: Boxes of the reference above their threshold.
        num_missing: Clear ones that the candidate lacks.
        num_extra: Clear ones that only the candidate has.
        num_flips: Clear ones that have another class there.
    """

    def __init__(self) -> None:
        self.box_px = DifferenceHistogram()
        self.scores = DifferenceHistogram()
        self.num_reference = self.num_missing = self.num_extra = self.num_flips = 0

    def add(self, differences: ImageDifferences) -> None:
        """Count one image."""
        self.box_px.add(differences.box_px)
        self.scores.add(differences.scores)
        self.num_reference += differences.num_reference
        self.num_missing += len(differences.missing)
        self.num_extra += len(differences.extra)
        self.num_flips += len(differences.flips)

    @property
    def num_changed(self) -> int:
        """Boxes that came, went or changed their class."""
        return self.num_missing + self.num_extra + self.num_flips

    @property
    def changed_share(self) -> float:
        """They over the boxes of the reference; over one when there is none."""
        return self.num_changed / max(1, self.num_reference)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "num_reference": self.num_reference,
            "num_pairs": len(self.box_px),
            "num_missing": self.num_missing,
            "num_extra": self.num_extra,
            "num_flips": self.num_flips,
            "changed_share": self.changed_share,
            "box_px": _summarize(self.box_px),
            "score": _summarize(self.scores),
        }


def _summarize(histogram: DifferenceHistogram) -> dict[str, float]:
    return {
        "mean": histogram.mean,
        "p50": histogram.quantile(0.5),
        "p99": histogram.quantile(0.99),
        "max": histogram.max,
    }


@dataclass(frozen=True, eq=False)
class ParityRow:
    """One case against the reference.

    Attributes:
        case: What ran.
        num_images: Images that both saw.
        candidates: Boxes before suppression: what the network itself gives.
        detections: Boxes after suppression, at the model's thresholds.
        ap: Its AP; none = no ground truth.
        ap_reference: The reference's.
        latency_ms: Median time per image; none = not measured.
        reasons: Why it is too far from the reference, in words; empty = it passes.
    """

    case: ParityCase
    num_images: int
    candidates: DifferenceTally
    detections: DifferenceTally
    ap: float | None = None
    ap_reference: float | None = None
    latency_ms: float | None = None
    reasons: tuple[str, ...] = ()

    @property
    def has_passed(self) -> bool:
        """Nothing speaks against it."""
        return not self.reasons

    @property
    def ap_difference(self) -> float | None:
        """AP less the reference's AP; none = no ground truth."""
        if self.ap is None or self.ap_reference is None:
            return None
        return self.ap - self.ap_reference

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **asdict(self.case),
            "passed": self.has_passed,
            "reasons": list(self.reasons),
            "num_images": self.num_images,
            "ap": self.ap,
            "ap_reference": self.ap_reference,
            "latency_ms": self.latency_ms,
            "candidates": self.candidates.to_dict(),
            "detections": self.detections.to_dict(),
        }


@dataclass(frozen=True, eq=False)
class ParityGroup:
    """The files of one canvas, and the reference on it.

    Attributes:
        canvas: Height and width in pixels.
        latency_ms: Median time of the reference per image; none = not measured.
        ap: The reference's AP; none = no ground truth.
        rows: A row per case.
    """

    canvas: tuple[int, int]
    latency_ms: float | None
    ap: float | None
    rows: tuple[ParityRow, ...]


@dataclass(frozen=True)
class UnrunCase:
    """A case that gave no row.

    Attributes:
        name: As in `ParityCase`.
        reason: Why not, in words.
        is_fault: The runtime is here and refused the file; else it cannot run on this machine.
    """

    name: str
    reason: str
    is_fault: bool = False


@dataclass(frozen=True, eq=False)
class ParityResult:
    """All that a run of the gate found.

    Attributes:
        model: The weights.
        groups: One per canvas.
        unrun: Cases without a row.
        notes: What else is to be known, a sentence each.
        tolerance: What the rows were held to.
        num_images: Images that were compared.
        num_errors: Images that could not be read.
        batch: Images per call.
        threads: Processor threads per runtime.
        machine: What it ran on, in words.
    """

    model: str
    groups: tuple[ParityGroup, ...]
    unrun: tuple[UnrunCase, ...]
    notes: tuple[str, ...]
    tolerance: ParityTolerance
    num_images: int
    num_errors: int
    batch: int
    threads: int
    machine: str

    @property
    def rows(self) -> tuple[ParityRow, ...]:
        """The rows of all groups."""
        return tuple(row for group in self.groups for row in group.rows)

    @property
    def has_passed(self) -> bool:
        """Every row passed, and no runtime that is here refused a file."""
        is_clean = not any(case.is_fault for case in self.unrun)
        return is_clean and all(row.has_passed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "model": self.model,
            "passed": self.has_passed,
            "num_images": self.num_images,
            "num_errors": self.num_errors,
            "batch": self.batch,
            "threads": self.threads,
            "machine": self.machine,
            "references": [
                {"canvas": list(group.canvas), "ap": group.ap, "latency_ms": group.latency_ms}
                for group in self.groups
            ],
            "rows": [
                {"canvas": list(group.canvas), **row.to_dict()}
                for group in self.groups
                for row in group.rows
            ],
            "not_run": [asdict(case) for case in self.unrun],
            "notes": list(self.notes),
            "tolerance": {
                "box_px": self.tolerance.box_px,
                "score": self.tolerance.score,
                "ap": dict(self.tolerance.ap),
                "changed": dict(self.tolerance.changed),
            },
        }


def judge_row(row: ParityRow, tolerance: ParityTolerance) -> tuple[str, ...]:
    """Why a case is too far from its reference.

    fp32 is held to its candidates, box by box: suppression may turn a difference of rounding into
    another choice between two boxes. Coarser types are held to the share of changed detections: a
    runtime that computes something else may keep its AP by chance on a few images. All are held to
    AP where there is ground truth.

    Args:
        row: What was found; its reasons are not looked at.
        tolerance: Limits.

    Returns:
        A line per broken limit, with the number and the limit; empty when it passes.
    """
    found, precision = row.candidates, row.case.precision
    if found.num_reference == 0 and found.num_changed == 0:
        return (
            f"nothing was compared: the reference found no box in {row.num_images} images; give "
            "images that show the model's classes",
        )
    reasons = []
    if precision == "fp32":
        if found.num_changed:
            reasons.append(
                f"of {found.num_reference} candidates {found.num_missing} are missing, "
                f"{found.num_extra} are too many, {found.num_flips} have another class"
            )
        reasons += _exceeds("a candidate's box", found.box_px.max, tolerance.box_px, " px")
        reasons += _exceeds("a candidate's score", found.scores.max, tolerance.score)
    else:
        share, limit = row.detections.changed_share, tolerance.changed[precision]
        if share > limit and row.detections.num_changed > 1:
            reasons.append(
                f"{share:.1%} of {row.detections.num_reference} detections changed "
                f"(tolerance {limit:.1%})"
            )
    difference = row.ap_difference
    if difference is not None:
        reasons += _exceeds("AP", abs(difference), tolerance.ap[precision])
    return tuple(reasons)


def _exceeds(name: str, value: float, limit: float, unit: str = "") -> list[str]:
    # A NaN must not pass.
    if value <= limit:
        return []
    return [f"{name} differs by {value:.4g}{unit} (tolerance {limit:.4g}{unit})"]
