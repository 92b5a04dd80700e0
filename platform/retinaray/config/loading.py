"""The one path to a job: dict -> dotted changes -> one validation -> frozen tree.

YAML files, command lines, tuning trials and reloaded run records all use it, and all faults are
reported together.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from pydantic import ValidationError

from retinaray.config.command_line import CommandLine, read_command_line
from retinaray.config.faults import describe_faults, describe_unknown_key
from retinaray.config.help_text import format_help, list_options
from retinaray.config.nodes import Job
from retinaray.config.odtk_flags import list_odtk_flags, stretch_schedule
from retinaray.config.options import OptionTable, ValueShape
from retinaray.config.yaml_files import YamlTree, read_yaml, write_yaml
from retinaray.errors import ConfigError

JobT = TypeVar("JobT", bound=Job)
Verbosity = Literal["quiet", "normal", "verbose"]


@dataclass(frozen=True)
class Request(Generic[JobT]):
    """What a command line asks for.

    Attributes:
        job: The settings to run with; None when only a text was asked for.
        printout: Text for stdout after `--help` or `--print-config`; empty when there is a job.
        verbosity: How much to log.
        is_table_wanted: Whether the result is also written for people.
    """

    job: JobT | None
    printout: str = ""
    verbosity: Verbosity = "normal"
    is_table_wanted: bool = True


def read_request(job_class: type[JobT], argv: Sequence[str], *, epilog: str = "") -> Request[JobT]:
    """Read a command line completely before anything is started.

    Args:
        job_class: Which job.
        argv: Arguments after the verb; options win over the file of `--config`.
        epilog: Text for the end of the help.

    Returns:
        The job, or the text that was asked for instead; with `--json` that is one line of JSON.

    Raises:
        ConfigError: If anything is wrong; one line per fault, all faults at once.
    """
    table = OptionTable(job_class)
    line = read_command_line(argv, table, list_odtk_flags(job_class.verb))
    is_json = "json" in line.switches
    if "help" in line.switches:
        text = _show_json(list_options(table)) if is_json else format_help(job_class, table, epilog)
        return Request(None, printout=text)
    file = read_yaml(line.config_file) if line.config_file else YamlTree()
    origins = {key: f"config file {line.config_file}, line {n}" for key, n in file.lines.items()}
    tree = _copy_tree(file.tree)
    _apply_changes(tree, line.changes)
    faults = file.faults + line.faults
    if line.schedule_factor:
        faults += _stretch(tree, line.schedule_factor)
    # A value of the command line has no line in the file, even if it replaces one that has.
    origins = {key: text for key, text in origins.items() if key not in line.changes}
    job, value_faults = _validate(job_class, tree, table, origins, only_values=not file.is_readable)
    faults += value_faults
    if faults and line.config_file and file.is_readable and not file.tree:
        faults.insert(0, f"config file {line.config_file}: holds no settings; is it the right one?")
    if faults or job is None:
        raise ConfigError("\n".join(faults))
    if "print-config" in line.switches:
        return Request(None, printout=_show_json(to_dict(job)) if is_json else to_yaml(job))
    is_table_wanted = not {"quiet", "json"} & line.switches
    return Request(job, verbosity=_read_verbosity(line), is_table_wanted=is_table_wanted)


def load_from_argv(job_class: type[JobT], argv: Sequence[str]) -> JobT:
    """Read a job from a command line.

    Args:
        job_class: Which job.
        argv: Arguments after the verb.

    Returns:
        The validated job.

    Raises:
        ConfigError: If anything is wrong; one line per fault, all faults at once.
        SystemExit: With code 0 after `--help` or `--print-config`, whose text goes to stdout.
    """
    request = read_request(job_class, argv)
    if request.job is None:
        sys.stdout.write(request.printout)
        raise SystemExit(0)
    return request.job


def load_from_dict(
    job_class: type[JobT], tree: Mapping[str, object], changes: Mapping[str, object] | None = None
) -> JobT:
    """Read a job from nested settings, as in a run record, with changes, as in a tuning trial.

    Args:
        job_class: Which job.
        tree: Nested settings; not modified.
        changes: Values by dotted key, which replace those of the tree.

    Returns:
        The validated job.

    Raises:
        ConfigError: If anything is wrong; one line per fault, all faults at once.
    """
    table = OptionTable(job_class)
    copy = _copy_tree(tree)
    known = {key: value for key, value in (changes or {}).items() if table.has(key)}
    faults = [
        describe_unknown_key(key, value, table)
        for key, value in (changes or {}).items()
        if key not in known
    ]
    _apply_changes(copy, known)
    job, value_faults = _validate(job_class, copy, table, {})
    faults += value_faults
    if faults or job is None:
        raise ConfigError("\n".join(faults))
    return job


def to_dict(job: Job) -> dict[str, Any]:
    """Write a job as nested plain values; `load_from_dict` gives an equal job."""
    return job.model_dump(mode="json")


def to_yaml(job: Job) -> str:
    """Write a job as YAML for `--print-config` and run records; it is a valid `--config` file."""
    return write_yaml(to_dict(job))


def _show_json(values: object) -> str:
    return f"{json.dumps(values)}\n"


def _read_verbosity(line: CommandLine) -> Verbosity:
    if "verbose" in line.switches:
        return "verbose"
    return "quiet" if "quiet" in line.switches else "normal"


def _copy_tree(tree: Mapping[Any, object]) -> dict[str, object]:
    """Copy the nested mappings; keys that are no texts are left out.

    The reader of the file has already reported such keys.
    """
    return {key: _copy_node(value) for key, value in tree.items() if isinstance(key, str)}


def _copy_node(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    # Settings nest two deep: what lies deeper is a fault, and might contain itself.
    return {key: entry for key, entry in value.items() if isinstance(key, str)}


def _apply_changes(tree: dict[str, object], changes: Mapping[str, object]) -> None:
    for key, value in changes.items():
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            child = node.get(section)
            if child is None:
                child = node[section] = {}
            if not isinstance(child, dict):
                # The tree has a plain value where a section belongs: the validation says so.
                break
            node = child
        else:
            node[last] = _copy_node(value)


def _stretch(tree: dict[str, object], factor: str) -> list[str]:
    changes, fault = stretch_schedule(tree, factor)
    _apply_changes(tree, changes)
    return [fault] if fault else []


def _validate(
    job_class: type[JobT],
    tree: dict[str, object],
    table: OptionTable,
    origins: Mapping[str, str],
    *,
    only_values: bool = False,
) -> tuple[JobT | None, list[str]]:
    _normalise(tree, table)
    try:
        return job_class.model_validate(tree), []
    except ValidationError as error:
        return None, describe_faults(error, table, origins, only_values=only_values)


def _normalise(tree: dict[str, object], table: OptionTable) -> None:
    """Make plain what pydantic would misread: the word none, empty sections, bools as numbers."""
    for name in table.sections:
        if name in tree and tree[name] is None:
            tree[name] = {}
    for option in table.options:
        node: object = tree
        for section in option.path[:-1]:
            node = node.get(section) if isinstance(node, dict) else None
        last = option.path[-1]
        if isinstance(node, dict) and last in node:
            node[last] = _normalise_value(node[last], option.shape)


def _normalise_value(value: object, shape: ValueShape) -> object:
    words = value if isinstance(value, (list, tuple)) else [value]
    is_none = len(words) == 1 and isinstance(words[0], str) and words[0].lower() == "none"
    if shape.is_optional and is_none:
        return None
    if shape.kind not in ("int", "float"):
        return value
    # pydantic takes true for 1; as a word it is refused like any other word.
    plain = [str(word).lower() if isinstance(word, bool) else word for word in words]
    return plain if isinstance(value, (list, tuple)) else plain[0]
