"""torchvision's RetinaNet trained on the batches of a recipe of ours, and scored the same way.

    python tests/benchmarks/torchvision_training.py --test data/bccd/test.json \
        --output runs/peer --config jobs/configs/train/bccd_resnet18.yaml [key=value ...]

Equal: images, augmentation, order, canvas, batch, steps, optimizer with its schedule and clipping,
the backbone and the weights it starts from, the width of the pyramid, bf16, the averaging of
weights, the scores on the test set. torchvision's own: the network (pyramid, heads without norms,
initialisation), matching, both losses and how they are normalised, suppression. Its anchors are its
own too, unless `--anchors recipe`.

Not a case of run.py: it takes as long as a training. The last line on stdout is JSON with the
scores of the last weights and of the averaged ones; both stay in the output folder.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from retinaray.assembly.reading import make_read_settings, make_reader
from retinaray.assembly.training import (
    TrainingInputs,
    choose_autocast,
    make_anchor_spec,
    make_loader,
    make_loop_settings,
    make_state,
    read_inputs,
    resolve_paths,
)
from retinaray.config.loading import load_from_argv
from retinaray.config.schema import TrainJob
from retinaray.data.batching import Batch
from retinaray.data.coco import load_coco, resolve_image_uri
from retinaray.data.coco_results import coco_results
from retinaray.detector.postprocess import Detections
from retinaray.evaluation.coco_map import CocoScores, evaluate_detections
from retinaray.inference.canvas_loading import load_canvas
from retinaray.inference.image_sources import ImageSource
from retinaray.training.loop import LoopSettings
from retinaray.training.pretrained import read_backbone_weights

BLOCKS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "ResNet10FPN": (BasicBlock, [1, 1, 1, 1]),
    "ResNet18FPN": (BasicBlock, [2, 2, 2, 2]),
    "ResNet50FPN": (Bottleneck, [3, 4, 6, 3]),
}
LOG_EVERY = 10


@dataclass(frozen=True)
class Peer:
    """What is trained.

    Attributes:
        job: Of our recipe.
        inputs: Its data.
        model: torchvision's network.
        settings: Steps, schedule, clipping.
    """

    job: TrainJob
    inputs: TrainingInputs
    model: TorchvisionRetinaNet
    settings: LoopSettings


def make_peer(job: TrainJob, *, has_own_anchors: bool) -> Peer:
    """torchvision's network for a recipe, from the recipe's initial weights."""
    inputs = read_inputs(job)
    torch.manual_seed(job.run.seed)
    model = build_model(job, inputs, has_own_anchors=has_own_anchors)
    dtype = choose_autocast(job.run.precision, torch.device("cpu"))
    settings = make_loop_settings(job, len(inputs.train), autocast_dtype=dtype)
    return Peer(job=job, inputs=inputs, model=model, settings=settings)


def build_model(
    job: TrainJob, inputs: TrainingInputs, *, has_own_anchors: bool
) -> TorchvisionRetinaNet:
    """As `retinanet_resnet50_fpn_v2`'s parts are put together, with the recipe's width."""
    weights = job.model.backbone_weights
    block, depths = BLOCKS[job.model.backbone]
    norm = nn.BatchNorm2d if weights is None else FrozenBatchNorm2d
    body = ResNet(block, depths, norm_layer=norm)
    if weights is not None:
        state, is_caffe = read_backbone_weights(weights, backbone=job.model.backbone)
        body.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)
        if is_caffe:
            for stage in (body.layer2, body.layer3, body.layer4):
                stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    channels = [planes * block.expansion for planes in (128, 256, 512)]
    width = job.model.fpn_channels
    backbone = BackboneWithFPN(
        body,
        return_layers={f"layer{index}": str(index - 2) for index in (2, 3, 4)},
        in_channels_list=channels,
        out_channels=width,
        extra_blocks=LastLevelP6P7(width, width),
    )
    num_classes = len(inputs.train.categories)
    height, width_px = inputs.canvas
    parts: dict[str, Any] = {}
    if not has_own_anchors:
        spec = make_anchor_spec(job.anchors)
        sides = tuple(tuple(s * stride for s in spec.scales) for stride in spec.strides)
        parts["anchor_generator"] = AnchorGenerator(sides, (spec.ratios,) * len(sides))
        parts["head"] = RetinaNetHead(width, spec.num_per_cell, num_classes)
    return TorchvisionRetinaNet(
        backbone,
        num_classes,
        min_size=min(height, width_px),
        max_size=max(height, width_px),
        _skip_resize=True,
        **parts,
    )


def train(peer: Peer) -> dict[str, Tensor]:
    """Take the recipe's steps; gives the averaged weights."""
    model, settings = peer.model, peer.settings
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # Optimizer and averaging as the recipe has them; nothing of it looks at the kind of network.
    state = make_state(peer.job, model)  # type: ignore[arg-type]
    parameters = [p for p in model.parameters() if p.requires_grad]
    batches = make_loader(
        peer.job,
        peer.inputs,
        rank=0,
        world_size=1,
        first_step=0,
        num_processes=0,
        pin_memory=False,
    )
    model.train()
    begin = time.perf_counter()
    for step, batch in enumerate(batches):
        rate = settings.schedule.rate_at(step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.zero_grad(set_to_none=True)
        losses = compute_losses(model, batch, settings.autocast_dtype)
        torch.autograd.backward(torch.stack(list(losses.values())).sum())
        if settings.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        state.optimizer.step()
        if state.average:
            state.average.update(model, step)  # type: ignore[arg-type]
        if (step + 1) % LOG_EVERY == 0:
            values = {name: round(float(loss), 4) for name, loss in losses.items()}
            seconds = round(time.perf_counter() - begin, 1)
            print(f"step {step + 1}/{settings.total_steps} {values} {seconds} s", flush=True)
    return state.average.values if state.average else model.state_dict()


def compute_losses(
    model: TorchvisionRetinaNet, batch: Batch, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """torchvision's two losses; it has no notion of ignored regions, so crowds are left out."""
    targets = []
    for index in range(len(batch.images)):
        counts = batch.is_valid[index] & ~batch.is_crowd[index]
        targets.append(
            {
                "boxes": batch.boxes_xyxy[index][counts],
                "labels": batch.class_indices[index][counts],
            }
        )
    images = list(batch.images.float() / 255)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        losses: dict[str, Tensor] = model(images, targets)
    return losses


def score(peer: Peer, weights: Mapping[str, Tensor], annotations: str) -> CocoScores:
    """COCO's numbers of some weights on a test set, in float32 with torchvision's suppression."""
    job, model = peer.job, peer.model
    model.load_state_dict(weights)
    model.eval()
    read = make_reader(job.reading)
    content = read(annotations)
    dataset = load_coco(content, source=annotations)
    root = job.data.val_images or job.data.images
    results: list[dict[str, object]] = []
    for record in dataset.images:
        source = ImageSource(record.image_id, resolve_image_uri(root, record.file_name))
        loaded = load_canvas(source, peer.inputs.canvas, read, make_read_settings(job.reading))
        image = torch.from_numpy(loaded.pixels).permute(2, 0, 1).float() / 255
        with torch.inference_mode():
            found = model([image])[0]
        detections = Detections(
            boxes_xyxy=found["boxes"], scores=found["scores"], labels=found["labels"]
        )
        results += [
            {"image_id": record.image_id, **result}
            for result in coco_results(detections, loaded.placement, dataset.categories)
        ]
    return evaluate_detections(json.loads(content), results)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, score both sets of weights, write them down."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--test", required=True, help="annotations to score on")
    parser.add_argument("--output", required=True, type=Path, help="folder for what is left")
    parser.add_argument("--anchors", choices=("torchvision", "recipe"), default="torchvision")
    parser.add_argument("--threads", type=int, default=2)
    options, recipe = parser.parse_known_args(argv)
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    job = resolve_paths(load_from_argv(TrainJob, recipe))
    peer = make_peer(job, has_own_anchors=options.anchors == "torchvision")
    begin = time.perf_counter()
    averaged = train(peer)
    outcome: dict[str, Any] = {"train_s": round(time.perf_counter() - begin)}
    last = {key: value.detach().clone() for key, value in peer.model.state_dict().items()}
    for name, weights in (("last", last), ("averaged", averaged)):
        torch.save(weights, options.output / f"{name}.pt")
        outcome[name] = score(peer, weights, options.test).to_dict()
    (options.output / "scores.json").write_text(json.dumps(outcome, indent=1))
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
