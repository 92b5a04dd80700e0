"""The trials of a sweep as a leaderboard for people and as columns for CSV and Parquet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from retinaray.reporting.columns import lay_out_table

_SHOWN_METRICS = ("AP", "AP50", "latency_ms")
_MAX_CELL = 28


def render_trials(rows: Sequence[Mapping[str, Any]], *, max_rows: int = 20) -> str:
    """The best trials first, in aligned columns; then each failed trial with its reason.

    Columns that a narrow terminal has no room for follow below.

    Args:
        rows: `trial`, `status`, `score`, `epoch`, `coverage`, metrics, `point.<key>` and `error`.
        max_rows: Trials shown at most; failed ones are shown all.
    """
    ranked = sorted(
        (row for row in rows if row["score"] is not None), key=lambda row: -row["score"]
    )
    keys = sorted({key for row in rows for key in row if key.startswith("point.")})
    header = ["rank", "trial", "status", "epoch", "score", *_SHOWN_METRICS, "coverage"]
    header += [key.removeprefix("point.") for key in keys]
    table = [header]
    for rank, row in enumerate(ranked[:max_rows], start=1):
        values = [rank, row["trial"], row["status"], row["epoch"], row["score"]]
        values += [row.get(name) for name in _SHOWN_METRICS]
        values += [row["coverage"], *(row.get(key) for key in keys)]
        table.append([_show(value) for value in values])
    lines = lay_out_table(table, num_left=len(header), num_keys=2)
    if len(ranked) > max_rows:
        lines.append(f"... and {len(ranked) - max_rows} more in trials.csv")
    unranked = [row for row in rows if row["score"] is None or row["error"]]
    lines += [
        f"{row['trial']}  {row['status']}  {row['error'] or 'stopped before its first validation'}"
        for row in unranked
    ]
    return "\n".join(lines)


def write_trials(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write trials.csv and trials.parquet: a row per trial, lists as JSON texts.

    Args:
        rows: At least one; keys may differ between rows.
        folder: Where to.
    """
    write_rows(rows, folder / "trials.csv")
    pyarrow.parquet.write_table(_make_table(rows), folder / "trials.parquet")


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows as CSV; at least one."""
    pyarrow.csv.write_csv(_make_table(rows), path)


def _make_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    names = list(dict.fromkeys(key for row in rows for key in row))
    return pa.table({name: _make_column([row.get(name) for row in rows]) for name in names})


def _make_column(values: list[Any]) -> pa.Array:
    plain = [
        json.dumps(value) if isinstance(value, (list, tuple, dict)) else value for value in values
    ]
    kinds = {type(value) for value in plain if value is not None}
    if kinds <= {int, float}:
        kind = pa.int64() if kinds == {int} else pa.float64()
        return pa.array(plain, type=kind)
    if kinds == {bool}:
        return pa.array(plain, type=pa.bool_())
    return pa.array([None if value is None else str(value) for value in plain], type=pa.string())


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        value = " ".join(_show(element) for element in value)
    text = str(value)
    return text if len(text) <= _MAX_CELL else f"{text[: _MAX_CELL - 3]}..."
