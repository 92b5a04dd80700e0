"""Repeated keys are found wherever they stand, also when most keys wait in files."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable

import pytest

from retinaray.inference import repeat_check
from retinaray.inference.repeat_check import RepeatCheck


def find(keys: Iterable[bytes]) -> tuple[int, int] | None:
    check = RepeatCheck()
    for key in keys:
        check.add(key)
    return check.find()


@pytest.mark.parametrize("records_in_memory", [1, 7, 1000])
@pytest.mark.parametrize(
    ("keys", "pair"),
    [
        ([], None),
        ([b"a"], None),
        ([b"a", b"b", b"c"], None),
        ([b"a", b"a"], (0, 1)),
        ([b"a", b"b", b"c", b"b", b"a"], (1, 3)),  # the first repetition, not the first key
        ([b"x", b"a", b"a", b"a"], (1, 2)),
        ([b"", b"1", b'"1"', b""], (0, 3)),
    ],
)
def test_find_gives_the_first_repetition_and_where_it_stood_first(
    keys: list[bytes],
    pair: tuple[int, int] | None,
    records_in_memory: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(repeat_check, "_RECORDS_IN_MEMORY", records_in_memory)
    assert find(keys) == pair


def test_find_sees_a_repetition_among_many_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat_check, "_RECORDS_IN_MEMORY", 500)
    keys = [b"%d" % number for number in range(5000)]
    assert find(keys) is None
    assert find([*keys, b"4321"]) == (4321, 5000)


def test_add_takes_no_more_memory_when_there_are_more_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat_check, "_RECORDS_IN_MEMORY", 1000)

    def measure(count: int) -> int:
        tracemalloc.start()
        try:
            check = RepeatCheck()
            for number in range(count):
                check.add(b"%d" % number)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # Both have opened their files; 20,000 keys more would be 480,000 bytes.
    assert measure(22_000) < measure(2000) + 100_000
