"""Turn what pydantic says about a settings tree into lines that a user can act on.

Each line: dotted key, the value that came, where it came from, what was expected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from retinaray.config.odtk_flags import NEAREST_BACKBONES
from retinaray.config.options import Option, OptionTable, nearest_word

_MAX_SHOWN = 60


def describe_faults(
    error: ValidationError,
    table: OptionTable,
    origins: Mapping[str, str],
    *,
    only_values: bool = False,
) -> list[str]:
    """Write every fault of a failed validation as lines.

    Args:
        error: The failed validation of a job.
        table: Settings of the job.
        origins: Where a value came from, by dotted key; keys may be missing.
        only_values: Leave out what follows from settings that could not be read: missing ones,
            and rules over several.

    Returns:
        Lines in the order of the schema, each once.
    """
    lines: dict[str, None] = {}
    for details in error.errors(include_url=False):
        is_about_value = _find_option(details, table) is not None and details["type"] != "missing"
        if is_about_value or not only_values:
            lines.update(dict.fromkeys(_describe(details, table, origins)))
    return list(lines)


def describe_unknown_key(key: str, value: object, table: OptionTable, origin: str = "") -> str:
    """Write the fault of a key that no setting has, with the one that was probably meant."""
    nearest = table.nearest(key)
    if not nearest or nearest.startswith("the section "):
        nearest = _find_by_help(key, table) or nearest
    hint = f"nearest: {nearest}" if nearest else "remove it, or see --help for all keys"
    return f"{key}={show_value(value)}{_in_brackets(origin)}: no such key; {hint}"


def _find_by_help(key: str, table: OptionTable) -> str:
    """The setting whose help begins with the words of a key: learning_rate is optim.peak_lr."""
    words = key.rpartition(".")[2].lower().replace("_", " ")
    for option in table.options:
        if " " in words and option.help.lower().startswith(words):
            return f"{option.key} ({option.spelling})"
    return ""


def show_value(value: object) -> str:
    """Write a value as a user would have typed it, cut to a readable length."""
    if value is None:
        text = "none"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, str):
        text = value if value and value == value.strip() and "\n" not in value else repr(value)
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(map(str, value)) + "}"
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(show_value(element) for element in value) + "]"
    else:
        text = str(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def _find_option(details: ErrorDetails, table: OptionTable) -> Option | None:
    path = tuple(step for step in details["loc"] if isinstance(step, str))
    return table.by_path.get(path)


def _describe(
    details: ErrorDetails, table: OptionTable, origins: Mapping[str, str]
) -> Sequence[str]:
    option = _find_option(details, table)
    key = ".".join(str(step) for step in details["loc"])
    if option is not None:
        return [_describe_option(details, option, origins)]
    if details["type"] == "value_error":
        # A rule over several fields: its text names them.
        return str(details["ctx"]["error"]).splitlines()
    if details["type"] == "missing":
        return _describe_missing_section(key, table)
    origin = origins.get(key, "")
    if details["type"] == "extra_forbidden":
        return [describe_unknown_key(key, details["input"], table, origin)]
    came = f"{key}={show_value(details['input'])}{_in_brackets(origin)}"
    keys = ", ".join(table.sections[key].model_fields)
    return [f"{came}: expected a section with keys of {keys}"]


def _describe_option(details: ErrorDetails, option: Option, origins: Mapping[str, str]) -> str:
    origin = origins.get(option.key, "")
    indices = [step for step in details["loc"] if isinstance(step, int)]
    if details["type"] == "missing" and not indices:
        return f"{option.key} ({option.spelling}): required, but not given: {option.help}"
    # In a list that is too short pydantic points behind its end; the fault is the whole list.
    is_element = bool(indices) and details["type"] != "missing"
    key = f"{option.key}[{indices[0]}]" if is_element else option.key
    shape = option.shape
    where = _in_brackets(option.spelling, origin)
    expected = f"expected {shape.expected_element if is_element else shape.expected}"
    if details["type"] == "value_error":
        expected = str(details["ctx"]["error"])
    elif shape.kind == "choice":
        given = str(details["input"])
        known = NEAREST_BACKBONES.get(given, "")
        nearest = known if known in shape.choices else nearest_word(given, shape.choices)
        expected += f"; nearest: {nearest}" if nearest else ""
    return f"{key}={show_value(details['input'])}{where}: {expected}"


def _describe_missing_section(key: str, table: OptionTable) -> list[str]:
    prefix = f"{key}."
    return [
        f"{option.key} ({option.spelling}): required, but not given: {option.help}"
        for option in table.options
        if option.is_required and option.key.startswith(prefix)
    ]


def _in_brackets(*parts: str) -> str:
    given = [part for part in parts if part]
    return f" ({'; '.join(given)})" if given else ""
