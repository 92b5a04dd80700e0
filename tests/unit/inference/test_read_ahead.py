"""Order, errors and bounds of sequences that are read in the background."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator

import pytest

from retinaray.inference.read_ahead import chain_ahead


def count_up(number: int) -> Generator[tuple[int, int], None, None]:
    """As many values as the item says."""
    for index in range(number):
        yield number, index


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_chain_ahead_keeps_the_order_of_the_items(threads: int) -> None:
    items = [3, 0, 1000, 1, 0, 0, 257, 256]
    wanted = [pair for item in items for pair in count_up(item)]
    assert list(chain_ahead(items, count_up, threads=threads)) == wanted
    assert list(chain_ahead([], count_up, threads=threads)) == []


def test_chain_ahead_reads_the_next_items_while_the_first_is_not_done() -> None:
    begun = threading.Barrier(3)

    def wait_for_others(number: int) -> Generator[int, None, None]:
        begun.wait(timeout=60)
        yield number

    assert list(chain_ahead([1, 2, 3], wait_for_others, threads=3)) == [1, 2, 3]


def test_chain_ahead_draws_one_item_per_thread_and_few_values_ahead() -> None:
    drawn: list[int] = []
    num_values = 0
    full = threading.Event()

    def draw() -> Iterator[int]:
        for number in range(100):
            drawn.append(number)
            yield number

    def expand(number: int) -> Generator[int, None, None]:
        nonlocal num_values
        for index in range(10**6):
            if number == 0:
                num_values += 1
                if num_values == 5 * 256:
                    full.set()
            yield index

    values = chain_ahead(draw(), expand, threads=2)
    assert next(values) == 0
    assert full.wait(60)
    # One chunk with the caller, four in the queue, one in hand.
    assert num_values <= 6 * 256
    assert drawn == [0, 1]
    values.close()  # type: ignore[attr-defined]
    assert num_values <= 6 * 256


def test_chain_ahead_ends_its_threads_when_the_caller_stops() -> None:
    closed: list[int] = []

    def expand(number: int) -> Generator[int, None, None]:
        try:
            while True:
                yield number
        finally:
            closed.append(number)

    before = threading.active_count()
    values = chain_ahead(range(50), expand, threads=3)
    assert [next(values) for _ in range(300)] == [0] * 300
    values.close()  # type: ignore[attr-defined]
    assert sorted(closed) == [0, 1, 2]
    assert threading.active_count() == before


def test_chain_ahead_raises_in_the_place_of_the_value() -> None:
    def expand(number: int) -> Generator[int, None, None]:
        yield number
        if number == 1:
            raise KeyError("broken")

    values = chain_ahead(range(4), expand, threads=2)
    assert [next(values), next(values)] == [0, 1]
    with pytest.raises(KeyError, match="broken"):
        next(values)
