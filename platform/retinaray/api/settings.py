"""Keyword arguments as the settings of a command: the same names, defaults and faults.

A keyword is a key of the YAML file (`output=`, `data={...}`), a flag with underscores (`batch=`,
`anchor_scales=`), or a path with two underscores for each dot (`loss__focal_gamma=`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from retinaray.config.loading import load_from_dict, to_dict
from retinaray.config.nodes import Job
from retinaray.config.options import OptionTable
from retinaray.config.upload_folder import check_output_stays
from retinaray.config.yaml_files import YamlTree, read_yaml
from retinaray.errors import ConfigError

JobT = TypeVar("JobT", bound=Job)

Config = str | os.PathLike[str] | Mapping[str, object] | Job | None
"""A YAML file as `--config` takes it, its content, or settings that were made before."""


def make_job(
    job_class: type[JobT],
    given: Mapping[str, object],
    *,
    config: Config = None,
    base: Mapping[str, object] | None = None,
) -> JobT:
    """The settings of a command, validated once.

    Args:
        job_class: Which command.
        given: Keywords and their values; they win over the file, as flags do.
        config: Settings to start from; none = the defaults.
        base: Values by dotted key which win over the file, and over which the keywords win.

    Raises:
        ConfigError: If anything is wrong, or the output would not outlive the job; one line per
            fault, all faults at once.
    """
    file = _read_config(config)
    if not file.is_readable:
        raise ConfigError("\n".join(file.faults))
    changes, repeated = name_settings(given, OptionTable(job_class))
    faults = file.faults + repeated
    try:
        job = load_from_dict(job_class, file.tree, {**(base or {}), **changes})
    except ConfigError as error:
        raise ConfigError("\n".join([*faults, str(error)])) from None
    if faults:
        raise ConfigError("\n".join(faults))
    check_output_stays(job, Path.cwd())
    return job


def name_settings(
    given: Mapping[str, object], table: OptionTable
) -> tuple[dict[str, object], list[str]]:
    """Translate keywords into dotted keys.

    Args:
        given: Keywords and their values; paths, arrays and tuples may be among these.
        table: Settings of the command.

    Returns:
        Plain values by dotted key, a section's one by one; and a line for each key that was given
        twice. A keyword that is no setting stays as it is, for `load_from_dict` to refuse.
    """
    changes: dict[str, object] = {}
    faults = []
    for keyword, value in given.items():
        key = _find_key(keyword, table)
        for name, plain in _flatten(key, _make_plain(value), table).items():
            if name in changes:
                faults.append(f"{name} is given twice, the second time by {keyword}: keep one")
            changes[name] = plain
    return changes, faults


def _find_key(keyword: str, table: OptionTable) -> str:
    dotted = keyword.replace("__", ".")
    option = table.by_name.get("--" + keyword.replace("_", "-"))
    return option.key if option is not None and not table.has(dotted) else dotted


def _flatten(key: str, value: object, table: OptionTable) -> dict[str, object]:
    # Only what is named changes: the rest of a section may come from a file.
    if key not in table.sections or not isinstance(value, dict):
        return {key: value}
    return {
        name: plain
        for last, inner in value.items()
        for name, plain in _flatten(f"{key}.{last}", inner, table).items()
    }


def _make_plain(value: object) -> object:
    """What a YAML file could hold: paths as texts, arrays as lists."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _make_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_make_plain(inner) for inner in value]
    return value


def _read_config(config: Config) -> YamlTree:
    if config is None:
        return YamlTree()
    if isinstance(config, Job):
        return YamlTree(tree=to_dict(config))
    if isinstance(config, Mapping):
        return YamlTree(tree={str(key): _make_plain(value) for key, value in config.items()})
    path = os.fspath(config)
    if not path.lower().endswith((".yaml", ".yml")):
        fault = (
            f"config={path}: expected a file that ends in .yaml or .yml, or a mapping; give other "
            "settings by their names, as in output=..."
        )
        return YamlTree(faults=[fault], is_readable=False)
    return read_yaml(path)
