"""One process with a batch of 8 and two processes with 4 each take the same step.

Run as a script, this file is one of the two processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from retinaray.data.batching import Batch
from retinaray.detector.retinanet import RetinaNet
from retinaray.training.step import LossSettings, make_optimizer, take_step

NUM_BOXES = (5, 4, 3, 2, 1, 0, 0, 0)  # the second process has nearly nothing


def make_share(first: int, last: int) -> Batch:
    """Images `first` to `last` of eight; padded to the most boxes of that share only."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, generator=generator)
    corners = torch.rand(8, 5, 2, generator=generator) * 40
    sides = 10 + torch.rand(8, 5, 2, generator=generator) * 30
    boxes = torch.cat((corners, corners + sides), dim=-1)
    classes = torch.randint(0, 3, (8, 5), generator=generator)
    counts = torch.tensor(NUM_BOXES)
    most = max(1, max(NUM_BOXES[first:last]))
    rows = slice(first, last)
    is_valid = torch.arange(most) < counts[rows, None]
    return Batch(
        images=images[rows],
        boxes_xyxy=boxes[rows, :most],
        class_indices=classes[rows, :most],
        is_valid=is_valid,
        is_crowd=torch.zeros_like(is_valid),
        image_ids=tuple(range(first, last)),
    )


def step_and_collect(batch: Batch, world_size: int) -> dict[str, torch.Tensor]:
    """Gradients and new weights after one step, and what the step reports."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = RetinaNet(
        backbone="ResNet10FPN", num_classes=3, norm="gn", fpn_channels=16, head_depth=0
    ).train()
    optimizer = make_optimizer(model, kind="sgd", learning_rate=0.1, weight_decay=0.0)
    wrapped = model
    if world_size > 1:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    result = take_step(
        wrapped,
        optimizer,
        batch,
        anchors_xyxy=model.anchors_for(batch.images),
        settings=LossSettings(),
        learning_rate=0.1,
        clip_norm=0.0,
        autocast_dtype=None,
    )
    values = {f"grad.{name}": p.grad.clone() for name, p in model.named_parameters()}
    values |= {f"weight.{name}": p.detach() for name, p in model.named_parameters()}
    return values | {
        "class_loss": result.class_loss,
        "box_loss": result.box_loss,
        "num_foreground": result.num_foreground,
        "norm": result.gradient_norm,
    }


def run_rank(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    values = step_and_collect(make_share(4 * rank, 4 * rank + 4), world_size=2)
    torch.save(values, folder / f"rank{rank}.pth")
    torch.distributed.destroy_process_group()


def test_take_step_is_the_same_when_two_processes_share_the_batch(
    tmp_path: Path, one_thread: None
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    expected = step_and_collect(make_share(0, 8), world_size=1)
    for rank in ranks:
        _, stderr = rank.communicate(timeout=300)
        assert rank.returncode == 0, stderr
    shares = [torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in range(2)]
    for key, value in expected.items():
        if key.startswith(("grad.", "weight.")) or key in ("num_foreground", "norm"):
            for share in shares:
                torch.testing.assert_close(share[key], value, rtol=1e-5, atol=1e-5, msg=key)
        else:
            torch.testing.assert_close(shares[0][key] + shares[1][key], value, rtol=1e-5, atol=0)
    largest = max(value.abs().max() for key, value in expected.items() if "grad." in key)
    assert largest > 1e-2  # so that 1e-5 means something


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
