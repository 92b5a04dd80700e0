"""A sweep's first trials: default, halved and fitted anchors, as far as its space has them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from retinaray.anchoring.coverage import select_boxes
from retinaray.anchoring.fitting import fit_in_space
from retinaray.assembly.training import TrainingInputs
from retinaray.config.loading import load_from_dict
from retinaray.config.search_space import BASE_SCALE, NUM_SCALES, Domain, make_changes
from retinaray.config.training_schema import TrainJob
from retinaray.detector.anchors import DEFAULT_SCALES

SCALES, RATIOS, LEVELS = "anchors.scales", "anchors.ratios", "anchors.levels"
_ANCHOR_KEYS = (BASE_SCALE, NUM_SCALES, SCALES, RATIOS, LEVELS)
# Base scales tried between the ends of a range, per octave.
_STEPS_PER_OCTAVE = 12


def make_first_points(
    domains: Sequence[Domain], tree: Mapping[str, Any], inputs: TrainingInputs
) -> list[tuple[str, dict[str, object]]]:
    """Named points to start a search of anchors from.

    Every other key has the value of the training that the sweep varies, so that the first trials
    differ in nothing but their anchors.

    Args:
        domains: What is searched.
        tree: Settings of the training that is varied.
        inputs: Its data.

    Returns:
        `default`, `halved` and `fitted`, without those that lie outside the space and without
        repetitions; none when no anchors are searched. Values are in the domains, as these write
        them; a key whose domain does not hold the training's own value has the middle of its
        domain.
    """
    searched = {domain.key: domain for domain in domains}
    if not searched.keys() & set(_ANCHOR_KEYS):
        return []
    base = {
        key: searched[key].adopt(value) if searched[key].holds(value) else searched[key].middle
        for key, value in _values_of(tree, searched).items()
    }
    points: list[tuple[str, dict[str, object]]] = []
    for name, factor in (("default", 1.0), ("halved", 0.5)):
        scales = [factor * scale for scale in DEFAULT_SCALES]
        wanted = {BASE_SCALE: scales[0], NUM_SCALES: len(scales), SCALES: scales}
        chosen = {key: wanted[key] for key in searched if key in wanted}
        if all(searched[key].holds(value) for key, value in chosen.items()):
            adopted = {key: searched[key].adopt(value) for key, value in chosen.items()}
            points.append((name, {**base, **adopted}))
    points.append(("fitted", {**base, **_fit(searched, tree, inputs)}))
    unique: list[tuple[str, dict[str, object]]] = []
    for name, point in points:
        if point not in [earlier for _, earlier in unique]:
            unique.append((name, point))
    return unique


def _values_of(tree: Mapping[str, Any], searched: Mapping[str, Domain]) -> dict[str, object]:
    """What the training itself has at each searched key."""
    scales = tree["anchors"]["scales"]
    values: dict[str, object] = {}
    for key in searched:
        if key == BASE_SCALE:
            values[key] = scales[0]
        elif key == NUM_SCALES:
            values[key] = len(scales)
        else:
            node: Any = tree
            for part in key.split("."):
                node = node[part]
            values[key] = node
    return values


def _fit(
    searched: Mapping[str, Domain], tree: Mapping[str, Any], inputs: TrainingInputs
) -> dict[str, object]:
    """The point of the space whose anchors reach most, by its anchor keys."""
    by_scales = _settle((BASE_SCALE, NUM_SCALES, SCALES), "scales", searched, tree)
    by_ratios = _settle((RATIOS,), "ratios", searched, tree)
    by_strides = _settle((LEVELS,), "strides", searched, tree)
    best = fit_in_space(
        select_boxes(inputs.train, inputs.canvas),
        scales_choices=list(by_scales),
        ratios_choices=list(by_ratios),
        strides_choices=list(by_strides),
        convention=tree["anchors"]["convention"],
    )
    return {**by_scales[best.scales], **by_ratios[best.ratios], **by_strides[best.strides]}


def _settle(
    keys: tuple[str, ...], name: str, searched: Mapping[str, Domain], tree: Mapping[str, Any]
) -> dict[tuple[Any, ...], dict[str, object]]:
    """What the space can make of one part of the anchors, with the point that makes it."""
    present = [key for key in keys if key in searched]
    options = [_list_values(searched[key]) for key in present]
    settled: dict[tuple[Any, ...], dict[str, object]] = {}
    for values in itertools.product(*options):
        point = dict(zip(present, values, strict=True))
        anchors = load_from_dict(TrainJob, tree, make_changes(point, tree)).anchors
        settled.setdefault(getattr(anchors, name), point)
    return settled


def _list_values(domain: Domain) -> list[Any]:
    if domain.kind == "choice":
        return list(domain.values)
    low, high, *step = domain.values
    if step or domain.is_integer:
        step_size = step[0] if step else 1
        return [low + index * step_size for index in range(round((high - low) / step_size) + 1)]
    num_steps = math.ceil(_STEPS_PER_OCTAVE * math.log2(high / low))
    return [*(low * 2 ** (index / _STEPS_PER_OCTAVE) for index in range(num_steps)), high]
