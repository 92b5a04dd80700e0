"""What a training decides by: signals, notices, events, numbers of workers."""

from __future__ import annotations

import json
import logging
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import FailureConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from retinaray.distributed.elastic_scaling import choose_num_workers
from retinaray.distributed.failure_policy import MendableFailurePolicy
from retinaray.distributed.notices import NoticeWatch
from retinaray.distributed.reporting import Orders
from retinaray.distributed.stop_signals import StopSignal, catch_signals, end_process
from retinaray.distributed.train_events import TrainEvents


@pytest.mark.parametrize(
    ("num_possible", "expected"), [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (7, 6), (30, 12)]
)
def test_choose_num_workers_divides_the_batch(num_possible: int, expected: int) -> None:
    assert choose_num_workers(num_possible, num_shares=12) == expected


def test_notice_watch_wants_one_checkpoint_per_order_and_several_while_notice_lasts() -> None:
    orders, now = [Orders(False, 3)], [0.0]
    left: list[float | None] = [None]
    watch = NoticeWatch(lambda: orders[0], measure_left=lambda: left[0], clock=lambda: now[0])
    watch.ask()
    # What was asked for before this worker began is not for it.
    assert not watch.wants_checkpoint()
    orders[0] = Orders(False, 4)
    watch.ask()
    assert watch.wants_checkpoint()
    watch.note_checkpoint()
    assert not watch.wants_checkpoint()
    left[0] = math.inf
    assert watch.wants_checkpoint()
    watch.note_checkpoint()
    now[0] = 19.0
    assert not watch.wants_checkpoint()
    now[0] = 20.0
    assert watch.wants_checkpoint()
    assert not watch.is_stopping
    orders[0] = Orders(True, 4)
    watch.ask()
    watch.note_checkpoint()
    assert watch.wants_checkpoint()
    assert watch.is_stopping


def test_notice_watch_wants_a_checkpoint_so_long_after_the_last_one_of_whatever_kind() -> None:
    now = [100.0]
    left: list[float | None] = [None]
    watch = NoticeWatch(None, measure_left=lambda: left[0], period_s=300.0, clock=lambda: now[0])
    wanted = []
    for seconds in (399.9, 400.0, 400.5):
        now[0] = seconds
        wanted.append(watch.wants_checkpoint())
    assert wanted == [False, True, True]
    # The vote takes some steps; the next period begins with the checkpoint.
    now[0] = 410.0
    watch.note_checkpoint()
    now[0] = 709.9
    assert not watch.wants_checkpoint()
    # A notice or a validation comes first, and begins a period too.
    left[0] = math.inf
    assert watch.wants_checkpoint()
    watch.note_checkpoint()
    left[0] = None
    now[0] = 1009.8
    assert not watch.wants_checkpoint()
    now[0] = 1010.0
    assert watch.wants_checkpoint()


def test_notice_watch_wants_nothing_by_the_clock_when_no_period_is_given() -> None:
    now = [0.0]
    watch = NoticeWatch(None, measure_left=lambda: None, clock=lambda: now[0])
    now[0] = 1e9
    assert not watch.wants_checkpoint()


def test_notice_watch_wants_a_last_checkpoint_while_there_is_time_to_write_it() -> None:
    now, end = [0.0], 50.0
    watch = NoticeWatch(None, measure_left=lambda: end - now[0], clock=lambda: now[0])
    kept = []
    for second in range(60):
        now[0] = float(second)
        if watch.wants_checkpoint():
            watch.note_checkpoint()
            kept.append(second)
    # At the notice, every twenty seconds, fifteen before the end; and for as long as it takes.
    assert kept == [0, 20, 35, 55]


def test_failure_policy_tells_of_a_machine_that_went_as_announced() -> None:
    told: list[dict[str, Any]] = []
    board = SimpleNamespace(post=SimpleNamespace(remote=told.append))
    policy = MendableFailurePolicy(FailureConfig(max_failures=0), board)
    notice = PreemptionInfo(deadline_ms=1, preempted_node_to_ranks={"a": [2], "b": [0, 1]})
    assert policy.make_decision(PreemptionError(notice)) is FailureDecision.RETRY
    assert told == [
        {"kind": "failure", "num_workers": 3, "reason": "their machine went as announced"}
    ]
    # Others are counted, and told of by Ray's own callback.
    lost = WorkerGroupError("lost", {0: RuntimeError("killed")})
    assert policy.make_decision(lost) is FailureDecision.RAISE
    assert len(told) == 1


def test_stop_signal_notes_the_first_and_ends_at_the_second(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stop = StopSignal()
    stop.note(signal.SIGTERM, None)
    assert stop.number == signal.SIGTERM
    assert "SIGTERM: a checkpoint is kept after the present step" in caplog.text
    with pytest.raises(SystemExit) as caught:
        stop.note(signal.SIGTERM, None)
    assert caught.value.code == 143
    with pytest.raises(KeyboardInterrupt):
        end_process(signal.SIGINT)


def test_catch_signals_puts_the_handlers_back() -> None:
    earlier = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with catch_signals() as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.number == signal.SIGINT
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == earlier


def test_train_events_tell_recoveries_and_skipped_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="retinaray")
    handled: list[Any] = []
    now = [100.0]
    events = TrainEvents(tmp_path, handled.append, clock=lambda: now[0])
    now[0] = 130.0
    # A new training is no recovery.
    events.handle({"kind": "running", "step": 1, "restored_step": 0, "num_workers": 2})
    assert events.is_running
    events.handle({"kind": "progress", "step": 9})
    events.handle({"kind": "checkpoint", "step": 6, "folder": "s3://b/step_00000006"})
    now[0] = 200.0
    events.handle({"kind": "failure", "num_workers": 2})
    assert not events.is_running
    now[0] = 205.0
    # The others of the group follow; the interruption began with the first.
    events.handle({"kind": "failure", "num_workers": 1})
    now[0] = 214.25
    events.handle({"kind": "running", "step": 7, "restored_step": 6, "num_workers": 2})
    events.handle({"kind": "skipped", "step": 8, "image_ids": [17, "a"]})
    events.handle({"kind": "skipped", "step": 8, "image_ids": [4]})
    events.handle({"kind": "refused", "reason": "step 6 is truncated"})
    events.handle({"kind": "late", "seconds": 300.4})
    recovery = {
        "kind": "recovery",
        "step": 7,
        "restored_step": 6,
        "seconds": 14.2,
        "lost_steps": 3,
        "num_workers": 2,
        "cause": "workers failed or were lost",
    }
    assert handled == [{"kind": "progress", "step": 9}, recovery]
    assert (events.recoveries, events.num_skipped_images) == ([14.2], 3)
    assert events.checkpoint is not None
    assert events.checkpoint["step"] == 6
    lines = (tmp_path / "skipped_images.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 8, "image_ids": [17, "a"]},
        {"step": 8, "image_ids": [4]},
    ]
    assert "the one before it is: step 6 is truncated" in caplog.text
    assert "no checkpoint within 300 s of asking for one: workers are added" in caplog.text


def test_train_events_count_a_change_of_workers_from_the_last_report(tmp_path: Path) -> None:
    handled: list[Any] = []
    now = [0.0]
    events = TrainEvents(tmp_path, handled.append, clock=lambda: now[0])
    events.handle({"kind": "running", "step": 1, "restored_step": 0, "num_workers": 1})
    now[0] = 50.0
    events.handle({"kind": "progress", "step": 8})
    now[0] = 71.5
    events.handle({"kind": "running", "step": 8, "restored_step": 7, "num_workers": 2})
    assert events.recoveries == [21.5]
    found = {key: handled[1][key] for key in ("num_workers", "lost_steps", "cause")}
    assert found == {"num_workers": 2, "lost_steps": 1, "cause": "the workers were changed"}


def test_train_events_count_a_restart_from_the_command(tmp_path: Path) -> None:
    handled: list[Any] = []
    now = [0.0]
    events = TrainEvents(tmp_path, handled.append, last_step=10, clock=lambda: now[0])
    now[0] = 33.0
    events.handle({"kind": "running", "step": 9, "restored_step": 8, "num_workers": 1})
    assert events.recoveries == [33.0]
    assert handled[0]["lost_steps"] == 2
    assert handled[0]["cause"] == "the command was started again"
