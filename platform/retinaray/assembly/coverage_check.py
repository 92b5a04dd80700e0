"""Before a training: which ground truth its anchors reach, said in one line, with a warning."""

from __future__ import annotations

import logging

from retinaray.anchoring.coverage import (
    CoverageReport,
    describe_coverage,
    measure_coverage,
    poorly_covered,
    select_boxes,
)
from retinaray.assembly.training import TrainingInputs, make_anchor_spec
from retinaray.config.schema import TrainJob
from retinaray.errors import ConfigError

logger = logging.getLogger(__name__)

_MAX_NAMED = 12


def check_coverage(job: TrainJob, inputs: TrainingInputs) -> CoverageReport:
    """Log the coverage of the training set; warn when more than 1 % cannot reach IoU 0.5.

    Raises:
        ConfigError: If there is such a warning and run.strict_anchors is on.
    """
    boxes = select_boxes(inputs.train, inputs.canvas)
    report = measure_coverage(boxes, make_anchor_spec(job.anchors))
    logger.info("%s", describe_coverage(report))
    missed = poorly_covered(report)
    if missed:
        text = _describe_missed(job, report, missed)
        if job.run.strict_anchors:
            raise ConfigError(f"run.strict_anchors=true: {text}")
        logger.warning("%s", text)
    return report


def _describe_missed(
    job: TrainJob, report: CoverageReport, missed: tuple[tuple[str, int, int], ...]
) -> str:
    count, total = report.all.count - report.all.num_iou_50, report.all.count
    names = ", ".join(f"{name} {lost} of {boxes}" for name, boxes, lost in missed[:_MAX_NAMED])
    rest = f" and {len(missed) - _MAX_NAMED} more classes" if len(missed) > _MAX_NAMED else ""
    fate = (
        "they are learnt through their best anchor only"
        if job.loss.keep_best_anchor
        else "without loss.keep_best_anchor they are trained as BACKGROUND"
    )
    size = f"--resize {job.data.resize} --max-size {job.data.max_size}"
    if job.data.size is not None:
        size = "--size {} {}".format(*job.data.size)
    return (
        f"{count:,} of {total:,} boxes ({100 * count / total:.1f} %) have no anchor with IoU 0.5 "
        f"({names}{rest}): {fate}. Find better anchors with `retinaray anchors --annotations "
        f"{job.data.annotations} {size} --fit`"
    )
