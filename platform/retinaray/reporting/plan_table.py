"""What a job will take, as a table for people and as plain values for machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from retinaray.reporting.columns import add_tail, wrap_text
from retinaray.terminal import line_width

_BYTES = "_bytes"
_SCALES = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


@dataclass(frozen=True)
class PlanFigure:
    """One line of a plan.

    Attributes:
        section: What it belongs to, such as "workers".
        name: In snake case with its unit; names that end in `_bytes` are shown in KiB to TiB.
        value: The figure.
        is_estimate: It rests on an assumption, or on arithmetic that leaves something out.
        note: How it was found, or what it means.
    """

    section: str
    name: str
    value: float | str
    is_estimate: bool = False
    note: str = ""


@dataclass
class PlanSheet:
    """Everything that is known of a job before it starts.

    Attributes:
        verb: Which command it is.
        figures: In their order; a table puts those of one section together.
        missing: One line for each reason why it would not run, or not as it was meant.
    """

    verb: str
    figures: list[PlanFigure] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def add(self, section: str, name: str, value: float | str, note: str = "") -> None:
        """Add a figure that is exact."""
        self.figures.append(PlanFigure(section, name, value, note=note))

    def estimate(self, section: str, name: str, value: float | str, note: str = "") -> None:
        """Add a figure that is an estimate."""
        self.figures.append(PlanFigure(section, name, value, is_estimate=True, note=note))

    def miss(self, text: str) -> None:
        """Add a reason why the job would not run; one that is there already is not repeated."""
        if text not in self.missing:
            self.missing.append(text)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: figures and notes by section and name, and which are estimates."""
        figures: dict[str, dict[str, float | str]] = {}
        for figure in self.figures:
            figures.setdefault(figure.section, {})[figure.name] = figure.value
        return {
            "verb": self.verb,
            "fits": not self.missing,
            "missing": list(self.missing),
            "figures": figures,
            "estimates": [f"{f.section}.{f.name}" for f in self.figures if f.is_estimate],
            "notes": {f"{f.section}.{f.name}": f.note for f in self.figures if f.note},
        }


def render_plan(sheet: PlanSheet) -> str:
    """A table by section, `~` before estimates, then what is missing.

    On a terminal notes stand below their figure where they do not fit beside it.
    """
    columns = line_width()
    labels = {id(figure): _label(figure.name) for figure in sheet.figures}
    width = max(map(len, labels.values()), default=0)
    values = {id(figure): format_figure(figure) for figure in sheet.figures}
    value_width = max(map(len, values.values()), default=0)
    lines = []
    for section in dict.fromkeys(figure.section for figure in sheet.figures):
        lines.append(section)
        for figure in sheet.figures:
            if figure.section == section:
                value = ("~" if figure.is_estimate else "") + values[id(figure)]
                label = labels[id(figure)]
                line = f"  {label:<{width}}  {value:>{value_width + 1}}"
                lines += add_tail(line, figure.note, columns)
    if any(figure.is_estimate for figure in sheet.figures):
        lines.append("~ is an estimate; the others are exact")
    return "\n".join([*lines, *_render_verdict(sheet.missing)])


def format_figure(figure: PlanFigure) -> str:
    """A value as text: bytes in binary units, whole numbers with commas, others in four digits."""
    value = figure.value
    if isinstance(value, str):
        return value
    if figure.name.endswith(_BYTES):
        return format_bytes(value)
    return f"{value:,d}" if isinstance(value, int) else f"{value:,.4g}"


def format_bytes(num_bytes: float) -> str:
    """Bytes in the largest unit of which there is one at least: 1.5 GiB, 320 MiB, 12 bytes."""
    for unit, size in _SCALES:
        if num_bytes >= size:
            return f"{num_bytes / size:,.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


def _label(name: str) -> str:
    return name.removesuffix(_BYTES).replace("_", " ")


def _render_verdict(missing: Sequence[str]) -> list[str]:
    if not missing:
        return ["fits"]
    lines = [f"{len(missing)} missing"]
    for text in missing:
        lines += wrap_text(text, line_width(), first="  - ", rest="    ")
    return lines
