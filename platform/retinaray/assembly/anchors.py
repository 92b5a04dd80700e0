"""`anchors`: which ground truth the anchors can reach, and anchors that reach more on request."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import dataclass
from typing import Any

import torch

from retinaray.anchoring.coverage import (
    CoverageReport,
    count_unmatched,
    describe_coverage,
    measure_coverage,
    select_boxes,
)
from retinaray.anchoring.fitting import (
    COVERAGE_PER_DOUBLING,
    AnchorFit,
    Candidate,
    fit_anchors,
    plan_sizes,
)
from retinaray.anchoring.head_cost import count_head_gflops
from retinaray.assembly.reading import make_reader
from retinaray.config.schema import AnchorsJob
from retinaray.data.coco import CocoDataset, load_coco
from retinaray.detector.anchors import AnchorSpec, Convention, count_level_anchors
from retinaray.errors import DatasetError
from retinaray.reporting.coverage_map import CoveragePanel, draw_coverage_map
from retinaray.reporting.coverage_table import render_coverage, render_fit, render_warnings
from retinaray.storage import Storage

logger = logging.getLogger(__name__)

MAX_BOXES_TO_MATCH = 20_000
"""Larger sets are not matched image by image (3 to 10 ms each); the coverage is exact for any."""


@dataclass(frozen=True)
class HeadShape:
    """What the cost of the heads depends on besides anchors and canvas."""

    num_classes: int
    fpn_channels: int
    head_depth: int

    def count_gflops(self, spec: AnchorSpec, canvas: tuple[int, int]) -> float:
        """GFLOPs of both heads per image."""
        return count_head_gflops(
            spec,
            canvas,
            num_classes=self.num_classes,
            fpn_channels=self.fpn_channels,
            head_depth=self.head_depth,
        )


@dataclass(frozen=True)
class AnchorsOutcome:
    """What was measured, and what is proposed.

    Attributes:
        spec: The job's anchors.
        canvas: Network height and width.
        report: Coverage of the job's anchors.
        heads: For the costs.
        num_unmatched: Boxes without any anchor of their own; None when the set is too large to
            match (`MAX_BOXES_TO_MATCH`).
        picture: File of the map; empty when none was asked for.
        fit: The settings that were tried; None when no proposal was asked for.
        exit_code: 0.
    """

    spec: AnchorSpec
    canvas: tuple[int, int]
    report: CoverageReport
    heads: HeadShape
    num_unmatched: int | None
    picture: str = ""
    fit: AnchorFit | None = None
    exit_code: int = 0

    @property
    def head_gflops(self) -> float:
        """Both heads, per image."""
        return self.heads.count_gflops(self.spec, self.canvas)

    def to_json(self) -> str:
        """One line for machines."""
        report = self.report
        values: dict[str, Any] = {"all": report.all.to_dict()}
        for name in ("by_class", "by_size", "by_ratio"):
            group = getattr(report, name)
            values[name] = {key: row.to_dict() for key, row in group.items()}
        values |= {
            "anchors_per_image": report.anchors_per_image,
            "head_gflops": round(self.head_gflops, 3),
            "canvas": list(self.canvas),
            "unmatched": self.num_unmatched,
            "picture": self.picture,
        }
        if self.fit is not None:
            values["fit"] = self._fit_to_dict(self.fit)
        return json.dumps(values)

    def _fit_to_dict(self, fit: AnchorFit) -> dict[str, Any]:
        return {
            "chosen": self._candidate_to_dict(fit.chosen),
            "at_this_size": self._candidate_to_dict(fit.chosen_at_size),
            "default": self._candidate_to_dict(fit.default),
            "halved": self._candidate_to_dict(fit.halved),
            "candidates": [self._candidate_to_dict(candidate) for candidate in fit.candidates],
            "coverage_per_doubling": COVERAGE_PER_DOUBLING,
            "flags": format_flags(fit.chosen, self.spec.convention),
            "flags_at_this_size": format_flags(fit.chosen_at_size, self.spec.convention),
        }

    def _candidate_to_dict(self, candidate: Candidate) -> dict[str, Any]:
        row = candidate.report.all.to_dict()
        spec = candidate.to_spec(self.spec.convention)
        return {
            "name": candidate.name,
            "scales": list(candidate.scales),
            "ratios": list(candidate.ratios),
            "levels": candidate.levels,
            "resize": candidate.size.resize,
            "max_size": candidate.size.max_size,
            "canvas": list(candidate.size.canvas),
            **{key: row[key] for key in row if key != "count"},
            "anchors_per_image": candidate.report.anchors_per_image,
            "head_gflops": round(self.heads.count_gflops(spec, candidate.size.canvas), 3),
        }

    def to_text(self) -> str:
        """Tables for people."""
        lines = [describe_coverage(self.report), "", render_coverage(self.report), ""]
        lines.append(self._describe_cost())
        lines += render_warnings(self.report, num_unmatched=self.num_unmatched)
        if self.num_unmatched is None:
            lines.append(
                f"more than {MAX_BOXES_TO_MATCH:,} boxes: those that lose every anchor to a "
                "neighbour were not counted"
            )
        if self.fit is not None:
            lines += ["", *self._describe_fit(self.fit)]
        if self.picture:
            lines.append(f"picture: {self.picture}")
        return "\n".join(lines)

    def _describe_cost(self) -> str:
        height, width = self.canvas
        default = AnchorSpec()
        default_anchors = sum(count_level_anchors(default, *self.canvas))
        times_anchors = self.report.anchors_per_image / default_anchors
        times_gflops = self.head_gflops / self.heads.count_gflops(default, self.canvas)
        return (
            f"{self.report.anchors_per_image:,} anchors per image of {height}x{width} "
            f"({times_anchors:.2f} x the default's), heads {self.head_gflops:.1f} GFLOPs "
            f"({times_gflops:.2f} x)"
        )

    def _describe_fit(self, fit: AnchorFit) -> list[str]:
        convention = self.spec.convention
        costs = [
            self.heads.count_gflops(candidate.to_spec(convention), candidate.size.canvas)
            for candidate in fit.candidates
        ]
        lines = [
            render_fit(fit, costs),
            f"rule: twice the anchors must buy {100 * COVERAGE_PER_DOUBLING:g} points of coverage, "
            "or the cheaper setting wins",
            "",
            f"retinaray train ... {format_flags(fit.chosen, convention)}",
        ]
        if fit.chosen_at_size is not fit.chosen:
            lines.append(f"at this size:       {format_flags(fit.chosen_at_size, convention)}")
        return lines


def format_flags(candidate: Candidate, convention: Convention) -> str:
    """The setting as flags of `retinaray train`."""
    size = candidate.size
    words = [
        "--anchor-scales",
        *(f"{scale:.6g}" for scale in candidate.scales),
        "--anchor-ratios",
        *(f"{ratio:.6g}" for ratio in candidate.ratios),
        "--levels",
        candidate.levels,
    ]
    if size.resize is not None and size.max_size is not None:
        words += ["--resize", str(size.resize), "--max-size", str(size.max_size)]
    else:
        words += ["--size", *map(str, size.canvas)]
    if convention != "centered":
        words += ["--anchors", convention]
    return " ".join(words)


def run_anchors(job: AnchorsJob) -> AnchorsOutcome:
    """Measure the coverage of a data set, and fit anchors to it on request.

    Raises:
        DatasetError: If the file cannot be used, or has no box to learn.
        StorageError: If the file cannot be read, or the picture cannot be written.
    """
    dataset = load_coco(
        make_reader(job.reading)(job.annotations),
        on_bad_box=job.on_bad_box,
        source=job.annotations,
    )
    num_boxes = int((~dataset.is_crowd).sum())
    if num_boxes == 0:
        raise DatasetError(
            f"{job.annotations}: expected boxes to measure the anchors against, found none in "
            f"{len(dataset)} images (crowd regions do not count); give the annotations of the "
            "training set"
        )
    sizes = plan_sizes(dataset, resize=job.resize, max_size=job.max_size, canvas=job.size)
    canvas = sizes[0].canvas
    spec = AnchorSpec(
        scales=job.anchors.scales,
        ratios=job.anchors.ratios,
        strides=job.anchors.strides,
        convention=job.anchors.convention,
    )
    boxes = select_boxes(dataset, canvas)
    fit = None
    if job.fit:
        logger.info("fitting anchors to %d boxes at %d input sizes", num_boxes, len(sizes))
        fit = fit_anchors(
            dataset, sizes, given=spec, num_scales=job.num_scales, num_ratios=job.num_ratios
        )
    if job.picture is not None:
        panels = [CoveragePanel("anchors as given", spec, boxes)]
        panels += _fitted_panels(fit, dataset, spec.convention)
        _write_picture(panels, job)
    is_small = num_boxes <= MAX_BOXES_TO_MATCH
    return AnchorsOutcome(
        spec=spec,
        canvas=canvas,
        report=measure_coverage(boxes, spec),
        heads=HeadShape(len(dataset.categories), job.fpn_channels, job.head_depth),
        num_unmatched=_count_unmatched(dataset, spec, canvas) if is_small else None,
        picture=job.picture or "",
        fit=fit,
    )


def _count_unmatched(dataset: CocoDataset, spec: AnchorSpec, canvas: tuple[int, int]) -> int:
    # The tensors of one image are so small that threads only wait for each other: on two busy cores
    # one thread took a seventh of the time.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return count_unmatched(dataset, spec, canvas)
    finally:
        torch.set_num_threads(before)


def _fitted_panels(
    fit: AnchorFit | None, dataset: CocoDataset, convention: Convention
) -> list[CoveragePanel]:
    if fit is None:
        return []
    chosen = fit.chosen
    boxes = select_boxes(dataset, chosen.size.canvas)
    return [CoveragePanel("anchors as fitted", chosen.to_spec(convention), boxes)]


def _write_picture(panels: list[CoveragePanel], job: AnchorsJob) -> None:
    stream = io.BytesIO()
    draw_coverage_map(panels, stream)
    storage = Storage(endpoint_url=job.reading.endpoint_url)
    storage.write_bytes(job.picture or "", stream.getvalue())
