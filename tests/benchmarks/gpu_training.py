"""Images per second of the training step on one GPU, against torchvision's RetinaNet.

    python tests/benchmarks/run.py gpu_training

ResNet18 and ResNet50 at 800x800 in bf16 with ImageNet's frozen norms, 80 classes, AdamW, clipping:

- ours: the step as `retinaray train` takes it.
- ours_compiled: the same with `--compile`.
- torchvision: its RetinaNet with the same layers, optimizer and bf16, channels last, without its
  resizing.
- bare: forward and backward of our network alone, the sum of its outputs for a loss.

The goals are 1.5 times torchvision, and 350 images per second for ResNet50 on an H100 or H200.
Images are on the device before the clock runs: what decoding takes is `train_input`'s matter.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from run import Record, make_records, skip, time_rounds
from torch import Tensor

train_step = importlib.import_module("train_step")
# Steps per round: one alone is too short for a clock beside a queue of kernels.
STEPS = 5


def run(quick: bool = False) -> list[Record]:
    """Measure both backbones; nothing without a GPU."""
    if not torch.cuda.is_available():
        return [skip("gpu_training", "needs a CUDA device")]
    # As a training's workers set it: every step has the same shapes.
    torch.backends.cudnn.benchmark = True
    setting = train_step.Setting(256, 2, 1) if quick else train_step.Setting(800, 16, 9)
    return [
        record
        for backbone in train_step.BACKBONES
        for record in measure(backbone, setting, torch.device("cuda"))
    ]


def measure(backbone: str, setting: Any, device: torch.device) -> list[Record]:
    """All competitors of one backbone, in images per second."""
    torch.manual_seed(0)
    batch = train_step.make_batch(setting, device)
    ours = train_step.make_ours(backbone, setting, batch)
    compiled = train_step.make_ours(backbone, setting, batch, is_compiled=True)
    theirs = train_step.make_torchvision("torchvision", backbone, setting, batch, is_same=True)
    rounds = time_rounds(
        {
            "ours": repeat(ours["ours"]),
            "ours_compiled": repeat(compiled["ours"]),
            "torchvision": repeat(theirs["torchvision"]),
            "bare": repeat(ours["bare"]),
        },
        num_rounds=setting.num_rounds,
        num_warmup=2,
    )
    losses = {name: float(loss) for name, loss in rounds.outputs.items()}
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses.values()), losses
    num_images = STEPS * setting.num_images
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    baselines = ("torchvision", "bare")
    return make_records(
        f"gpu_training/{backbone}",
        rounds,
        unit="img/s",
        convert=lambda seconds: num_images / seconds,
        baselines={"ours": baselines, "ours_compiled": baselines},
        checked="all losses and our gradients finite",
        config=train_step.describe(setting, batch)
        | {"backbone": backbone, "dtype": "bf16", "peak_gib_of_all": peak_gib},
    )


def repeat(compete: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Some steps, timed until the device has finished."""

    def run_steps() -> Tensor:
        for _ in range(STEPS):
            loss = compete()
        if loss.is_cuda:
            torch.cuda.synchronize()
        return loss

    return run_steps
