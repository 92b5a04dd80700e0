"""Memory in turns: never above the bound, in order, and the largest alone."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from retinaray.inference.byte_budget import ByteBudget


def test_take_waits_until_there_is_room() -> None:
    budget = ByteBudget(10)
    first, second = budget.take(6), budget.take(4)
    taken = threading.Event()

    def take_more() -> None:
        budget.take(5)
        taken.set()

    thread = threading.Thread(target=take_more)
    thread.start()
    second()
    # 6 + 5 are too many.
    assert not taken.wait(0.05)
    assert budget.used_bytes == 6
    first()
    assert taken.wait(60)
    thread.join()
    assert budget.used_bytes == 5


def test_take_gives_back_once_however_often_it_is_called() -> None:
    budget = ByteBudget(10)
    first, _ = budget.take(3), budget.take(4)
    first()
    first()
    assert budget.used_bytes == 4


def test_take_lets_one_through_that_is_larger_than_the_bound_when_nothing_is_taken() -> None:
    budget = ByteBudget(10)
    large = budget.take(1000)
    assert budget.used_bytes == 1000
    large()
    assert budget.used_bytes == 0


def test_take_keeps_to_the_bound_under_many_threads() -> None:
    budget, rng = ByteBudget(100), random.Random(1)
    sizes = [rng.choice([0, 1, 30, 60, 100, 150]) for _ in range(400)]
    lock, held, most_shared = threading.Lock(), [], []

    def use(size: int) -> None:
        give_back = budget.take(size)
        with lock:
            held.append(size)
            most_shared.append((sum(held), sum(one > 0 for one in held)))
        with lock:
            held.remove(size)
        give_back()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, sizes))
    assert len(most_shared) == 400
    assert all(total <= 100 or count == 1 for total, count in most_shared)
    assert budget.used_bytes == 0


def test_byte_budget_refuses_a_bound_below_one() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ByteBudget(0)
