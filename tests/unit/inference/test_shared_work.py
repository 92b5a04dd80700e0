"""Parts side by side in one process: turns in the engine, and the moments alone."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from retinaray.detector.postprocess import Detections
from retinaray.inference.part_turns import PartTurns
from retinaray.inference.shared_predictor import share_predictor

PATIENCE_S = 20.0


class _Engine:
    """Says so when two threads are in it at once."""

    backend, card, canvas = "none", None, (8, 8)

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0
        self.entered = threading.Event()
        self.may_go = threading.Event()

    def predict(self, images: Tensor) -> list[Detections]:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.entered.set()
        assert self.may_go.wait(PATIENCE_S)
        self.inside -= 1
        empty = torch.zeros(0)
        return [Detections(empty.reshape(0, 4), empty, empty.long()) for _ in images]


class _Stream(_Engine):
    def predict_batches(self, batches: Iterable[Tensor]) -> Iterator[list[Detections]]:
        for images in batches:
            yield self.predict(images)


def _start(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_share_predictor_lets_one_thread_in_at_a_time() -> None:
    engine = _Engine()
    shared = share_predictor(engine)  # type: ignore[arg-type]
    batch = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    threads = [_start(lambda: shared.predict(batch)) for _ in range(4)]
    assert engine.entered.wait(PATIENCE_S)
    engine.may_go.set()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert engine.most == 1
    assert shared.take_busy_s() > 0
    assert shared.take_busy_s() == 0


def test_share_predictor_streams_only_when_the_engine_does() -> None:
    assert not hasattr(share_predictor(_Engine()), "predict_batches")  # type: ignore[arg-type]
    engine = _Stream()
    engine.may_go.set()
    shared: Any = share_predictor(engine)  # type: ignore[arg-type]
    batches = [torch.zeros(size, 3, 8, 8, dtype=torch.uint8) for size in (2, 1)]
    assert [len(found) for found in shared.predict_batches(batches)] == [2, 1]


def test_share_predictor_does_not_count_the_wait_for_a_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    class Ticking(_Stream):
        def predict(self, images: Tensor) -> list[Detections]:
            now[0] += 2.0 * len(images)
            return []

    def batches() -> Iterator[Tensor]:
        for _ in range(3):
            now[0] += 5.0
            yield torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        now[0] += 7.0

    shared: Any = share_predictor(Ticking())  # type: ignore[arg-type]
    for _ in shared.predict_batches(batches()):
        now[0] += 11.0  # The caller's own time counts as little.
    assert shared.take_busy_s() == pytest.approx(6.0)


def test_part_turns_lets_parts_share_until_one_must_be_alone() -> None:
    turns = PartTurns()
    order: list[str] = []
    leave, is_alone = threading.Event(), threading.Event()

    def share(name: str) -> None:
        with turns.shared():
            order.append(name)

    def be_alone() -> None:
        with turns.alone():
            order.append("alone")
            is_alone.set()
            assert leave.wait(PATIENCE_S)
            order.append("left")

    with turns.shared():
        share("beside")
        lonely = _start(be_alone)
        # It cannot begin while this part is at work.
        assert not is_alone.wait(0.05)
    assert is_alone.wait(PATIENCE_S)
    late = _start(lambda: share("late"))
    leave.set()
    for thread in (lonely, late):
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert order == ["beside", "alone", "left", "late"]


def test_part_turns_goes_on_when_the_work_raises() -> None:
    turns = PartTurns()
    for turn in (turns.alone, turns.shared, turns.alone):
        with pytest.raises(ValueError, match="broken"), turn():
            raise ValueError("broken")
