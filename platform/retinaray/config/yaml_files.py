"""Job files in YAML: read with line numbers, repeated keys refused; and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from retinaray.path_hints import hint_at_missing

_MERGE_TAG = "tag:yaml.org,2002:merge"
_TEXT_TAG = "tag:yaml.org,2002:str"
_LARGEST_BYTES = 1 << 20
"""YAML is read slowly: a data set given as settings would take minutes to be refused."""

_DEEPEST = 4
"""Settings nest two deep; a file that refers to itself must not be followed for ever."""


@dataclass
class YamlTree:
    """A job file as it was read.

    Attributes:
        tree: Nested settings; empty when the file is unreadable.
        lines: Line of each key, from 1, by dotted path.
        faults: One line per fault of the file itself.
        is_readable: The tree is what the file says, repeated keys aside.
    """

    tree: dict[str, object] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    is_readable: bool = True


def read_yaml(path: str) -> YamlTree:
    """Read a job file.

    Args:
        path: Local file. An empty file, or one of comments only, has no settings.

    Returns:
        The settings, with every fault of the file listed and none raised.
    """
    where = f"config file {path}"
    try:
        num_bytes = Path(path).stat().st_size
        if num_bytes > _LARGEST_BYTES:
            fault = f"{where}: has {num_bytes:,} bytes; expected settings, which are short"
            return YamlTree(faults=[fault], is_readable=False)
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        return YamlTree(faults=[_describe_unread(error, path, where)], is_readable=False)
    return parse_yaml(text, where)


def parse_yaml(text: str, where: str) -> YamlTree:
    """Read job settings from YAML text.

    Args:
        text: YAML; empty means no settings.
        where: Name of the text in fault messages.

    Returns:
        The settings, with every fault of the text listed and none raised.
    """
    try:
        root, tree = _compose(text)
    except yaml.MarkedYAMLError as error:
        return YamlTree(faults=[_describe_syntax(error, where)], is_readable=False)
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: a date such as 2026-13-01, which YAML reads as one.
        reason = " ".join(str(error).split())
        return YamlTree(faults=[f"{where}: not YAML: {reason}"], is_readable=False)
    if root is None or tree is None:
        return YamlTree()
    if isinstance(tree, dict) and {"images", "annotations", "categories"} <= tree.keys():
        fault = f"{where}: is a COCO data set; give it as --annotations, settings as --config"
        return YamlTree(faults=[fault], is_readable=False)
    if not isinstance(root, yaml.MappingNode):
        fault = f"{where}: expected sections and keys, as in `data:`; got {root.value!r:.60}"
        return YamlTree(faults=[fault], is_readable=False)
    result = YamlTree(tree=tree)
    for key_path, mark, is_repeated, is_text in _walk_keys(root, ""):
        place = f"line {mark.line + 1}, column {mark.column + 1}"
        if is_repeated:
            first = result.lines[key_path]
            result.faults.append(
                f"{where}, {place}: {key_path} is given twice, first in line {first}; keep one"
            )
        elif not is_text:
            result.faults.append(f"{where}, {place}: the key {key_path} must be a word; quote it")
        result.lines.setdefault(key_path, mark.line + 1)
    return result


def write_yaml(tree: Mapping[str, object]) -> str:
    """Write nested settings as YAML that `parse_yaml` reads back unchanged."""
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True, width=100)


def _compose(text: str) -> tuple[yaml.Node | None, Any]:
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        return root, None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


def _walk_keys(
    node: yaml.MappingNode, prefix: str, depth: int = 0
) -> Iterator[tuple[str, yaml.Mark, bool, bool]]:
    """List each key of a mapping as (dotted path, position, is repeated, is a text)."""
    seen: set[str] = set()
    for key, value in node.value:
        if key.tag == _MERGE_TAG:
            continue
        path = f"{prefix}{key.value}"
        yield path, key.start_mark, path in seen, key.tag == _TEXT_TAG
        seen.add(path)
        if isinstance(value, yaml.MappingNode) and depth < _DEEPEST:
            yield from _walk_keys(value, f"{path}.", depth + 1)


def _describe_unread(error: OSError | ValueError, path: str, where: str) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"{where}: byte {error.start} is not UTF-8; expected a YAML text file"
    if not isinstance(error, OSError):
        return f"{where}: {error}; expected a readable YAML file (--config)"
    hint = hint_at_missing(Path(path)) if isinstance(error, FileNotFoundError) else ""
    ending = f"; {hint}" if hint else ""
    return f"{where}: {error.strerror}; expected a readable YAML file (--config){ending}"


def _describe_syntax(error: yaml.MarkedYAMLError, where: str) -> str:
    mark = error.problem_mark or error.context_mark
    place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
    reason = ", ".join(part for part in (error.context, error.problem) if part)
    if "'\\t'" in reason:
        reason += ": this is a tab; indent by spaces"
    return f"{where}{place}: not YAML: {reason}"
