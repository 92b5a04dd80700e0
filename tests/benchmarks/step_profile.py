"""Where the time of one training step goes, part by part.

    python tests/benchmarks/step_profile.py [--backbone ResNet50FPN] [--quick]

The step is cut where one part hands its tensors to the next, and each part is timed by itself, the
parts in turn; a last column is the part's share of their sum. `whole` is the same step uncut: what
the parts add up to beyond it is what the cuts cost. Same setting as train_step.py. A table goes to
stderr, JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from train_step import BACKBONES, CLIP_NORM, LEARNING_RATE, Setting, make_batch

from retinaray.detector.retinanet import RetinaNet
from retinaray.training.batch_loss import LossSettings, match_batch, sum_losses
from retinaray.training.optimizer import make_optimizer, update_weights
from retinaray.training.step import TrainingStep
from retinaray.training.weight_average import WeightAverage

PARTS = (
    *("backbone forward", "pyramid forward", "heads forward", "matching", "losses and gradients"),
    *("heads backward", "pyramid backward", "backbone backward"),
    *("norm and clipping", "optimizer", "average of weights"),
)


class Stopwatch:
    """Seconds of each part, by name, over all rounds."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._begin = 0.0

    def start(self) -> None:
        """Begin with the first part."""
        self._begin = self._read()

    def lap(self, part: str) -> None:
        """End a part and begin the next."""
        now = self._read()
        self.seconds.setdefault(part, []).append(now - self._begin)
        self._begin = now

    def _read(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class CutStep:
    """A training step that stops between its parts."""

    def __init__(self, backbone: str, setting: Setting, device: torch.device) -> None:
        self.batch = make_batch(setting, device)
        self.model = RetinaNet(backbone=backbone, num_classes=setting.num_classes, norm="frozen_bn")
        self.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.train()
        self.optimizer = make_optimizer(
            self.model, kind="adamw", learning_rate=LEARNING_RATE, weight_decay=0.05
        )
        self.average = WeightAverage(self.model, decay=0.999)
        self.anchors = self.model.anchors_for(self.batch.images)
        self.settings = LossSettings()

    def take_whole(self, watch: Stopwatch) -> None:
        """The step as a training takes it."""
        step = TrainingStep(
            self.model,
            self.optimizer,
            loss=self.settings,
            clip_norm=CLIP_NORM,
            autocast_dtype=torch.bfloat16,
        )
        watch.start()
        result = step.take(self.batch, anchors_xyxy=self.anchors, learning_rate=LEARNING_RATE)
        self.average.update(self.model, 0, is_finite=result.is_finite)
        watch.lap("whole")

    def take(self, watch: Stopwatch) -> None:
        """The same, part by part."""
        model, batch = self.model, self.batch
        self.optimizer.zero_grad(set_to_none=True)
        watch.start()
        with torch.autocast(batch.images.device.type, dtype=torch.bfloat16):
            maps = model.backbone((batch.images.float() - model.mean) / model.std)[1:]
            watch.lap(PARTS[0])
            cut_maps = cut(maps)
            levels = model.fpn(cut_maps)
            watch.lap(PARTS[1])
            cut_levels = cut(levels)
            outputs = model.class_head(cut_levels), model.box_head(cut_levels)
            watch.lap(PARTS[2])
        matches = match_batch(self.anchors, batch, self.settings)
        watch.lap(PARTS[3])
        cut_outputs = cut(outputs)
        sums = sum_losses(
            (cut_outputs[0], cut_outputs[1]), self.anchors, batch, matches, self.settings
        )
        loss = (sums.class_sum + sums.box_sum) / sums.num_foreground.clamp(min=1)
        loss.backward()  # type: ignore[no-untyped-call]
        watch.lap(PARTS[4])
        for part, results, inputs in (
            (PARTS[5], outputs, cut_outputs),
            (PARTS[6], levels, cut_levels),
            (PARTS[7], maps, cut_maps),
        ):
            torch.autograd.backward(list(results), [value.grad for value in inputs])
            watch.lap(part)
        parameters = [p for p in model.parameters() if p.requires_grad]
        is_finite = torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM))
        watch.lap(PARTS[8])
        update_weights(self.optimizer, is_finite)
        watch.lap(PARTS[9])
        self.average.update(model, 0, is_finite=is_finite)
        watch.lap(PARTS[10])


def cut(values: Sequence[Tensor]) -> list[Tensor]:
    """The same values as leaves that collect a gradient of their own."""
    return [value.detach().requires_grad_() for value in values]


def profile(backbone: str, setting: Setting) -> dict[str, float]:
    """Median milliseconds of each part and of the whole step."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step, watch = CutStep(backbone, setting, device), Stopwatch()
    step.take(Stopwatch())
    step.take_whole(Stopwatch())
    for _ in range(setting.num_rounds):
        step.take(watch)
        step.take_whole(watch)
    return {part: 1000 * statistics.median(times) for part, times in watch.seconds.items()}


def main() -> None:
    """Print the table and the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", choices=sorted(BACKBONES), action="append")
    parser.add_argument("--quick", action="store_true", help="small images, one round")
    options = parser.parse_args()
    setting = Setting(256, 2, 1) if options.quick else Setting(512, 4, 7)
    for backbone in options.backbone or list(BACKBONES):
        parts = profile(backbone, setting)
        total = sum(parts[part] for part in PARTS)
        for part in PARTS:
            share = 100 * parts[part] / total
            print(f"{backbone}  {part:22} {parts[part]:8.1f} ms {share:5.1f} %", file=sys.stderr)
        print(f"{backbone}  {'whole':22} {parts['whole']:8.1f} ms", file=sys.stderr)
        print(json.dumps({"backbone": backbone, **vars(setting), "ms": parts}))


if __name__ == "__main__":
    main()
