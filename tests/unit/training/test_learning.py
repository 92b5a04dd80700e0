"""End to end: a tiny network learns two pictures until it finds their boxes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from retinaray.artifact import ModelCard
from retinaray.data.augmentation import AugmentSettings
from retinaray.data.batching import StreamSampler, TrainingDataset, collate_samples
from retinaray.data.coco import load_coco
from retinaray.detector.anchors import AnchorSpec
from retinaray.evaluation.coco_map import evaluate_detections
from retinaray.inference.pipeline import ImageSource, ReadSettings, detect_images
from retinaray.inference.predictor import PredictorSettings
from retinaray.inference.torch_backend import TorchPredictor
from retinaray.training.loop import LoopSettings, run_loop
from retinaray.training.state import TrainingState
from retinaray.training.step import WeightAverage, make_optimizer

STEPS = 60


@pytest.mark.usefixtures("one_thread")
def test_a_tiny_network_learns_two_pictures(
    image_set: Any,
    make_tiny_card: Callable[..., ModelCard],
    make_loop_settings: Callable[..., LoopSettings],
) -> None:
    coco = {
        **image_set.coco,
        "images": image_set.coco["images"][:2],
        "annotations": [a for a in image_set.coco["annotations"] if a["image_id"] <= 2],
    }
    card = make_tiny_card(
        num_classes=2, head_depth=0, canvas=(64, 64), anchors=AnchorSpec(scales=(2.0, 3.0), ratios=(1.0,))
    )
    dataset = replace(load_coco(image_set.annotations), images=load_coco(image_set.annotations).images[:2])
    reader = TrainingDataset(
        dataset=dataset,
        images_root=str(image_set.folder),
        read=image_set.read,
        canvas=(64, 64),
        augment=AugmentSettings(),
        seed=0,
        max_pixels=10**6,
        allow_truncated=False,
    )
    torch.manual_seed(0)
    model = card.build_model()
    state = TrainingState(
        model=model,
        optimizer=make_optimizer(model, kind="adamw", learning_rate=1e-3, weight_decay=0.0),
        average=WeightAverage(model, decay=0.9),
    )
    sampler = StreamSampler(num_images=2, batch=2, last_step=STEPS)
    reports = []
    run_loop(
        state,
        model,
        (collate_samples([reader[index] for index in indices]) for indices in sampler),
        make_loop_settings(checkpoint_steps=(STEPS,), log_every=10, peak_lr=3e-3, warmup_steps=5, batch=2, num_images=2),
        world_size=1,
        on_progress=reports.append,
        on_checkpoint=lambda _: False,
    )
    model.load_state_dict(state.exported_state())
    found = detect_images(
        TorchPredictor(model, card=card, settings=PredictorSettings(score_threshold=0.05)),
        [ImageSource(r.image_id, f"{image_set.folder}/{r.file_name}") for r in dataset.images],
        read=image_set.read,
        batch=2,
        settings=ReadSettings(threads=1),
    )
    detections = [row for result in found for row in result.coco_results]
    scores = evaluate_detections(coco, detections)
    print([(r.class_loss, r.box_loss) for r in reports], scores.summary)
    assert reports[-1].class_loss < 0.2 * reports[0].class_loss
    assert reports[-1].box_loss < 0.3 * reports[0].box_loss
    assert scores.summary["AP50"] > 0.9
