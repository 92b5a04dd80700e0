"""The files that a bundle is filled from: text with @PLACEHOLDERS@, each given exactly once."""

from __future__ import annotations

import re
from importlib import resources

_PLACEHOLDER = re.compile(r"@([A-Z][A-Z0-9_]*)@")


def read_template(name: str) -> str:
    """A file of templates/ as text."""
    folder = resources.files("retinaray.export.edge_bundle") / "templates"
    return (folder / name).read_text("utf-8")


def fill_template(name: str, values: dict[str, object]) -> str:
    """A template with its placeholders replaced.

    Args:
        name: File of templates/.
        values: Placeholder name, without the signs, to what stands there as text.

    Raises:
        ValueError: If a placeholder has no value or a value no placeholder.
    """
    text = read_template(name)
    wanted = set(_PLACEHOLDER.findall(text))
    if wanted != set(values):
        raise ValueError(
            f"template {name}: without a value {sorted(wanted - set(values))}, "
            f"without a placeholder {sorted(set(values) - wanted)}"
        )
    return _PLACEHOLDER.sub(lambda match: str(values[match[1]]), text)


def quote_shell(text: str) -> str:
    """A word of a shell script, whatever it holds."""
    return "'" + text.replace("'", "'\\''") + "'"
