from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from retinaray.distributed.reporting import EventBoard, follow_events

pytestmark = [pytest.mark.local_ray, pytest.mark.usefixtures("ray_cluster")]


def _post_all(board: Any, numbers: range) -> None:
    for number in numbers:
        board.post.remote({"number": number})


def test_event_board_gives_each_event_once() -> None:
    board = EventBoard()
    board.post({"number": 1})
    board.post({"number": 2})
    assert board.collect() == [{"number": 1}, {"number": 2}]
    assert board.collect() == []


def test_follow_events_handles_all_events_in_order_before_the_block_ends(
    wait_until: Callable[[Callable[[], object], str], None],
) -> None:
    seen: list[int] = []
    with follow_events(lambda event: seen.append(event["number"])) as board:
        _post_all(board, range(100))
        wait_until(lambda: len(seen) == 100, "events that arrive while the block runs")
        _post_all(board, range(100, 300))
    assert seen == list(range(300))


def test_follow_events_hands_events_of_workers_to_the_driver() -> None:
    @ray.remote(num_cpus=0)
    def work(board: Any) -> None:
        ray.get(board.post.remote({"number": 7}))

    seen: list[int] = []
    with follow_events(lambda event: seen.append(event["number"])) as board:
        ray.get(work.remote(board))
    assert seen == [7]


def test_follow_events_raises_what_the_handler_raised_while_the_block_ran(
    wait_until: Callable[[Callable[[], object], str], None],
) -> None:
    calls: list[int] = []

    def fail(event: dict[str, Any]) -> None:
        calls.append(event["number"])
        raise OSError("no space left for the log")

    boards: list[Any] = []

    def run() -> None:
        with follow_events(fail) as board:
            boards.append(board)
            _post_all(board, range(1))
            wait_until(lambda: calls, "the handler's call")

    with pytest.raises(OSError, match="no space left"):
        run()
    assert calls == [0]
    wait_until(lambda: _is_gone(boards[0]), "the mailbox's end")


def test_follow_events_raises_what_the_handler_raised_at_the_end(
    wait_until: Callable[[Callable[[], object], str], None],
) -> None:
    def fail(event: dict[str, Any]) -> None:
        raise OSError(f"cannot write event {event['number']}")

    with pytest.raises(OSError, match="cannot write event 0"), follow_events(fail) as board:
        ray.get(board.post.remote({"number": 0}))
    wait_until(lambda: _is_gone(board), "the mailbox's end")


def test_follow_events_keeps_the_error_of_its_block_and_kills_the_mailbox(
    wait_until: Callable[[Callable[[], object], str], None],
) -> None:
    seen: list[int] = []
    boards: list[Any] = []

    def run() -> None:
        with follow_events(lambda event: seen.append(event["number"])) as board:
            boards.append(board)
            _post_all(board, range(3))
            raise KeyError("training")

    with pytest.raises(KeyError, match="training"):
        run()
    assert seen == [0, 1, 2]
    wait_until(lambda: _is_gone(boards[0]), "the mailbox's end")


def _is_gone(board: Any) -> bool:
    # ray.kill does not wait: the actor may answer once more.
    try:
        ray.get(board.collect.remote(), timeout=60)
    except RayActorError:
        return True
    return False
