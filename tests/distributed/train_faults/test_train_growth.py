"""When a training is given more workers: its policy with Ray's own looks, but no Ray that runs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError
from ray.train.v2._internal.execution.scaling_policy import (
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    elastic,
)

from retinaray.distributed import elastic_scaling
from retinaray.distributed.elastic_scaling import BatchScalingPolicy, make_scaling
from retinaray.distributed.reporting import EventBoard

LOOK_S = 10.0
LIMIT_S = 300.0


class _Handle:
    """Calls the mailbox as an actor is called, at once."""

    def __init__(self, board: EventBoard) -> None:
        self._board = board

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._board, name))


class _Room(BatchScalingPolicy):
    """The policy where a test says what is reserved: nodes of one processor; None = unknown."""

    num_nodes: int | None = 1

    def _maybe_send_resource_request(self) -> None:
        return

    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        if self.num_nodes is None:
            return None
        return {f"node{n}": {"CPU": 1.0} for n in range(self.num_nodes)}


class _Training:
    """Two workers of at most four, watched by a policy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.board = EventBoard()
        monkeypatch.setattr(elastic, "time_monotonic", lambda: self.now)
        monkeypatch.setattr(elastic_scaling.ray, "get", lambda answer, **_: answer)
        self.policy = _Room(
            make_scaling(4, 1, resources={"CPU": 1.0}),
            num_shares=4,
            board=_Handle(self.board),
            clock=lambda: self.now,
        )
        self.policy.num_nodes = 2
        self._started_s = 0.0
        self.post("running", 1)

    def post(self, kind: str, step: int) -> None:
        self.board.post({"kind": kind, "step": step})

    def poll(self, *, after_s: float) -> ScalingDecision:
        """What Ray's controller hears so much later."""
        self.now += after_s
        state = SimpleNamespace(start_time=self._started_s, num_workers=2)
        return self.policy.make_decision_for_running_worker_group(state, None)

    def look(self, num_nodes: int | None) -> int | None:
        """The number of workers decided on at the next look at so many nodes; None = as it is."""
        self.policy.num_nodes = num_nodes
        decision = self.poll(after_s=LOOK_S)
        if isinstance(decision, ResizeDecision):
            return decision.num_workers
        assert isinstance(decision, NoopDecision)
        return None

    def restart(self) -> ScalingDecision:
        """A worker was lost: the group begins again."""
        self._started_s = self.now
        return self.policy.make_decision_for_non_running_worker_group()

    def count_orders(self) -> int:
        return self.board.read_orders().num_checkpoints

    def list_waits(self) -> list[float]:
        return [event["seconds"] for event in self.board.collect() if event["kind"] == "late"]


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> _Training:
    return _Training(monkeypatch)


def test_policy_grows_after_the_checkpoint_is_reported(training: _Training) -> None:
    assert training.look(4) is None
    assert training.count_orders() == 1
    assert [training.look(4) for _ in range(3)] == [None, None, None]
    training.post("checkpoint", 9)
    assert training.look(4) == 4
    assert training.count_orders() == 1
    assert not training.list_waits()


def test_policy_takes_no_checkpoint_that_was_under_way_before_the_order(
    training: _Training,
) -> None:
    training.post("progress", 100)
    assert training.look(4) is None
    training.post("checkpoint", 60)
    assert training.look(4) is None
    # The step that was last reported may be the one that is kept.
    training.post("checkpoint", 100)
    assert training.look(4) == 4


def test_policy_takes_no_checkpoint_that_was_reported_before_the_order(
    training: _Training,
) -> None:
    training.post("checkpoint", 5)
    assert training.look(4) is None
    assert training.look(4) is None


def test_policy_grows_without_a_checkpoint_after_the_limit(training: _Training) -> None:
    assert training.look(4) is None
    looks = [training.look(4) for _ in range(int(LIMIT_S / LOOK_S))]
    assert looks == [None] * (len(looks) - 1) + [4]
    assert training.list_waits() == [LIMIT_S]
    assert training.count_orders() == 1


def test_policy_waits_for_its_limit_when_the_board_does_not_answer(
    training: _Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(answer: object, timeout: float) -> object:
        raise GetTimeoutError(f"{answer} after {timeout} s")

    monkeypatch.setattr(elastic_scaling.ray, "get", refuse)
    assert training.look(4) is None
    training.post("checkpoint", 9)
    assert training.look(4) is None
    training.now += LIMIT_S - 2 * LOOK_S
    assert training.look(4) == 4


def _lose_room(training: _Training) -> None:
    assert training.look(2) is None


def _lose_too_much_room(training: _Training) -> None:
    assert training.look(0) is None


def _lose_a_worker(training: _Training) -> None:
    decision = training.restart()
    assert isinstance(decision, ResizeDecision)
    training.post("running", 3)


@pytest.mark.parametrize("interrupt", [_lose_room, _lose_too_much_room, _lose_a_worker])
def test_policy_asks_again_when_room_comes_after(
    training: _Training, interrupt: Callable[[_Training], None]
) -> None:
    assert training.look(4) is None
    training.post("checkpoint", 9)
    interrupt(training)
    num_orders = training.count_orders()
    assert training.look(4) is None
    assert training.count_orders() == num_orders + 1
    training.post("progress", 50)
    training.post("checkpoint", 53)
    assert training.look(4) == 4


def test_policy_keeps_its_order_between_looks_and_when_room_is_unknown(
    training: _Training,
) -> None:
    assert training.look(4) is None
    assert isinstance(training.poll(after_s=2.0), NoopDecision)
    assert training.look(None) is None
    training.post("checkpoint", 9)
    assert training.look(4) == 4
    assert training.count_orders() == 1


def test_policy_grows_as_soon_as_the_checkpoint_is_reported(training: _Training) -> None:
    assert training.look(4) is None
    assert isinstance(training.poll(after_s=2.0), NoopDecision)
    training.post("checkpoint", 9)
    # Each step until the next look would be taken twice.
    decision = training.poll(after_s=2.0)
    assert isinstance(decision, ResizeDecision)
    assert decision.num_workers == 4
    assert isinstance(training.poll(after_s=2.0), NoopDecision)


def test_policy_shrinks_at_once(training: _Training) -> None:
    assert training.look(1) == 1
    assert training.count_orders() == 0


def test_policy_shrinks_at_once_after_an_order(training: _Training) -> None:
    assert training.look(4) is None
    assert training.look(1) == 1
    # The order was for growing; what comes next needs another.
    training.post("checkpoint", 9)
    assert training.look(4) is None
    assert training.count_orders() == 2


def test_event_board_renews_an_order_for_workers_that_begin_after_it() -> None:
    board = EventBoard()
    board.post({"kind": "progress", "step": 200})
    board.ask_for_checkpoint()
    # They went on from an older checkpoint: their steps count, not those before.
    board.post({"kind": "running", "step": 101})
    assert board.read_orders().num_checkpoints == 2
    assert not board.has_checkpoint()
    board.post({"kind": "checkpoint", "step": 104})
    assert board.has_checkpoint()
    board.post({"kind": "running", "step": 105})
    assert board.read_orders().num_checkpoints == 2
