"""`import-odtk`: a checkpoint of ODTK's as a weights file, and what was made of it."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

from retinaray.artifact import ModelCard, dump_weights, hash_content
from retinaray.assembly.provenance import collect_versions
from retinaray.config.schema import ImportOdtkJob
from retinaray.data.coco import CategoryTable
from retinaray.migration.odtk_categories import make_class_numbers, read_odtk_categories
from retinaray.migration.odtk_weights import (
    MAX_DETECTIONS,
    NMS_IOU,
    SCORE_THRESHOLD,
    load_odtk_state,
    read_odtk_checkpoint,
)
from retinaray.storage import Storage

logger = logging.getLogger(__name__)

_MAX_LISTED = 5


@dataclass(frozen=True)
class ImportOutcome:
    """An imported model.

    Attributes:
        output: Where the weights file is.
        backbone: Its feature extractor.
        classes: Class names in index order.
        categories: File that they come from; empty when they were made up.
        anchors: `odtk` or `odtk-legacy`.
        anchors_reason: Why.
        canvas: Network height and width in pixels.
        num_weights: Values of all tensors together.
        num_bytes: Size of the file.
        sha256: Its hash.
        exit_code: 0.
    """

    output: str
    backbone: str
    classes: tuple[str, ...]
    categories: str
    anchors: str
    anchors_reason: str
    canvas: tuple[int, int]
    num_weights: int
    num_bytes: int
    sha256: str
    exit_code: int = 0

    def to_json(self) -> str:
        """One line for machines."""
        return json.dumps(vars(self))

    def to_text(self) -> str:
        """A few lines for people."""
        shown = ", ".join(self.classes[:_MAX_LISTED])
        more = ", ..." if len(self.classes) > _MAX_LISTED else ""
        origin = self.categories or "made up; name them with --categories"
        return "\n".join(
            [
                f"{self.output}  {self.backbone}, {self.num_weights / 1e6:.1f} M weights, "
                f"{self.num_bytes / 1e6:.1f} MB",
                f"classes  {len(self.classes)}: {shown}{more} ({origin})",
                f"anchors  {self.anchors}: {self.anchors_reason}",
                f"canvas   {self.canvas[0]}x{self.canvas[1]} (height x width); another one with "
                "--size, here or in any command",
            ]
        )


def run_odtk_import(job: ImportOdtkJob) -> ImportOutcome:
    """Import a checkpoint.

    Raises:
        CheckpointError: If it cannot be read or has no equal here.
        DatasetError: If the categories cannot be read or are not as many as its classes.
        StorageError: If a file cannot be read or written.
    """
    storage = Storage()
    content = storage.read_bytes(job.model)
    found = read_odtk_checkpoint(content, source=job.model, anchors=job.anchors)
    logger.info(
        "%s: %s, %d classes, anchors %s: %s",
        job.model,
        found.backbone,
        found.num_classes,
        found.anchors.convention,
        found.anchors_reason,
    )
    card = ModelCard(
        architecture=found.architecture,
        anchors=found.anchors,
        categories=_read_categories(job, found.num_classes, storage),
        canvas=job.size,
        score_thresholds=(SCORE_THRESHOLD,) * found.num_classes,
        nms_iou=NMS_IOU,
        run_id=f"odtk-{hash_content(content)[:12]}",
        versions=collect_versions(),
        training={"imported": {"from": "odtk", "iteration": found.iteration}},
        max_detections=MAX_DETECTIONS,
    )
    model = card.build_model()
    load_odtk_state(model, found.state, source=job.model)
    written = dump_weights(card, model.state_dict())
    storage.write_bytes(job.output, written)
    return ImportOutcome(
        output=job.output,
        backbone=found.backbone,
        classes=card.categories.names,
        categories=job.categories or "",
        anchors=found.anchors.convention,
        anchors_reason=found.anchors_reason,
        canvas=card.canvas,
        num_weights=sum(value.numel() for value in found.state.values()),
        num_bytes=len(written),
        sha256=hash_content(written),
    )


def _read_categories(job: ImportOdtkJob, num_classes: int, storage: Storage) -> CategoryTable:
    if job.categories is None:
        return make_class_numbers(num_classes)
    content = storage.read_bytes(job.categories)
    return read_odtk_categories(content, num_classes=num_classes, source=job.categories)
