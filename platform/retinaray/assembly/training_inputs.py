"""The data of a training: both annotation files, the canvases, and what must fit together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from retinaray.assembly.reading import make_reader
from retinaray.config.schema import TrainJob
from retinaray.data.coco import CocoDataset, load_coco
from retinaray.data.transforms import choose_canvas, fit_size
from retinaray.errors import ConfigError, DatasetError

# Sides of a canvas are whole multiples of this, as `choose_canvas` has them by default.
CANVAS_MULTIPLE = 32
# Below a share of so much, padding is worth a word.
_MUCH_LESS = 0.8


@dataclass(frozen=True)
class TrainingInputs:
    """The data of a training, read and checked.

    Attributes:
        train: Training set.
        val: Validation set; none = no validation.
        canvas: Network height and width.
    """

    train: CocoDataset
    val: CocoDataset | None
    canvas: tuple[int, int]


def read_inputs(job: TrainJob) -> TrainingInputs:
    """Read both annotation files and choose the canvas.

    Raises:
        DatasetError: If a file is unusable, the sets name different categories, or there is nothing
            to learn.
        StorageError: If a file cannot be read.
    """
    data, read = job.data, make_reader(job.reading)
    train = load_coco(
        read(data.annotations),
        num_classes=data.classes,
        on_bad_box=data.on_bad_box,
        source=data.annotations,
    )
    if len(train) == 0:
        raise DatasetError(f"{data.annotations}: no images; give the annotations of a training set")
    val = None
    if data.val_annotations is not None:
        val = load_coco(
            read(data.val_annotations), on_bad_box=data.on_bad_box, source=data.val_annotations
        )
        if len(val) == 0:
            raise DatasetError(
                f"{data.val_annotations}: no images; leave --val-annotations out to train without "
                "validation"
            )
        if val.categories != train.categories:
            raise DatasetError(
                f"{data.val_annotations} has other categories than {data.annotations}: "
                f"{_differing(train, val)}; both need the same ids and names"
            )
    return TrainingInputs(train=train, val=val, canvas=choose_job_canvas(job, train))


def choose_job_canvas(job: TrainJob, train: CocoDataset) -> tuple[int, int]:
    """Network height and width of a training on these images; at least one.

    Where upright images are trained on a canvas of their own, it is the square that gives the
    median image the size in which it is trained. Any larger one would enlarge all of them.
    """
    if job.data.size is not None:
        return job.data.size
    sides = _list_sides(train)
    if job.data.two_canvases and _has_both_shapes(sides):
        canvas = _choose_landscape_canvas(job, sides)
        longest = [max(fit_size(min(pair), max(pair), *canvas)) for pair in sides.tolist()]
        side = -(-int(np.median(longest)) // CANVAS_MULTIPLE) * CANVAS_MULTIPLE
        return side, side
    return choose_canvas(
        sides[:, 0], sides[:, 1], resize=job.data.resize, max_size=job.data.max_size
    )


def choose_training_canvas(job: TrainJob, inputs: TrainingInputs) -> tuple[int, int]:
    """Canvas of the training batches; with two canvases that of images wider than high."""
    if job.data.windows is not None:
        return job.data.windows
    if not job.data.two_canvases:
        return inputs.canvas
    return _choose_landscape_canvas(job, _list_sides(inputs.train))


def find_size_oddities(job: TrainJob, inputs: TrainingInputs) -> list[str]:
    """What the sizes of images cost and hardly anybody means, a line each; empty = nothing."""
    found = []
    jitter, short_side = job.augment.jitter, find_short_side(job)
    if jitter is not None and job.data.windows is None and jitter[1] > short_side:
        found.append(
            f"augment.jitter (--jitter): short sides of up to {jitter[1]} px on a canvas for "
            f"{short_side} px: larger images are cut, at a random place; for whole ones give "
            f"--resize {jitter[1]} or a smaller maximum"
        )
    is_fitted = job.data.size is None and job.data.windows is None and not job.data.two_canvases
    if is_fitted and _has_both_shapes(sides := _list_sides(inputs.train)):
        height, width = _choose_landscape_canvas(job, sides)
        share = height * width / (inputs.canvas[0] * inputs.canvas[1])
        if share < _MUCH_LESS:
            found.append(
                f"images of both orientations share a canvas of {inputs.canvas[0]}x"
                f"{inputs.canvas[1]}: --two-canvases trains them on {height}x{width} and "
                f"{width}x{height}, {share:.0%} of the pixels"
            )
    return found


def find_short_side(job: TrainJob) -> int:
    """What `--jitter` is relative to, in pixels: of the canvas, or the one that images get."""
    return min(job.data.size or (job.data.resize,))


def _has_both_shapes(sides: Int[np.ndarray, "images 2"]) -> bool:
    """Whether some images are higher than wide and others are not."""
    is_upright = sides[:, 0] > sides[:, 1]
    return bool(is_upright.any() and not is_upright.all())


def _list_sides(train: CocoDataset) -> Int[np.ndarray, "images 2"]:
    return np.array([(record.height, record.width) for record in train.images])


def _choose_landscape_canvas(job: TrainJob, sides: Int[np.ndarray, "images 2"]) -> tuple[int, int]:
    return choose_canvas(
        sides.min(1), sides.max(1), resize=job.data.resize, max_size=job.data.max_size
    )


def _differing(train: CocoDataset, val: CocoDataset) -> str:
    first = {(category.id, category.name) for category in train.categories.categories}
    second = {(category.id, category.name) for category in val.categories.categories}
    return (
        f"only in training {sorted(map(str, first - second))[:5]}, "
        f"only in validation {sorted(map(str, second - first))[:5]}"
    )


def check_settings(job: TrainJob, inputs: TrainingInputs) -> None:
    """Refuse settings that the data contradict.

    Raises:
        ConfigError: If an objective is one that no validation will report, or the windows are
            larger than the canvas; all faults at once.
    """
    faults = [*_find_objective_faults(job, inputs), *_find_window_faults(job, inputs.canvas)]
    if faults:
        raise ConfigError("\n".join(faults))


def _find_objective_faults(job: TrainJob, inputs: TrainingInputs) -> Iterator[str]:
    objective, price = job.run.objective, job.run.latency_price
    if inputs.val is None and (objective != "AP" or price > 0):
        yield (
            f"run.objective={objective}, run.latency_price={price:g} without data.val_annotations: "
            "nothing would be measured; give --val-annotations"
        )
    names = inputs.train.categories.names
    if objective.startswith("AP/") and objective.removeprefix("AP/") not in names:
        yield (
            f"run.objective={objective}: no such class; expected AP/ and one of "
            f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
        )


def _find_window_faults(job: TrainJob, canvas: tuple[int, int]) -> Iterator[str]:
    windows = job.data.windows
    if windows is not None and (windows[0] > canvas[0] or windows[1] > canvas[1]):
        yield (
            f"data.windows={windows} (--windows) is larger than the {canvas[0]}x{canvas[1]} "
            f"(height x width) that --resize {job.data.resize} --max-size {job.data.max_size} give "
            "these images: there is nothing to cut a window from; make it smaller, or drop it"
        )
