"""Flags in the scripts of ODTK's users that are no settings here: translated, or answered.

A flag that has a meaning here is translated; one that has none is refused with what to do instead,
because an ignored flag would let a run differ from what its command line says. Which flags exist:
ODTK 0.2.6, `odtk train | infer | export --help`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SCHEDULE = "--schedule"
"""ODTK's multiplier of all steps; see `stretch_schedule`."""

NEAREST_BACKBONES: Mapping[str, str] = {
    "ResNeXt50_32x4dFPN": "ResNet50FPN",
    "ResNeXt101_32x8dFPN": "ResNet101FPN",
    "MobileNetV2FPN": "MobileNetV3LargeFPN",
    "ResNet18C4": "ResNet18FPN",
    "ResNet34C4": "ResNet34FPN",
}
"""ODTK's backbones that do not exist here, and which one is of their size."""


@dataclass(frozen=True)
class OdtkFlag:
    """A flag of ODTK's.

    Attributes:
        num_values: How many values follow it.
        answer: What to do instead; unused when the flag is translated.
        change: Key and value that it stands for; empty when it has to be answered.
    """

    num_values: Literal["none", "one", "many"]
    answer: str
    change: tuple[str, str] | None = None


_ROTATED = "rotated boxes are not supported; remove it and train on upright boxes"

_EVERYWHERE: Mapping[str, OdtkFlag] = {
    "--with-dali": OdtkFlag("none", "not needed, loader processes decode; remove it"),
    "--with-apex": OdtkFlag("none", "not needed, bf16 is built in (run.precision); remove it"),
    "--logdir": OdtkFlag(
        "one", "not needed, TensorBoard files are in the run folder beside the weights; remove it"
    ),
    "--post-metrics": OdtkFlag(
        "one", "not supported; read the JSON on the last line of stdout, or the run folder"
    ),
    "--master": OdtkFlag(
        "one", "not needed, Ray connects the workers; remove it, and set RAY_ADDRESS for a cluster"
    ),
    "--rotated-bbox": OdtkFlag("none", _ROTATED),
    "--absolute-angle": OdtkFlag("none", _ROTATED),
    "--full-precision": OdtkFlag("none", "nothing is computed in half precision here; remove it"),
}
_DETECT: Mapping[str, OdtkFlag] = {
    "--full-precision": OdtkFlag("none", "", change=("detection.precision", "fp32")),
}
_TRAIN: Mapping[str, OdtkFlag] = {
    "--full-precision": OdtkFlag("none", "", change=("run.precision", "fp32")),
    SCHEDULE: OdtkFlag("one", ""),
    "--val-iters": OdtkFlag("one", "validation is counted in epochs; use --val-every EPOCHS"),
    "--augment-rotate": OdtkFlag(
        "none", "turning by 90 degrees is not supported; use --vertical-flip 0.5 with --flip 0.5"
    ),
    "--augment-free-rotate": OdtkFlag("many", "it never had an effect in ODTK; remove it"),
}
_EXPORT: Mapping[str, OdtkFlag] = {
    "--full-precision": OdtkFlag("none", "", change=("precision", "fp32")),
    "--int8": OdtkFlag("none", "", change=("precision", "int8")),
    "--calibration-table": OdtkFlag(
        "one", "not needed, the calibrated ranges are in the exported file itself; remove it"
    ),
    "--dynamic-batch-opts": OdtkFlag(
        "many", "use --batch with the same numbers: least, usual and most images per call"
    ),
}
_BY_VERB: Mapping[str, Mapping[str, OdtkFlag]] = {
    "train": _TRAIN,
    "export": _EXPORT,
    "infer": _DETECT,
    "evaluate": _DETECT,
}


def list_odtk_flags(verb: str) -> Mapping[str, OdtkFlag]:
    """Give the flags of ODTK's that one command translates or answers, by name."""
    return {**_EVERYWHERE, **_BY_VERB.get(verb, {})}


def stretch_schedule(tree: Mapping[str, object], factor: str) -> tuple[dict[str, object], str]:
    """Multiply the number of steps and the milestones, as ODTK's `--schedule` does.

    Args:
        tree: Nested settings of a training, not validated yet.
        factor: Value of `--schedule`; products are cut to whole steps, 1 at least.

    Returns:
        The changed settings by dotted key, and a fault in one line, empty when there is none.
        Values that are no whole numbers stay, for the validation to report.
    """
    factor_value = _read_factor(factor)
    if factor_value is None:
        return {}, f"{SCHEDULE} {factor}: expected a number > 0, such as 0.5"
    iters = _get(tree, "run", "iters")
    milestones = _get(tree, "optim", "milestones")
    changes: dict[str, object] = {}
    if iters is not None:
        changes["run.iters"] = _multiply(iters, factor_value)
    if isinstance(milestones, (list, tuple)) and milestones:
        changes["optim.milestones"] = [_multiply(step, factor_value) for step in milestones]
    if not changes:
        return {}, f"{SCHEDULE} {factor}: it multiplies --iters and --milestones; give one of them"
    return changes, ""


def _read_factor(text: str) -> float | None:
    try:
        factor = float(text)
    except ValueError:
        return None
    return factor if math.isfinite(factor) and factor > 0 else None


def _get(tree: Mapping[str, object], section: str, key: str) -> object:
    node = tree.get(section)
    return node.get(key) if isinstance(node, Mapping) else None


def _multiply(value: object, factor: float) -> object:
    try:
        steps = int(value) if isinstance(value, str) else value
    except ValueError:
        return value
    is_whole = isinstance(steps, int) and not isinstance(steps, bool) and steps > 0
    return max(1, int(steps * factor)) if is_whole else value  # type: ignore[operator]
