"""What a sweep searches: domains by dotted key, and a drawn point as changes of a job.

Two keys of the space are no settings: `anchors.base_scale` and `anchors.num_scales` stand for
`anchors.scales`: num_scales scales per octave from base_scale on.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from retinaray.config.faults import describe_unknown_key, show_value
from retinaray.config.loading import load_from_dict
from retinaray.config.nodes import Job
from retinaray.config.options import OptionTable, nearest_word
from retinaray.errors import ConfigError

DomainKind = Literal["choice", "uniform", "loguniform", "quniform"]

BASE_SCALE = "anchors.base_scale"
NUM_SCALES = "anchors.num_scales"
_MADE_KEYS = (BASE_SCALE, NUM_SCALES)
_SCALES = "anchors.scales"
_MAX_SCALES = 9
_RANGES: Mapping[str, int] = {"uniform": 2, "loguniform": 2, "quniform": 3}
_SYNTAX = (
    "expected a list of choices, {uniform: [low, high]}, {loguniform: [low, high]} or "
    "{quniform: [low, high, step]}"
)
# Changing these would not change what a trial computes, or break the comparison between trials.
_FIXED = (
    "output",
    "data.annotations",
    "data.val_annotations",
    "data.val_images",
    "data.classes",
    "run.workers",
    "run.objective",
    "run.latency_price",
    "run.override",
    "run.log_every",
    "run.val_every",
    "run.checkpoint_minutes",
    "run.max_failures",
    "run.strict_anchors",
    "run.patience",
)


@dataclass(frozen=True)
class Domain:
    """Values that a sweep may give to one key.

    Attributes:
        key: Dotted key of a training setting, or BASE_SCALE or NUM_SCALES.
        kind: How it is drawn.
        values: The choices, or low and high (inclusive), and the step of quniform.
        is_integer: Only whole numbers are drawn.
    """

    key: str
    kind: DomainKind
    values: tuple[Any, ...]
    is_integer: bool = False

    def holds(self, value: object) -> bool:
        """Whether the domain can give this value."""
        if self.kind == "choice":
            return any(_same(value, choice) for choice in self.values)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        low, high, *step = self.values
        # Multiples of a step are not exact: 3 * 0.1 is above 0.3.
        slack = 1e-9 * (high - low)
        if not low - slack <= value <= high + slack or (self.is_integer and value != int(value)):
            return False
        return not step or math.isclose(
            (value - low) / step[0], round((value - low) / step[0]), abs_tol=1e-6
        )

    def adopt(self, value: object) -> object:
        """A value that the domain holds, as the domain itself writes it: [1, 2], not [1.0, 2.0].

        Raises:
            ValueError: If the domain does not hold it.
        """
        if not self.holds(value):
            raise ValueError(f"{self.key}={value!r}: not in {self.kind} {list(self.values)}")
        if self.kind != "choice":
            return value
        return next(choice for choice in self.values if _same(value, choice))

    @property
    def middle(self) -> Any:
        """A value in the middle: of the list, of the range, or of its logarithm."""
        if self.kind == "choice":
            return self.values[len(self.values) // 2]
        low, high, *step = self.values
        if self.kind == "loguniform":
            value = math.sqrt(low * high)
            return round(value) if self.is_integer else value
        if step:
            return low + step[0] * round((high - low) / 2 / step[0])
        return (low + high) // 2 if self.is_integer else (low + high) / 2


def parse_space(space: Mapping[str, object], job_class: type[Job]) -> tuple[Domain, ...]:
    """The domains of a sweep, in the order of the file.

    Args:
        space: As in YAML.
        job_class: Whose keys are searched.

    Raises:
        ConfigError: If an entry cannot be read; all faults at once.
    """
    table = OptionTable(job_class)
    domains, faults = [], []
    for key, value in space.items():
        fault = _find_key_fault(key, value, table)
        parsed = None if fault else _parse_domain(key, value, table)
        if isinstance(parsed, Domain):
            domains.append(parsed)
        else:
            faults.append(fault or f"space.{key}={show_value(value)}: {parsed}")
    if {BASE_SCALE, _SCALES} <= space.keys() or {NUM_SCALES, _SCALES} <= space.keys():
        faults.append(
            f"space.{_SCALES} and space.{BASE_SCALE} or {NUM_SCALES} are both given: the latter "
            "make the scales; keep one"
        )
    if faults:
        raise ConfigError("\n".join(faults))
    return tuple(domains)


def make_changes(point: Mapping[str, object], tree: Mapping[str, Any]) -> dict[str, object]:
    """A drawn point as changes of a training's settings.

    Args:
        point: Values by key of the space.
        tree: Settings of the training that the sweep varies, for what the point leaves open.

    Returns:
        Values by dotted key of real settings.
    """
    changes = {key: value for key, value in point.items() if key not in _MADE_KEYS}
    if BASE_SCALE in point or NUM_SCALES in point:
        scales = tree["anchors"]["scales"]
        base = float(str(point.get(BASE_SCALE, scales[0])))
        count = int(str(point.get(NUM_SCALES, len(scales))))
        changes[_SCALES] = [base * 2 ** (index / count) for index in range(count)]
    return changes


def find_space_faults(
    space: Mapping[str, object], job_class: type[Job], tree: Mapping[str, Any]
) -> list[str]:
    """Everything that is wrong with a space: each choice and each end of a range is tried.

    Args:
        space: As in YAML.
        job_class: Class of the training.
        tree: Its settings.

    Returns:
        One line per fault; empty when every value is valid on its own and with every value of
        every other key.
    """
    try:
        domains = parse_space(space, job_class)
    except ConfigError as error:
        return str(error).splitlines()
    points: Iterable[tuple[Domain, ...]] = ((domain,) for domain in domains)
    faults = _try_values(points, job_class, tree)
    # What is wrong alone is wrong with all others: rules over two settings come second.
    return faults or _try_values(itertools.combinations(domains, 2), job_class, tree)


def _try_values(
    groups: Iterable[tuple[Domain, ...]], job_class: type[Job], tree: Mapping[str, Any]
) -> list[str]:
    """The faults of every combination of the probes of each group of domains, each once."""
    faults: dict[str, None] = {}
    for group in groups:
        keys = [domain.key for domain in group]
        for values in itertools.product(*map(_list_probes, group)):
            point = dict(zip(keys, values, strict=True))
            try:
                load_from_dict(job_class, tree, make_changes(point, tree))
            except ConfigError as error:
                name = " with ".join(f"space.{key}" for key in keys)
                faults.update((f"{name}: {line}", None) for line in str(error).splitlines())
    return list(faults)


def _list_probes(domain: Domain) -> tuple[Any, ...]:
    """Every choice; both ends of a range, and what follows the first where it is discrete.

    With the second value, "a multiple of" cannot hide: what two neighbours and both ends satisfy,
    all whole numbers between satisfy.
    """
    if domain.kind == "choice":
        return domain.values
    low, high, *step = domain.values
    if not step and not domain.is_integer:
        return low, high
    return low, min(low + (step[0] if step else 1), high), high


def _find_key_fault(key: str, value: object, table: OptionTable) -> str:
    if key in _MADE_KEYS:
        return ""
    if tuple(key.split(".")) not in table.by_path:
        nearest = nearest_word(key, [option.key for option in table.options] + list(_MADE_KEYS))
        if nearest in _MADE_KEYS:
            return f"space.{key}={show_value(value)}: no such key; nearest: {nearest}"
        return f"space.{describe_unknown_key(key, value, table)}"
    if key in _FIXED:
        return f"space.{key}: cannot be searched: it must be the same for all trials"
    return ""


def _parse_domain(key: str, value: object, table: OptionTable) -> Domain | str:
    """The domain, or what is wrong with it."""
    if isinstance(value, list):
        domain = Domain(key, "choice", tuple(value))
        return (_find_scale_fault(domain) or domain) if value else "expected at least one choice"
    if not isinstance(value, Mapping) or len(value) != 1:
        return _SYNTAX
    ((kind, numbers),) = value.items()
    numbers = [_read_number(n) for n in numbers] if isinstance(numbers, list) else numbers
    if kind not in _RANGES or not _are_numbers(numbers, _RANGES[kind]):
        return _SYNTAX
    if key not in _MADE_KEYS and not _takes_numbers(key, table):
        return "expected a list of choices: this setting is not a single number"
    is_integer = key == NUM_SCALES or (
        key != BASE_SCALE and table.by_path[tuple(key.split("."))].shape.kind == "int"
    )
    domain = Domain(key, kind, tuple(numbers), is_integer=is_integer)
    return _find_range_fault(domain) or _find_scale_fault(domain) or domain


def _read_number(value: object) -> object:
    """YAML takes 2e-4 for a text; everywhere else in a job file it is a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _takes_numbers(key: str, table: OptionTable) -> bool:
    shape = table.by_path[tuple(key.split("."))].shape
    return shape.kind in ("int", "float") and not shape.is_list


def _find_range_fault(domain: Domain) -> str:
    low, high, *step = domain.values
    if not low < high:
        return f"expected low < high, got {low} and {high}"
    if domain.kind == "loguniform" and low <= 0:
        return f"loguniform needs low > 0, got {low}"
    if step and not 0 < step[0] <= high - low:
        return f"expected a step in (0, high - low], got {step[0]}"
    if domain.is_integer and not all(isinstance(number, int) for number in domain.values):
        return "expected whole numbers: this setting takes no others"
    if step and not all(_is_multiple(end, step[0]) for end in (low, high)):
        # Ray Tune rounds what it draws to multiples of the step.
        return f"expected low and high to be multiples of the step {step[0]}, got {low} and {high}"
    return ""


def _is_multiple(value: float, step: float) -> bool:
    return math.isclose(value / step, round(value / step), rel_tol=1e-9)


def _find_scale_fault(domain: Domain) -> str:
    """What is wrong with values of which `make_changes` is to make scales."""
    values = domain.values if domain.kind == "choice" else domain.values[:2]
    if domain.key == BASE_SCALE and not all(_is_number(value) and value > 0 for value in values):
        return "expected numbers > 0, in strides"
    if domain.key == NUM_SCALES and not all(
        _is_number(value) and isinstance(value, int) and 1 <= value <= _MAX_SCALES
        for value in values
    ):
        return f"expected whole numbers from 1 to {_MAX_SCALES}"
    return ""


def _are_numbers(values: object, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(map(_is_number, values))


def _is_number(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # type: ignore[arg-type]


def _same(value: object, choice: object) -> bool:
    """Equal as settings: numbers by value, lists element by element."""
    if isinstance(value, (list, tuple)) and isinstance(choice, (list, tuple)):
        return len(value) == len(choice) and all(map(_same, value, choice))
    if isinstance(value, float) and isinstance(choice, (int, float)):
        return math.isclose(value, choice, rel_tol=1e-9)
    return value == choice


def encode_choice(value: object) -> object:
    """A choice as a search algorithm can hold it: lists become JSON texts."""
    return json.dumps(value) if isinstance(value, (list, tuple, dict)) else value


def decode_point(point: Mapping[str, object]) -> dict[str, object]:
    """A point whose lists were encoded by `encode_choice`, as settings."""
    return {
        key: json.loads(value) if isinstance(value, str) and value.startswith("[") else value
        for key, value in point.items()
    }
