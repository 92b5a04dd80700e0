"""Settings of a run for people: as the command line that makes it again, and flat by dotted key."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from retinaray.config.loading import load_from_dict, to_dict, to_yaml
from retinaray.config.nodes import Job
from retinaray.config.options import Option, OptionTable
from retinaray.errors import ConfigError
from retinaray.reporting.report.contents import ReportedRun

JobT = TypeVar("JobT", bound=Job)


def add_settings(
    run: ReportedRun, job_class: type[JobT], tree: Mapping[str, Any], versions: Mapping[str, str]
) -> tuple[ReportedRun, JobT | None]:
    """The run with its settings and command line, and the job.

    Args:
        run: So far.
        job_class: Which job.
        tree: Its settings, from a record of any version.
        versions: Packages that it ran with.

    Returns:
        The run, and the job if this version of retinaray understands its settings.
    """
    run = replace(run, settings=flatten_settings(tree), versions=dict(versions))
    try:
        job = load_from_dict(job_class, tree)
    except ConfigError as error:
        first = str(error).splitlines()[0]
        gap = f"command line: this version of retinaray reads its settings differently: {first}"
        return run.with_gap(gap), None
    return replace(run, command=format_command(job), unusual=list_changed(job)), job


def format_command(job: Job) -> str:
    """The command line with every setting that is not the default.

    Returns:
        Words quoted for a POSIX shell, one setting per line; `read_request` reads an equal job from
        it. A job with settings that no flag takes, as the space of a sweep, is a line that reads a
        YAML file, and that file.
    """
    table = OptionTable(type(job))
    tree = to_dict(job)
    if any(option.shape.kind == "mapping" for option in table.options):
        name = f"{job.verb}.yaml"
        return f"retinaray {job.verb} --config {name}\n\n# {name}\n{to_yaml(job)}"
    changed = list_changed(job)
    lines = [f"retinaray {job.verb}"]
    # Bare arguments first: a list of numbers in front would swallow one that looks like a number.
    for option in sorted(table.options, key=lambda option: not option.is_positional):
        if option.is_required or option.key in changed:
            words = _spell(option, _look_up(tree, option.path))
            lines.append(" ".join(map(shlex.quote, words)))
    head, *rest = lines
    positionals = [line for line in rest if not line.startswith("-")]
    flags = [line for line in rest if line.startswith("-")]
    return " \\\n    ".join([" ".join([head, *positionals]), *flags])


def list_changed(job: Job) -> frozenset[str]:
    """Dotted keys of the settings that differ from their defaults."""
    tree = to_dict(job)
    return frozenset(
        option.key
        for option in OptionTable(type(job)).options
        # As JSON, because tuples become lists there.
        if option.is_required
        or json.dumps(_look_up(tree, option.path)) != json.dumps(option.default)
    )


def flatten_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Values by dotted key, in their order; the space of a sweep, whose keys have dots, too."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten_settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _look_up(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _spell(option: Option, value: Any) -> list[str]:
    if option.is_positional:
        return [str(entry) for entry in (value if isinstance(value, list) else [value])]
    name = option.names[0]
    if isinstance(value, bool):
        return [name if value else f"--no-{name[2:]}"]
    if value is None:
        return [name, "none"]
    if not isinstance(value, list):
        text = str(value)
        return [f"{name}={text}"] if text.startswith("-") else [name, text]
    if option.shape.kind in ("int", "float"):
        return [name, *map(str, value)]
    return [f"{name}={','.join(map(str, value))}"]
