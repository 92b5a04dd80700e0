"""`doctor`: every known fault of a COCO data set, and a repaired copy on request."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from retinaray.config.schema import DoctorJob
from retinaray.data.dataset_doctor import DoctorReport, examine_dataset
from retinaray.data.dataset_repair import repair_dataset


@dataclass(frozen=True)
class DoctorOutcome:
    """What the doctor found.

    Attributes:
        report: Faults of the data set as it is.
        fixed: Repaired copy; empty when none was asked for.
        remaining: Faults of the repaired copy; none without one.
    """

    report: DoctorReport
    fixed: str = ""
    remaining: DoctorReport | None = None

    @property
    def exit_code(self) -> int:
        """0 when the set, or its repaired copy, is clean; else 1."""
        return 0 if (self.remaining or self.report).is_clean else 1

    def to_json(self) -> str:
        """One line for machines."""
        values = {**self.report.to_json(), "fixed": self.fixed}
        if self.remaining:
            values["remaining"] = self.remaining.to_json()
        return json.dumps(values)

    def to_text(self) -> str:
        """A table for people."""
        text = self.report.to_text()
        if self.remaining:
            text += f"\n\nrepaired copy {self.fixed}:\n{self.remaining.to_text()}"
        return text


def run_doctor(job: DoctorJob) -> DoctorOutcome:
    """Examine a data set, and repair it on request.

    Raises:
        DatasetError: If the file cannot be read at all, or the copy cannot be written.
    """
    images = Path(job.images) if job.images else None
    report = examine_dataset(Path(job.annotations), images, num_threads=job.threads)
    if job.fix is None:
        return DoctorOutcome(report)
    remaining = repair_dataset(
        Path(job.annotations), images, Path(job.fix), num_threads=job.threads
    )
    return DoctorOutcome(report, fixed=job.fix, remaining=remaining)
