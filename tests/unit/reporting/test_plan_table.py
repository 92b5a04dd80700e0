"""A plan as a table and as plain values."""

from __future__ import annotations

import json

import pytest

from retinaray.reporting.plan_table import PlanSheet, format_bytes, render_plan


@pytest.fixture
def sheet() -> PlanSheet:
    """Two sections whose figures come in turns."""
    sheet = PlanSheet("train")
    sheet.add("work", "steps", 12345, "of 8 images")
    sheet.estimate("memory", "peak_bytes", 3 << 29)
    sheet.add("work", "epochs", 1.25)
    sheet.add("work", "canvas", "64x96")
    return sheet


def test_render_plan_marks_estimates_and_keeps_sections_together(sheet: PlanSheet) -> None:
    assert render_plan(sheet).splitlines() == [
        "work",
        "  steps     12,345  of 8 images",
        "  epochs      1.25",
        "  canvas     64x96",
        "memory",
        "  peak    ~1.5 GiB",
        "~ is an estimate; the others are exact",
        "fits",
    ]


def test_render_plan_ends_with_what_is_missing(sheet: PlanSheet) -> None:
    sheet.miss("too few GPUs")
    sheet.miss("no model")
    sheet.miss("too few GPUs")
    assert render_plan(sheet).splitlines()[-3:] == ["2 missing", "  - too few GPUs", "  - no model"]


def test_render_plan_says_that_nothing_is_missing_when_it_is_empty() -> None:
    assert render_plan(PlanSheet("train")) == "fits"


def test_to_dict_gives_plain_values_by_section(sheet: PlanSheet) -> None:
    sheet.miss("too few GPUs")
    values = json.loads(json.dumps(sheet.to_dict()))
    assert values == {
        "verb": "train",
        "fits": False,
        "missing": ["too few GPUs"],
        "figures": {
            "work": {"steps": 12345, "epochs": 1.25, "canvas": "64x96"},
            "memory": {"peak_bytes": 3 << 29},
        },
        "estimates": ["memory.peak_bytes"],
        "notes": {"work.steps": "of 8 images"},
    }


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1.5 * 2**20, "1.5 MiB"),
        (24 * 2**30, "24 GiB"),
        (2**40, "1 TiB"),
    ],
)
def test_format_bytes_takes_the_largest_unit(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text
