"""The settings of a job as a flat table: one `Option` per leaf of the schema, found by key or flag.

Command line, help and fault messages are all made from this table, so they cannot disagree.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from retinaray.config.nodes import Config, Flag

Kind = Literal["bool", "int", "float", "text", "choice", "mapping"]

_KINDS: Mapping[object, Kind] = {bool: "bool", int: "int", float: "float", str: "text"}
_ONE: Mapping[Kind, str] = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "text": "a text that is not empty",
    "mapping": "a section of the file of --config, with a key per entry",
}
_MANY: Mapping[Kind, str] = {"int": "whole numbers", "float": "numbers", "text": "texts"}
_ENOUGH_ALIKE = 0.7
_SHORTEST_STEM = 4
"""A longer name for a setting of at least so many letters is alike: --batch-size for --batch."""


@dataclass(frozen=True)
class ValueShape:
    """What a field takes, in terms that a command line and a person understand.

    Attributes:
        kind: Type of the value, or of each element of a list.
        is_list: Several values are taken.
        is_optional: The word `none` is taken, too.
        choices: The words allowed when kind is "choice".
        bounds: Allowed range as text, such as " from 32 to 8192"; empty when there is none.
        count: Allowed number of list elements as text, such as "1 to 9" or "1 or more"; empty when
            any.
    """

    kind: Kind
    is_list: bool = False
    is_optional: bool = False
    choices: tuple[str, ...] = ()
    bounds: str = ""
    count: str = ""

    @property
    def expected(self) -> str:
        """Say what is taken, to go after "expected"."""
        if self.kind == "choice":
            text = "one of " + ", ".join(self.choices)
        elif self.is_list:
            text = f"{self.count} {_MANY[self.kind]}{self.bounds}".strip()
        else:
            text = self.expected_element
        return f"{text}, or none" if self.is_optional else text

    @property
    def expected_element(self) -> str:
        """Say what one value, or each value of a list, has to be."""
        return f"{_ONE[self.kind]}{self.bounds}"


@dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        path: Keys from the root of the job to the value.
        flag: Short command-line spelling; None when only the dotted path reaches it.
        shape: What it takes.
        help: The field's docstring on one line.
        default: Value when not given; meaningless when required.
        is_required: It must be given.
    """

    path: tuple[str, ...]
    flag: Flag | None
    shape: ValueShape
    help: str
    default: object
    is_required: bool

    @property
    def key(self) -> str:
        """Dotted path, as in `data.resize`."""
        return ".".join(self.path)

    @property
    def is_positional(self) -> bool:
        """It may be given as a bare argument."""
        return self.flag is not None and not self.flag.name.startswith("-")

    @property
    def spelling(self) -> str:
        """How a person gives it on the command line: short flag, argument name or dotted flag."""
        if self.flag is None:
            return f"--{self.key}"
        return f"argument {self.flag.metavar}" if self.is_positional else self.flag.name

    @property
    def names(self) -> tuple[str, ...]:
        """Every long option that sets it."""
        dotted = f"--{self.key}"
        if self.flag is None or self.is_positional or self.flag.name == dotted:
            return (dotted,)
        return (self.flag.name, dotted)


class OptionTable:
    """All options of one job class."""

    def __init__(self, job_class: type[Config]) -> None:
        self.options = tuple(_walk(job_class, ()))
        self.sections = {".".join(path): node for path, node in _walk_sections(job_class, ())}
        self.by_path = {option.path: option for option in self.options}
        self.by_name: dict[str, Option] = {}
        for option in self.options:
            for name in option.names:
                if name in self.by_name:
                    raise ValueError(f"{name} is both {self.by_name[name].key} and {option.key}")
                self.by_name[name] = option
        for option in self.positionals[:-1]:
            if option.shape.is_list:
                raise ValueError(f"{option.key} takes all that come: no argument may follow it")

    @property
    def positionals(self) -> tuple[Option, ...]:
        """Options that may be bare arguments, in their order."""
        return tuple(option for option in self.options if option.is_positional)

    def has(self, key: str) -> bool:
        """Whether a dotted key is a setting or a section."""
        return tuple(key.split(".")) in self.by_path or key in self.sections

    def nearest(self, wrong: str, extra_names: Sequence[str] = ()) -> str:
        """Find the setting that a wrong key or flag most likely meant.

        Args:
            wrong: Dotted key or long option, as it came.
            extra_names: Long options that are no settings, such as `--config`.

        Returns:
            Key and flag of the setting, or a section's name; empty when nothing is alike.
        """
        is_flag = wrong.startswith("-")
        names = {option: _readings(option) for option in self.options}
        candidates = {_show(option, is_flag): readings for option, readings in names.items()}
        if is_flag:
            candidates |= {name: (_plain(name),) for name in extra_names}
        else:
            candidates |= {f"the section {name}": (name,) for name in self.sections}
        scores = {text: _likeness(wrong, readings) for text, readings in candidates.items()}
        best = max(scores, key=lambda text: scores[text])
        return best if scores[best] >= _ENOUGH_ALIKE else ""


def nearest_word(wrong: str, words: Sequence[str]) -> str:
    """Find the allowed word most like a wrong one, regardless of case; empty when none is alike."""
    scores = {word: _ratio(wrong.lower(), word.lower()) for word in words}
    best = max(scores, key=lambda word: scores[word], default="")
    return best if best and scores[best] >= _ENOUGH_ALIKE else ""


def _show(option: Option, is_flag: bool) -> str:
    if is_flag and not option.is_positional:
        return f"{option.names[0]} ({option.key})"
    return f"{option.key} ({option.spelling})"


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()


def _readings(option: Option) -> tuple[str, ...]:
    flag_name = () if option.flag is None else (_plain(option.flag.name),)
    return (option.key, option.path[-1], *flag_name)


def _likeness(wrong: str, readings: tuple[str, ...]) -> float:
    # The whole key counts a little more than its last word, so that `run.bach` is run.batch and
    # `optim.lr` is still found as the key with the flag --lr.
    whole = _plain(wrong)
    last_word = whole.rpartition(".")[2]
    partial = max(_ratio(last_word, reading) for reading in readings)
    return max(_ratio(whole, readings[0]) + 0.01, partial)


def _ratio(first: str, second: str) -> float:
    ratio = SequenceMatcher(None, first, second).ratio()
    is_longer_name = len(second) >= _SHORTEST_STEM and first.startswith(second)
    return max(ratio, _ENOUGH_ALIKE) if is_longer_name else ratio


def _walk(node: type[Config], prefix: tuple[str, ...]) -> Iterator[Option]:
    for name, field in node.model_fields.items():
        path = (*prefix, name)
        section = _as_section(field)
        if section is not None:
            yield from _walk(section, path)
            continue
        flags = [entry for entry in field.metadata if isinstance(entry, Flag)]
        yield Option(
            path=path,
            flag=flags[0] if flags else None,
            shape=_read_shape(field),
            help=" ".join((field.description or "").split()),
            default=field.default,
            is_required=field.is_required(),
        )


def _walk_sections(
    node: type[Config], prefix: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], type[Config]]]:
    for name, field in node.model_fields.items():
        section = _as_section(field)
        if section is not None:
            yield (*prefix, name), section
            yield from _walk_sections(section, (*prefix, name))


def _as_section(field: FieldInfo) -> type[Config] | None:
    annotation = field.annotation
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    return None


def _read_shape(field: FieldInfo) -> ValueShape:
    inner, metadata, is_optional = _peel(field.annotation, list(field.metadata))
    if get_origin(inner) is Literal:
        choices = get_args(inner)
        # Where `none` is a choice, it is meant: whoever wants the default does not give the option.
        return ValueShape(
            "choice", is_optional=is_optional and "none" not in choices, choices=choices
        )
    if get_origin(inner) is dict:
        return ValueShape("mapping", is_optional=is_optional)
    if get_origin(inner) is not tuple:
        return ValueShape(_KINDS[inner], is_optional=is_optional, bounds=_describe_bounds(metadata))
    elements = get_args(inner)
    element, element_metadata, _ = _peel(elements[0], [])
    is_open = len(elements) == 2 and elements[1] is Ellipsis
    return ValueShape(
        _KINDS[element],
        is_list=True,
        is_optional=is_optional,
        bounds=_describe_bounds(element_metadata),
        count=_describe_count(metadata) if is_open else str(len(elements)),
    )


def _peel(annotation: Any, metadata: list[Any]) -> tuple[Any, list[Any], bool]:
    """Take `Annotated` and `| None` off a type; collect the constraints on the way."""
    is_optional = False
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *extra = get_args(annotation)
            for entry in extra:
                metadata.extend(entry.metadata if isinstance(entry, FieldInfo) else [entry])
        elif get_origin(annotation) in (Union, types.UnionType):
            (annotation,) = (arg for arg in get_args(annotation) if arg is not type(None))
            is_optional = True
        else:
            return annotation, metadata, is_optional


def _describe_bounds(metadata: list[Any]) -> str:
    low = high = step = ""
    for entry in metadata:
        match entry:
            case annotated_types.Ge(ge=bound):
                low = f">= {bound}"
            case annotated_types.Gt(gt=bound):
                low = f"> {bound}"
            case annotated_types.Le(le=bound):
                high = f"<= {bound}"
            case annotated_types.Lt(lt=bound):
                high = f"< {bound}"
            case annotated_types.MultipleOf(multiple_of=divisor):
                step = f", a multiple of {divisor}"
    if low.startswith(">= ") and high.startswith("<= "):
        return f" from {low[3:]} to {high[3:]}{step}"
    limits = " and ".join(part for part in (low, high) if part)
    return f" {limits}{step}" if limits else step


def _describe_count(metadata: list[Any]) -> str:
    low = next((e.min_length for e in metadata if isinstance(e, annotated_types.MinLen)), 0)
    high = next((e.max_length for e in metadata if isinstance(e, annotated_types.MaxLen)), None)
    if high is not None:
        return f"{low} to {high}"
    return f"{low} or more" if low else ""
