"""What a batch inference reports at its end, for machines and for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from retinaray.evaluation.coco_map import CocoScores
from retinaray.inference.run_files import RunTotals
from retinaray.reporting.inference_progress import render_summary
from retinaray.reporting.score_table import render_scores
from retinaray.storage import join_uri


@dataclass(frozen=True)
class InferOutcome:
    """What a run left.

    Attributes:
        run: Folder or S3 prefix of the run.
        detections: The merged COCO results.
        totals: Parts, images, errors and detections.
        errors: The first few errors.
        backend: Runtime, and why it was chosen.
        seconds: Wall time of this command.
        images_per_s: Images that this command processed, over the time between first and last part.
        scores: With annotations: COCO's numbers, computed from the written file.
        summary: How this command spent its time, see `RunPace.summary`; empty when it found all
            parts done.
    """

    run: str
    detections: str
    totals: RunTotals
    errors: tuple[Mapping[str, Any], ...]
    backend: str
    seconds: float
    images_per_s: float
    scores: CocoScores | None
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0; 1 when not a single image could be processed."""
        return 0 if self.totals.num_images else 1

    def to_json(self) -> str:
        """One line for machines."""
        values = asdict(self) | {"exit_code": self.exit_code}
        values["scores"] = self.scores.to_dict() if self.scores else None
        return json.dumps(values)

    def to_text(self) -> str:
        """A few lines for people."""
        totals = self.totals
        lines = [
            f"{totals.num_images} images, {totals.num_detections} detections, "
            f"{totals.num_errors} errors "
            f"in {self.seconds:.0f} s ({self.images_per_s:.1f} img/s, {self.backend})"
        ]
        lines += [f"  error: {error['uri']}: {error['reason']}" for error in self.errors[:5]]
        if totals.num_errors > 5:
            lines.append(f"  ... all of them in {join_uri(self.run, 'errors')}")
        lines += [f"detections  {self.detections}", f"run         {self.run}"]
        if speed := render_summary(self.summary):
            lines.append(speed)
        if self.scores:
            lines.append(render_scores(self.scores))
        return "\n".join(lines)
