"""Weak scaling of the training step from one process to two, each on a core of its own.

    python tests/benchmarks/weak_scaling.py [--quick]

Every process takes steps over a batch of its own, so two do twice the work of one in, at best, the
same time. Three settings take turns:

- alone: one process, the other core idle.
- side_by_side: two processes that know nothing of each other: what they take from each other is the
  machine's (memory bandwidth, cache, clock), and no exchange can win it back.
- together: two processes with DistributedDataParallel over gloo: what is lost against side_by_side
  is the exchange of gradients and the wait for each other.

A ratio `times_as_fast_as_alone` of `together` is the weak scaling efficiency.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import socket
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from run import Record, make_records, skip, time_rounds
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from retinaray.detector.retinanet import RetinaNet
from retinaray.machine import count_cores
from retinaray.training.batch_loss import LossSettings
from retinaray.training.optimizer import make_optimizer
from retinaray.training.step import TrainingStep

train_step = importlib.import_module("train_step")
NUM_PROCESSES = 2


@dataclass(frozen=True)
class Setting:
    """What each process does.

    Attributes:
        side_px: Height and width of its images.
        num_images: Images of its batch.
        num_rounds: Rounds that count.
        backbone: Network; three classes, a pyramid of 128 channels.
    """

    side_px: int = 384
    num_images: int = 4
    num_rounds: int = 9
    backbone: str = "ResNet18FPN"


def run(quick: bool = False) -> list[Record]:
    """Measure the three settings; nothing where there are fewer than two cores."""
    if count_cores() < NUM_PROCESSES:
        return [skip("weak_scaling", f"needs {NUM_PROCESSES} cores, there is {count_cores()}")]
    setting = Setting(128, 2, 1) if quick else Setting()
    with Group(setting, is_joined=False) as apart, Group(setting, is_joined=True) as joined:
        rounds = time_rounds(
            {
                "alone": lambda: apart.take_step(1),
                "side_by_side": lambda: apart.take_step(NUM_PROCESSES),
                "together": lambda: joined.take_step(NUM_PROCESSES),
            },
            num_rounds=setting.num_rounds,
            num_warmup=2,
        )
        weights = joined.read_weights()
    assert weights[0] == weights[1], "two workers with the same gradients have other weights"
    return make_records(
        "weak_scaling",
        rounds,
        unit="ms/step",
        convert=lambda seconds: 1000 * seconds,
        baselines={"side_by_side": ("alone",), "together": ("alone", "side_by_side")},
        checked="losses finite; both workers' weights equal in the end, though their data differ",
        config=asdict(setting) | {"processes": NUM_PROCESSES, "backend": "gloo", "dtype": "bf16"},
    )


class Group:
    """Processes that take a step when they are told to.

    Args:
        setting: What each does.
        is_joined: Whether they train one network, or each its own.
    """

    def __init__(self, setting: Setting, *, is_joined: bool) -> None:
        port = _find_port() if is_joined else None
        context = torch.multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank, core in enumerate(sorted(os.sched_getaffinity(0))[:NUM_PROCESSES]):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=work, args=(theirs, setting, rank, core, port), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.send("stop")
        for process in self._processes:
            process.join()

    def take_step(self, count: int) -> float:
        """A step of the first processes, at the same time; gives their mean loss."""
        for pipe in self._pipes[:count]:
            pipe.send("step")
        return statistics.mean(pipe.recv() for pipe in self._pipes[:count])

    def read_weights(self) -> list[float]:
        """A sum over the weights of each process."""
        for pipe in self._pipes:
            pipe.send("weights")
        return [pipe.recv() for pipe in self._pipes]


def _find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def work(pipe: Connection, setting: Setting, rank: int, core: int, port: int | None) -> None:
    """The life of one process."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    if port is not None:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=NUM_PROCESSES,
        )
    model, step = make_step(setting, rank, is_joined=port is not None)
    while (order := pipe.recv()) != "stop":
        if order == "step":
            pipe.send(step())
        else:
            pipe.send(sum(float(value.double().sum()) for value in model.state_dict().values()))
    if port is not None:
        torch.distributed.destroy_process_group()


def make_step(
    setting: Setting, rank: int, *, is_joined: bool
) -> tuple[RetinaNet, Callable[[], float]]:
    """A network, and its next step over this process's own batch."""
    torch.manual_seed(0)
    model = RetinaNet(backbone=setting.backbone, num_classes=3, norm="gn", fpn_channels=128)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shape = train_step.Setting(setting.side_px, setting.num_images, 1, num_classes=3)
    batch = train_step.make_batch(shape, torch.device("cpu"), seed=rank)
    wrapped: nn.Module = (
        DistributedDataParallel(model, gradient_as_bucket_view=True) if is_joined else model
    )
    optimizer = make_optimizer(model, kind="adamw", learning_rate=1e-5, weight_decay=0.05)
    step = TrainingStep(
        wrapped,
        optimizer,
        loss=LossSettings(),
        clip_norm=10.0,
        autocast_dtype=torch.bfloat16,
    )
    anchors = model.anchors_for(batch.images)

    def take() -> float:
        result = step.take(batch, anchors_xyxy=anchors, learning_rate=1e-5)
        assert bool(result.is_finite)
        return float(result.class_loss + result.box_loss)

    return model, take


def main(argv: Sequence[str] | None = None) -> None:
    """Print the records of this case alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small images, one round")
    records: list[dict[str, Any]] = run(parser.parse_args(argv).quick)
    for record in records:
        print(json.dumps(record))


if __name__ == "__main__":
    main()
