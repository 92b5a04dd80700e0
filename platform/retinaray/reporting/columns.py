"""Tables as text: columns below each other, folded where the terminal is too narrow for them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from retinaray.terminal import line_width

_GAP = "  "
_TAIL_INDENT = "    "


def lay_out_table(
    rows: Sequence[Sequence[str]],
    *,
    num_left: int = 1,
    num_keys: int = 1,
    least: Sequence[int] = (),
    tails: Mapping[int, str] | None = None,
) -> list[str]:
    """Write rows of cells as lines, columns below each other.

    On a terminal that is too narrow the columns that do not fit follow as another table below, with
    the first columns again; nothing is cut. Elsewhere lines are as long as they are.

    Args:
        rows: Cells; a row may end early. At least one row, all with the key columns.
        num_left: So many columns stand flush left, the others flush right.
        num_keys: So many columns are repeated when the table is folded.
        least: Smallest width of the first columns.
        tails: Text behind a row, by the row's index.

    Returns:
        Lines without blanks at their ends.
    """
    width = line_width()
    num_columns = max(map(len, rows))
    widths = [*least, *[0] * (num_columns - len(least))]
    for row in rows:
        for index, cell in enumerate(row):
            widths[index] = max(widths[index], len(cell))
    lines = []
    for number, block in enumerate(_split_columns(widths, num_keys, width)):
        for index, row in enumerate(rows):
            # What a row has no cells for is not repeated below.
            if number and len(row) <= block[num_keys]:
                continue
            cells = [
                row[i].ljust(widths[i]) if i < num_left else row[i].rjust(widths[i])
                for i in block
                if i < len(row)
            ]
            tail = (tails or {}).get(index, "") if number == 0 else ""
            lines += add_tail(_GAP.join(cells).rstrip(), tail, width)
    return lines


def add_tail(line: str, tail: str, width: int | None) -> list[str]:
    """A line with a text behind it; the text stands below, wrapped, where it does not fit.

    Args:
        line: Stays whole.
        tail: Text; empty = none.
        width: Characters per line; None = any.
    """
    if not tail:
        return [line]
    if width is None or len(line) + len(_GAP) + len(tail) <= width:
        return [f"{line}{_GAP}{tail}"]
    return [line, *wrap_text(tail, width, first=_TAIL_INDENT, rest=_TAIL_INDENT)]


def wrap_text(text: str, width: int | None, *, first: str = "", rest: str = "  ") -> list[str]:
    """A sentence as lines, broken between words only; a word longer than a line stays whole.

    Args:
        text: One paragraph.
        width: Characters per line; None = any.
        first: What the first line begins with.
        rest: What the others begin with.
    """
    if width is None:
        return [first + text]
    return textwrap.wrap(
        text,
        max(width, len(rest) + 1, len(first) + 1),
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def join_pieces(pieces: Sequence[str]) -> list[str]:
    """Pieces with a gap between them, in as few lines as the terminal has room for."""
    width = line_width()
    lines: list[str] = []
    for piece in pieces:
        if lines and (width is None or len(lines[-1]) + len(_GAP) + len(piece) <= width):
            lines[-1] += _GAP + piece
        else:
            lines.append(piece)
    return lines


def _split_columns(widths: Sequence[int], num_keys: int, width: int | None) -> list[list[int]]:
    """Indices of the columns of each table: the keys, and at least one more."""
    keys = list(range(min(num_keys, len(widths))))
    others = list(range(len(keys), len(widths)))
    if width is None or not others:
        return [keys + others]
    blocks: list[list[int]] = []
    room = 0
    for index in others:
        needed = len(_GAP) + widths[index]
        if not blocks or room < needed:
            blocks.append([*keys])
            room = width - sum(widths[key] for key in keys) - len(_GAP) * (len(keys) - 1)
        blocks[-1].append(index)
        room -= needed
    return blocks
