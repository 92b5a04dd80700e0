"""What the rehearsal found, for people and for machines."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_TEXT_WIDTH = 44


@dataclass(frozen=True)
class Row:
    """One scenario.

    Attributes:
        scenario: Its name, as `--only` takes it.
        done: What was done to the cluster.
        survived: What was there afterwards; of a failure, what was expected and what came.
        recovery_s: From the disturbance until work went on; None where nothing had to recover.
        seconds: Wall time of the scenario, the start of its nodes included.
        passed: Whether everything that was asserted held.
    """

    scenario: str
    done: str
    survived: str
    recovery_s: float | None
    seconds: float
    passed: bool


def format_table(rows: Sequence[Row]) -> str:
    """A table in plain text, long cells folded; one line of totals at the end."""
    header = ("scenario", "what was done", "what survived", "recovery", "took", "result")
    cells = [header, *map(_to_cells, rows)]
    folded = [[textwrap.wrap(cell, _TEXT_WIDTH) or [""] for cell in row] for row in cells]
    widths = [max(len(line) for row in folded for line in row[column]) for column in range(6)]
    lines: list[str] = []
    for number, row in enumerate(folded):
        for index in range(max(map(len, row))):
            parts = [cell[index] if index < len(cell) else "" for cell in row]
            lines.append(
                "  ".join(f"{part:<{width}}" for part, width in zip(parts, widths, strict=True))
            )
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    num_passed = sum(row.passed for row in rows)
    total = sum(row.seconds for row in rows)
    lines.append(f"{num_passed} of {len(rows)} scenarios passed in {total:.0f} s")
    return "\n".join(line.rstrip() for line in lines)


def write_json(rows: Sequence[Row], path: Path, *, has_namespaces: bool) -> None:
    """Write the rows and how nodes were kept apart as one JSON document."""
    content = {
        "has_namespaces": has_namespaces,
        "passed": all(row.passed for row in rows),
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _to_cells(row: Row) -> tuple[str, ...]:
    recovery = "" if row.recovery_s is None else f"{row.recovery_s:.0f} s"
    result = "PASS" if row.passed else "FAIL"
    return (row.scenario, row.done, row.survived, recovery, f"{row.seconds:.0f} s", result)
