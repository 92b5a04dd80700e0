"""Our training step against torchvision's RetinaNet, and against what the network alone costs.

    python tests/benchmarks/train_step.py [--quick]

All competitors have the same backbone, image size, batch, boxes and threads, and take turns:

- ours: `take_step` with AdamW, bf16 autocast, channels last.
- torchvision_bf16: torchvision's RetinaNet with the same layers and settings, and its resizing
  switched off.
- torchvision_fp32: as its reference scripts run it: float32, SGD without clipping, channels first,
  P6 from P5.
- bare: forward of our network, the sum of its outputs, backward: no matching, losses or optimizer.

"_no_optimizer" ends after the backward pass. "losses_alone" is matching and both losses with their
gradients, on equal float32 outputs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from run import Record, make_records, time_rounds
from torch import Tensor
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from retinaray.data.batching import Batch
from retinaray.detector.anchors import AnchorSpec, make_anchors
from retinaray.detector.retinanet import RetinaNet
from retinaray.training.step import LossSettings, compute_loss_sums, make_optimizer, take_step

BACKBONES = {"ResNet18FPN": "resnet18", "ResNet50FPN": "resnet50"}
# Small enough that random weights stay where they are.
LEARNING_RATE = 1e-6
CLIP_NORM = 10.0
BASELINES = {
    "ours": ("torchvision_bf16", "torchvision_fp32", "bare"),
    "ours_no_optimizer": ("torchvision_bf16_no_optimizer", "torchvision_fp32_no_optimizer", "bare"),
}

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Setting:
    """What all competitors share.

    Attributes:
        side_px: Height and width of the images.
        num_images: Images per step.
        num_rounds: Rounds that count.
        num_boxes: Ground truths per image.
        num_classes: K.
    """

    side_px: int
    num_images: int
    num_rounds: int
    num_boxes: int = 8
    num_classes: int = 80


def run(quick: bool = False) -> list[Record]:
    """Measure both backbones and the losses."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = Setting(256, 2, 1) if quick else Setting(512, 4, 7)
    batch = make_batch(setting, device)
    records = []
    for backbone in BACKBONES:
        records += measure_steps(backbone, setting, batch)
    return [*records, *measure_losses(setting, batch)]


def make_batch(setting: Setting, device: torch.device, *, seed: int = 0) -> Batch:
    """Noise with boxes of 16 px to half the image, in the memory format of our data loader."""
    generator = torch.Generator().manual_seed(seed)
    shape = (setting.num_images, setting.num_boxes)
    size = 16 + torch.rand(*shape, 2, generator=generator) * (setting.side_px / 2 - 16)
    corner = torch.rand(*shape, 2, generator=generator) * (setting.side_px - size)
    pixels = torch.randint(
        0,
        256,
        (setting.num_images, setting.side_px, setting.side_px, 3),
        dtype=torch.uint8,
        generator=generator,
    )
    return Batch(
        images=pixels.permute(0, 3, 1, 2),
        boxes_xyxy=torch.cat((corner, corner + size), dim=-1),
        class_indices=torch.randint(0, setting.num_classes, shape, generator=generator),
        is_valid=torch.ones(shape, dtype=torch.bool),
        is_crowd=torch.zeros(shape, dtype=torch.bool),
        image_ids=tuple(range(setting.num_images)),
    ).to(device)


def list_targets(batch: Batch) -> list[dict[str, Tensor]]:
    """The batch's ground truth as torchvision takes it."""
    return [
        {"boxes": boxes, "labels": labels}
        for boxes, labels in zip(batch.boxes_xyxy, batch.class_indices, strict=True)
    ]


# --- competitors ----------------------------------------------------------------------------------


def make_ours(
    backbone: str, setting: Setting, batch: Batch, *, is_compiled: bool = False
) -> dict[str, Loss]:
    """Our step, our gradients, and the network's gradients alone."""
    model = RetinaNet(backbone=backbone, num_classes=setting.num_classes, norm="frozen_bn")
    model.to(batch.images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if is_compiled:
        model.compile(dynamic=False)
    optimizer = make_optimizer(model, kind="adamw", learning_rate=LEARNING_RATE, weight_decay=0.05)
    anchors = model.anchors_for(batch.images)
    settings = LossSettings()

    def forward() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(batch.images.device.type, dtype=torch.bfloat16):
            logits, deltas = model(batch.images)
        return logits, deltas

    def find_gradients() -> Tensor:
        sums = compute_loss_sums(*forward(), anchors, batch, settings)
        loss = (sums.class_sum + sums.box_sum) / sums.num_foreground.clamp(min=1)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step() -> Tensor:
        result = take_step(
            model,
            optimizer,
            batch,
            anchors_xyxy=anchors,
            settings=settings,
            learning_rate=LEARNING_RATE,
            clip_norm=CLIP_NORM,
            autocast_dtype=torch.bfloat16,
        )
        return torch.where(result.is_finite, result.class_loss + result.box_loss, torch.nan)

    def find_bare_gradients() -> Tensor:
        logits, deltas = forward()
        loss = logits.sum() + deltas.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return {"ours": step, "ours_no_optimizer": find_gradients, "bare": find_bare_gradients}


def make_torchvision(
    name: str, backbone: str, setting: Setting, batch: Batch, *, is_same: bool
) -> dict[str, Loss]:
    """Torchvision's step and gradients: `is_same` as ours, or else as its own scripts do it."""
    device = batch.images.device
    model = build_torchvision(backbone, setting, is_same=is_same).to(device).train()
    if is_same:
        model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(
        model, kind="adamw" if is_same else "sgd", learning_rate=LEARNING_RATE, weight_decay=1e-4
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # What its loader hands over: floats in [0, 1], one tensor per image.
    images = list((batch.images.float() / 255).contiguous())
    targets = list_targets(batch)

    def find_gradients() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_same):
            losses: dict[str, Tensor] = model(images, targets)
            loss = torch.stack(list(losses.values())).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step() -> Tensor:
        loss = find_gradients()
        if is_same:
            torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        return loss

    return {name: step, f"{name}_no_optimizer": find_gradients}


def build_torchvision(backbone: str, setting: Setting, *, is_same: bool) -> TorchvisionRetinaNet:
    """Torchvision's RetinaNet over one of its ResNets, all layers trainable."""
    out_channels = 512 if backbone == "ResNet18FPN" else 2048
    body = resnet_fpn_backbone(
        backbone_name=BACKBONES[backbone],
        weights=None,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        # It takes P6 from C5 when the widths differ, as we do, and from P5 when they are equal.
        extra_blocks=LastLevelP6P7(out_channels if is_same else 256, 256),
    )
    extra: dict[str, Any] = {"_skip_resize": True} if is_same else {}
    side = setting.side_px
    return TorchvisionRetinaNet(body, setting.num_classes, min_size=side, max_size=side, **extra)


def wait_for_device(competitor: Loss) -> Loss:
    """The competitor, timed until the GPU has finished."""

    def compete() -> Tensor:
        loss = competitor()
        if loss.is_cuda:
            torch.cuda.synchronize()
        return loss

    return compete


# --- measuring ------------------------------------------------------------------------------------


def measure_steps(backbone: str, setting: Setting, batch: Batch) -> list[Record]:
    """All competitors of one backbone, in milliseconds per step."""
    competitors = {
        **make_ours(backbone, setting, batch),
        **make_torchvision("torchvision_bf16", backbone, setting, batch, is_same=True),
        **make_torchvision("torchvision_fp32", backbone, setting, batch, is_same=False),
    }
    check_networks_are_equal(backbone, setting)
    rounds = time_rounds(
        {name: wait_for_device(competitor) for name, competitor in competitors.items()},
        num_rounds=setting.num_rounds,
    )
    losses = {name: float(loss) for name, loss in rounds.outputs.items()}
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses.values()), losses
    return make_records(
        f"train_step/{backbone}",
        rounds,
        unit="ms/step",
        convert=lambda seconds: 1000 * seconds,
        baselines=BASELINES,
        checked="all losses and our gradients finite; weights shaped as torchvision_bf16's",
        config=describe(setting, batch) | {"backbone": backbone},
    )


def measure_losses(setting: Setting, batch: Batch) -> list[Record]:
    """Matching and losses with their gradients, on equal outputs of a network."""
    model = build_torchvision("ResNet18FPN", setting, is_same=True)
    device = batch.images.device
    anchors = make_anchors(AnchorSpec(), setting.side_px, setting.side_px, device=device)
    logits, deltas = make_outputs(setting, anchors)
    targets = list_targets(batch)

    def ours() -> Tensor:
        sums = compute_loss_sums(logits, deltas, anchors, batch, LossSettings())
        return differentiate((sums.class_sum + sums.box_sum) / sums.num_foreground.clamp(min=1))

    def theirs() -> Tensor:
        outputs = {"cls_logits": logits, "bbox_regression": deltas}
        losses = model.compute_loss(targets, outputs, [anchors] * len(targets))
        return differentiate(losses["classification"] + losses["bbox_regression"])

    def differentiate(loss: Tensor) -> Tensor:
        logits.grad = deltas.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    check_losses_are_equal(logits, deltas, anchors, batch, model)
    rounds = time_rounds(
        {"ours": wait_for_device(ours), "torchvision": wait_for_device(theirs)},
        num_rounds=2 * setting.num_rounds,
    )
    return make_records(
        "train_step/losses_alone",
        rounds,
        unit="ms/step",
        convert=lambda seconds: 1000 * seconds,
        baselines={"ours": ("torchvision",)},
        checked="focal and box sums and foreground counts equal torchvision's, relative 1e-4",
        config=describe(setting, batch) | {"dtype": "float32"},
    )


def make_outputs(setting: Setting, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Logits around the prior of 0.01 and small offsets, as leaves with gradients."""
    generator = torch.Generator().manual_seed(1)
    shape = (setting.num_images, len(anchors))
    logits = torch.randn(*shape, setting.num_classes, generator=generator) - 4.6
    deltas = 0.5 * torch.randn(*shape, 4, generator=generator)
    return logits.to(anchors.device).requires_grad_(), deltas.to(anchors.device).requires_grad_()


def describe(setting: Setting, batch: Batch) -> dict[str, Any]:
    """The resolved configuration."""
    return {
        **asdict(setting),
        "device": batch.images.device.type,
        "threads": torch.get_num_threads(),
        "norm": "frozen_bn",
        "optimizers": {"ours": "adamw", "torchvision_bf16": "adamw", "torchvision_fp32": "sgd"},
        "clip_norm": CLIP_NORM,
        "num_warmup": 1,
    }


# --- facts ----------------------------------------------------------------------------------------


def check_networks_are_equal(backbone: str, setting: Setting) -> None:
    """Both networks have the same weights, shape by shape."""
    shapes = [
        sorted(tuple(parameter.shape) for parameter in model.parameters())
        for model in (
            RetinaNet(backbone=backbone, num_classes=setting.num_classes, norm="frozen_bn"),
            build_torchvision(backbone, setting, is_same=True),
        )
    ]
    assert shapes[0] == shapes[1], (backbone, len(shapes[0]), len(shapes[1]))


def check_losses_are_equal(
    logits: Tensor, deltas: Tensor, anchors: Tensor, batch: Batch, model: TorchvisionRetinaNet
) -> None:
    """Image by image: torchvision's loss of one image is its sum over its foreground count."""
    for index, target in enumerate(list_targets(batch)):
        rows = slice(index, index + 1)
        single = Batch(
            images=batch.images[rows],
            boxes_xyxy=batch.boxes_xyxy[rows],
            class_indices=batch.class_indices[rows],
            is_valid=batch.is_valid[rows],
            is_crowd=batch.is_crowd[rows],
            image_ids=batch.image_ids[rows],
        )
        with torch.no_grad():
            sums = compute_loss_sums(logits[rows], deltas[rows], anchors, single, LossSettings())
            outputs = {"cls_logits": logits[rows], "bbox_regression": deltas[rows]}
            theirs = model.compute_loss([target], outputs, [anchors])
        count = sums.num_foreground
        assert count > 0
        torch.testing.assert_close(
            sums.class_sum / count, theirs["classification"], rtol=1e-4, atol=0
        )
        torch.testing.assert_close(
            sums.box_sum / count, theirs["bbox_regression"], rtol=1e-4, atol=0
        )


def main() -> None:
    """Print the records of this case alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small images, one round")
    for record in run(parser.parse_args().quick):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
