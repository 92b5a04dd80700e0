"""Tables as lines: whole in a pipe, folded on a narrow terminal, never cut."""

from __future__ import annotations

import pytest

from retinaray.reporting import columns, plan_table
from retinaray.reporting.columns import add_tail, join_pieces, lay_out_table, wrap_text
from retinaray.reporting.plan_table import PlanSheet, render_plan

ROWS = [("class", "boxes", "AP", "AP50"), ("car", "12", "0.5", "0.75"), ("bus", "0")]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of twenty characters."""
    for module in (columns, plan_table):
        monkeypatch.setattr(module, "line_width", lambda: 20)


def test_lay_out_table_keeps_one_line_per_row_in_a_pipe() -> None:
    assert lay_out_table(ROWS, least=(6,), tails={2: "absent"}) == [
        "class   boxes   AP  AP50",
        "car        12  0.5  0.75",
        "bus         0  absent",
    ]


@pytest.mark.usefixtures("narrow")
def test_lay_out_table_puts_columns_below_when_the_terminal_is_narrow() -> None:
    # class, a gap, boxes, a gap, AP: 5 + 2 + 5 + 2 + 3 = 17; AP50 would need 6 more.
    assert lay_out_table(ROWS, tails={2: "absent from the ground truth"}) == [
        "class  boxes   AP",
        "car       12  0.5",
        "bus        0",
        "    absent from the",
        "    ground truth",
        "class  AP50",
        "car    0.75",
    ]


@pytest.mark.usefixtures("narrow")
def test_lay_out_table_shows_a_column_that_is_wider_than_the_terminal() -> None:
    long = "x" * 30
    assert lay_out_table([("a", "b", long)]) == ["a  b", f"a  {long}"]


@pytest.mark.usefixtures("narrow")
def test_lay_out_table_repeats_all_keys() -> None:
    rows = [("1", "trial_a", "running", "0.25")]
    assert lay_out_table(rows, num_left=4, num_keys=2) == [
        "1  trial_a  running",
        "1  trial_a  0.25",
    ]


def test_lay_out_table_takes_a_table_of_keys_alone() -> None:
    assert lay_out_table([("a",), ("bc",)]) == ["a", "bc"]


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (None, ["value  a note of it"]),
        (20, ["value  a note of it"]),
        (18, ["value", "    a note of it"]),
    ],
)
def test_add_tail_puts_it_below_when_it_does_not_fit(width: int | None, lines: list[str]) -> None:
    # 5 + 2 + 12 = 19 characters.
    assert add_tail("value", "a note of it", width) == lines


def test_wrap_text_keeps_paths_whole() -> None:
    path = "/a/very/long/path-with-hyphens/file.json"
    assert wrap_text(f"see {path} now", 20, first="- ") == ["- see", f"  {path}", "  now"]


@pytest.mark.usefixtures("narrow")
def test_join_pieces_begins_a_line_when_one_is_full() -> None:
    assert join_pieces(["AP 0.500", "AP50 0.500", "AP75 0.500"]) == [
        "AP 0.500  AP50 0.500",
        "AP75 0.500",
    ]


@pytest.mark.usefixtures("narrow")
def test_render_plan_wraps_notes_and_what_is_missing_when_the_terminal_is_narrow() -> None:
    sheet = PlanSheet("train")
    sheet.add("work", "steps", 12, "of 8 images each")
    sheet.miss("nodes: none of them has a GPU")
    assert render_plan(sheet).splitlines() == [
        "work",
        "  steps   12",
        "    of 8 images each",
        "1 missing",
        "  - nodes: none of",
        "    them has a GPU",
    ]
