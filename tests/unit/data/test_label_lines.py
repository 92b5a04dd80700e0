"""Lines that DeepStream gives back as they are, each different from all others."""

from __future__ import annotations

import pytest

from retinaray.data.coco import Category, CategoryTable
from retinaray.data.label_lines import label_lines


@pytest.mark.parametrize(
    ("names", "lines"),
    [
        (["RBC", "white cell", "Zelle ü"], ("RBC", "white cell", "Zelle ü")),
        (["a;b", "a\nb", "a\tb"], ("a,b", "a b", "a b (3)")),
        (["", "  "], ("class", "class (2)")),
        (["x", "x", "x (2)"], ("x", "x (2)", "x (2) (3)")),
        (["x (2)", "x", "x"], ("x (2)", "x", "x (3)")),
        (["x (3)", "x", "x"], ("x (3)", "x", "x (3)'")),
    ],
)
def test_label_lines_are_different_and_unbroken(names: list[str], lines: tuple[str, ...]) -> None:
    table = CategoryTable(tuple(Category(index, name) for index, name in enumerate(names, 1)))
    assert label_lines(table) == lines


def test_label_lines_fit_into_deepstreams_memory() -> None:
    # 128 bytes with the closing zero; a letter of two bytes must not be cut in half.
    table = CategoryTable((Category(1, "ü" * 64), Category(2, "ü" * 65), Category(3, "a" * 127)))
    lines = label_lines(table)
    assert lines == ("ü" * 63, "ü" * 61 + " (2)", "a" * 127)
    assert max(len(line.encode()) for line in lines) <= 127
