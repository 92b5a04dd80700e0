"""File names of ids that hold anything: plain, distinct, never a path."""

from __future__ import annotations

import re

import pytest

from retinaray.inference.picture_names import safe_name

ODD = ["", ".", "..", "../../etc/passwd", "/abs", "a/b", "a\\b", "a\0b", "é", "日本", "x" * 5000]
ODD += [
    "a b",
    " a",
    "a\n",
    ".hidden",
    "-rf",
    "CON?",
    "7",
    "-7",
    "a-0123456789ab",
    "%2e%2e%2f",
    "a:b",
]


@pytest.mark.parametrize("value", [7, -7, 0, 2**63, "a", "cat_1.final", "A-b", "x" * 80])
def test_safe_name_keeps_what_is_plain(value: int | str) -> None:
    assert safe_name(value) == str(value)


@pytest.mark.parametrize("value", [*ODD, 10**100])
def test_safe_name_makes_a_short_plain_name_of_anything(value: int | str) -> None:
    name = safe_name(value)
    assert re.fullmatch(r"[A-Za-z0-9_]+-[0-9a-f]{12}", name)
    assert len(name) <= 73
    assert safe_name(value) == name


def test_safe_name_tells_all_apart() -> None:
    values = [*ODD, 7, -7, "a_b", "a", "A", *(safe_name(value) for value in ODD)]
    assert len({safe_name(value) for value in values}) == len(values)
