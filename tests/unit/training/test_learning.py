"""End to end: a tiny network learns two pictures until it finds their boxes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from retinaray.artifact import ModelCard
from retinaray.data.augmentation import AugmentSettings
from retinaray.data.batching import TrainingDataset, collate_samples
from retinaray.data.coco import load_coco
from retinaray.data.stream_sampler import StreamSampler
from retinaray.detector.anchors import AnchorSpec
from retinaray.evaluation.coco_map import evaluate_detections
from retinaray.inference.pipeline import ImageSource, ReadSettings, detect_images
from retinaray.inference.predictor import PredictorSettings
from retinaray.inference.torch_backend import TorchPredictor
from retinaray.training.loop import LoopSettings, Progress, run_loop
from retinaray.training.state import TrainingState
from retinaray.training.step import WeightAverage, make_optimizer

CANVAS = (64, 64)
STEPS = 44


@pytest.fixture
def two_pictures(image_set: Any) -> dict[str, Any]:
    """The first two pictures of `image_set` with their four boxes."""
    boxes = [a for a in image_set.coco["annotations"] if a["image_id"] <= 2]
    return image_set.coco | {"images": image_set.coco["images"][:2], "annotations": boxes}


@pytest.mark.usefixtures("one_thread")
def test_a_tiny_network_learns_two_pictures(
    image_set: Any,
    two_pictures: dict[str, Any],
    make_tiny_card: Callable[..., ModelCard],
    make_loop_settings: Callable[..., LoopSettings],
) -> None:
    reader = TrainingDataset(
        dataset=load_coco(json.dumps(two_pictures).encode(), source="two pictures"),
        images_root=str(image_set.folder),
        read=image_set.read,
        canvas=CANVAS,
        augment=AugmentSettings(),
        seed=0,
        max_pixels=10**6,
        allow_truncated=False,
    )
    anchors = AnchorSpec(scales=(2.0, 3.0), ratios=(1.0,))
    card = make_tiny_card(num_classes=2, head_depth=0, canvas=CANVAS, anchors=anchors)
    torch.manual_seed(0)
    model = card.build_model()
    state = TrainingState(
        model=model,
        optimizer=make_optimizer(model, kind="adamw", learning_rate=1e-3, weight_decay=0.0),
        average=WeightAverage(model, decay=0.9),
    )
    reports: list[Progress] = []
    run_loop(
        state,
        model,
        (
            collate_samples([reader[index] for index in indices])
            for indices in StreamSampler(num_images=2, batch=2, last_step=STEPS)
        ),
        make_loop_settings(
            checkpoint_steps=(STEPS,),
            log_every=11,
            peak_lr=4e-3,
            warmup_steps=5,
            batch=2,
            num_images=2,
        ),
        world_size=1,
        on_progress=reports.append,
        on_checkpoint=lambda _: False,
    )
    assert reports[-1].class_loss < 0.2 * reports[0].class_loss
    assert reports[-1].box_loss < 0.3 * reports[0].box_loss

    model.load_state_dict(state.exported_state())
    results = detect_images(
        TorchPredictor(model, card=card, settings=PredictorSettings(score_threshold=0.05)),
        [
            ImageSource(image["id"], f"{image_set.folder}/{image['file_name']}")
            for image in two_pictures["images"]
        ],
        read=image_set.read,
        batch=2,
        settings=ReadSettings(threads=1),
    )
    detections = [row for result in results for row in result.coco_results]
    scores = evaluate_detections(two_pictures, detections)
    assert scores.summary["AP50"] > 0.9
