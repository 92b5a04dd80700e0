"""What is known of the data of a planned training, and what is assumed of the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from retinaray.assembly.job_plan_files import (
    FileFacts,
    assume_files,
    describe_absent,
    inspect_training_files,
)
from retinaray.assembly.training import TrainingInputs, check_settings, read_inputs
from retinaray.assembly.training_inputs import choose_training_canvas
from retinaray.config.loading import load_from_dict, to_dict
from retinaray.config.plan_schema import PlanJob
from retinaray.config.schema import TrainJob
from retinaray.errors import ConfigError, DatasetError, StorageError
from retinaray.reporting.plan_table import PlanSheet
from retinaray.storage import Storage, is_s3

_ASSUMED_CLASSES = 80
_ASSUMED_BOXES = 20


@dataclass(frozen=True)
class TrainingFacts:
    """What is known of the data of a training.

    Attributes:
        num_images: Training images; none = unknown.
        num_val_images: Validation images; 0 without.
        num_classes: Classes.
        canvas: Network height and width.
        train_canvas: Of the training batches: another one with windows and with two canvases.
        num_boxes: Most boxes of one image.
        largest_pixels: Of the largest image; none = unknown.
        files: Its files.
        val_files: Those of the validation set.
        assumed: What of it nobody has read, for people; empty = everything is known.
    """

    num_images: int | None
    num_val_images: int
    num_classes: int
    canvas: tuple[int, int]
    train_canvas: tuple[int, int]
    num_boxes: int
    largest_pixels: int | None
    files: FileFacts
    val_files: FileFacts
    assumed: str = ""


def learn_facts(job: TrainJob, plan: PlanJob, sheet: PlanSheet) -> TrainingFacts:
    """Read what can be read, and assume the rest.

    Args:
        job: The training, or the sweep.
        plan: What nobody can look up.
        sheet: Gets what is missing.
    """
    if is_s3(job.output):
        sheet.miss(f"output={job.output!r}: expected a local path, which all nodes mount")
    inputs = _read_as_far_as_possible(job, sheet)
    if inputs is None:
        resize, max_size = job.data.resize, job.data.max_size
        canvas = job.data.size or (math.ceil(resize / 32) * 32, math.ceil(max_size / 32) * 32)
        num_classes = job.data.classes or _ASSUMED_CLASSES
        return TrainingFacts(
            num_images=plan.num_images,
            num_val_images=0,
            num_classes=num_classes,
            canvas=canvas,
            train_canvas=job.data.windows or canvas,
            num_boxes=_ASSUMED_BOXES,
            largest_pixels=None,
            files=assume_files(plan.num_images or 0, plan.image_bytes),
            val_files=assume_files(0, plan.image_bytes),
            assumed=f"annotations unread: {num_classes} classes, landscape images",
        )
    train, val = inputs.train, inputs.val
    inspect = partial(
        inspect_training_files,
        storage=Storage(endpoint_url=job.reading.endpoint_url),
        limit=plan.max_listed,
        image_bytes=plan.image_bytes,
    )
    val_root = job.data.val_images or job.data.images
    nobody = assume_files(0, plan.image_bytes)
    counts = (len(train.targets(index).boxes_xyxy) for index in range(len(train)))
    return TrainingFacts(
        num_images=len(train),
        num_val_images=len(val or ()),
        num_classes=len(train.categories),
        canvas=inputs.canvas,
        train_canvas=choose_training_canvas(job, inputs),
        num_boxes=max(counts),
        largest_pixels=max(record.height * record.width for record in train.images),
        files=_look(lambda: inspect(train, job.data.images), job.data.images, len(train), sheet)
        or assume_files(len(train), plan.image_bytes),
        val_files=nobody
        if val is None
        else _look(lambda: inspect(val, val_root), val_root, len(val), sheet)
        or assume_files(len(val), plan.image_bytes),
    )


def _read_as_far_as_possible(job: TrainJob, sheet: PlanSheet) -> TrainingInputs | None:
    """Both annotation files, or the training set's alone, or none; says what could not be read."""
    try:
        inputs = read_inputs(job)
    except (DatasetError, StorageError) as error:
        sheet.miss(str(error))
        if job.data.val_annotations is None:
            return None
        changes = {"data.val_annotations": None, "data.val_images": None}
        tree = {key: value for key, value in to_dict(job).items() if key in TrainJob.model_fields}
        return _read_as_far_as_possible(load_from_dict(TrainJob, tree, changes), sheet)
    try:
        check_settings(job, inputs)
    except ConfigError as error:
        sheet.miss(str(error))
    return inputs


def _look(
    inspect: Callable[[], FileFacts], root: str, num_images: int, sheet: PlanSheet
) -> FileFacts | None:
    try:
        facts = inspect()
    except StorageError as error:
        sheet.miss(f"{num_images:,} images: {error}")
        return None
    if facts.num_absent:
        sheet.miss(describe_absent(facts, root))
    return facts
