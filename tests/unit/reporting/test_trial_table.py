from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from retinaray.reporting.trial_table import render_trials, write_rows, write_trials


def _row(trial: str, score: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "trial": trial,
        "status": "done",
        "score": score,
        "epoch": 2.0,
        "point.anchors.base_scale": 2.5,
        "point.anchors.ratios": [1.0, 2.0],
        "AP": score,
        "AP50": None,
        "latency_ms": 12.345678,
        "coverage": 0.9,
        "error": "",
        **changes,
    }


def test_render_trials_ranks_by_score_and_aligns_columns() -> None:
    lines = render_trials([_row("a", 0.1), _row("b", 0.3)]).splitlines()
    assert lines[0].split() == [
        *("rank", "trial", "status", "epoch", "score", "AP", "AP50", "latency_ms", "coverage"),
        *("anchors.base_scale", "anchors.ratios"),
    ]
    assert [line.split()[:2] for line in lines[1:]] == [["1", "b"], ["2", "a"]]
    assert lines[1].index("b") == lines[2].index("a") == lines[0].index("trial")
    assert lines[1].split()[4:] == ["0.3", "0.3", "-", "12.35", "0.9", "2.5", "1", "2"]


def test_render_trials_lists_failures_with_their_reason() -> None:
    rows = [
        _row("a", 0.1),
        _row("b", None, status="failed", error="no such file: x"),
        _row("c", None, status="stopped"),
    ]
    lines = render_trials(rows).splitlines()
    assert "b  failed  no such file: x" in lines
    assert "c  stopped  stopped before its first validation" in lines


def test_render_trials_says_how_many_are_left_out() -> None:
    text = render_trials([_row(str(n), n / 100) for n in range(30)], max_rows=5)
    assert text.splitlines()[-1] == "... and 25 more in trials.csv"
    assert len(text.splitlines()) == 7


def test_write_trials_keeps_every_value(tmp_path: Path) -> None:
    rows = [_row("a", 0.1), _row("b", None, extra=True), _row("c", 1, extra=False)]
    write_trials(rows, tmp_path)
    read = pq.read_table(tmp_path / "trials.parquet").to_pylist()
    assert [row["score"] for row in read] == [0.1, None, 1.0]
    assert [json.loads(row["point.anchors.ratios"]) for row in read] == [[1.0, 2.0]] * 3
    assert [row["extra"] for row in read] == [None, True, False]
    assert [row["AP50"] for row in read] == [None] * 3
    with (tmp_path / "trials.csv").open(encoding="utf-8", newline="") as file:
        plain = list(csv.DictReader(file))
    assert [row["trial"] for row in plain] == ["a", "b", "c"]
    assert plain[1]["score"] == ""


def test_write_rows_writes_texts_beside_numbers_as_texts(tmp_path: Path) -> None:
    write_rows([{"value": 1}, {"value": "P2"}], tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text() == '"value"\n"1"\n"P2"\n'
