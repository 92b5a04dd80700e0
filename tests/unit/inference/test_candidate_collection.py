"""The law of cached candidates: a replayed setting is a fresh inference with that setting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from retinaray.artifact import ModelCard
from retinaray.detector.retinanet import RetinaNet
from retinaray.evaluation.candidates import CandidateSet, DetectionSetting, apply_setting
from retinaray.evaluation.coco_map import evaluate_detections
from retinaray.inference.candidate_collection import collect_candidates, make_candidate_settings
from retinaray.inference.pipeline import ImageSource, ReadSettings, detect_images
from retinaray.inference.predictor import PredictorSettings
from retinaray.inference.torch_backend import TorchPredictor

BATCH = 4
RUNNING = PredictorSettings(batch=BATCH)


@pytest.fixture
def sources(image_set: Any) -> list[ImageSource]:
    return [
        ImageSource(image["id"], str(image_set.folder / image["file_name"]))
        for image in image_set.coco["images"][:4]
    ]


def draw_settings(count: int) -> list[DetectionSetting]:
    rng = np.random.default_rng(7)
    kinds: list[Any] = ["class", "agnostic", "none"]
    return [
        DetectionSetting(
            score_thresholds=tuple(rng.uniform(0.01, 0.9, 3).tolist()),
            nms_iou=float(rng.uniform(0.1, 0.9)),
            nms_kind=kinds[number % 3],
            max_detections=int(rng.integers(1, 300)),
        )
        for number in range(count)
    ]


def collect(
    model: RetinaNet, card: ModelCard, sources: list[ImageSource], read: Callable[[str], bytes]
) -> tuple[CandidateSet, list[Any]]:
    predictor = TorchPredictor(model, card=card, settings=make_candidate_settings(RUNNING))
    return collect_candidates(
        predictor, sources, read=read, batch=BATCH, settings=ReadSettings(threads=2)
    )


@pytest.mark.usefixtures("one_thread")
def test_replayed_settings_equal_fresh_inference(
    tiny_model: RetinaNet, tiny_card: ModelCard, image_set: Any, sources: list[ImageSource]
) -> None:
    truth = copy.deepcopy(image_set.coco)
    truth["categories"].append({"id": 27, "name": "class 2"})
    candidates, failed = collect(tiny_model, tiny_card, sources, image_set.read)
    assert failed == []
    assert candidates.scores.min() > 0.01
    assert len(candidates.scores) > 200
    num_scored = 0
    for setting in draw_settings(20):
        card = replace(
            tiny_card,
            score_thresholds=setting.score_thresholds,
            nms_iou=setting.nms_iou,
            nms_kind=setting.nms_kind,
            max_detections=setting.max_detections,
        )
        results = detect_images(
            TorchPredictor(tiny_model, card=card, settings=RUNNING),
            sources,
            read=image_set.read,
            batch=BATCH,
            settings=ReadSettings(threads=2),
        )
        fresh = [found for result in results for found in result.coco_results]
        replayed = apply_setting(candidates, setting, tiny_card.categories)
        assert replayed == fresh
        ours, theirs = (evaluate_detections(truth, found) for found in (replayed, fresh))
        assert ours.summary["AP"] == pytest.approx(theirs.summary["AP"], abs=1e-9)
        num_scored += bool(ours.summary["AP50"])
    assert num_scored > 0


@pytest.mark.usefixtures("one_thread")
def test_collect_candidates_gives_the_errors_of_images_that_cannot_be_read(
    tiny_model: RetinaNet, tiny_card: ModelCard, image_set: Any, sources: list[ImageSource]
) -> None:
    def read(uri: str) -> bytes:
        content: bytes = image_set.read(uri)
        return content[:50] if uri.endswith("2.png") else content

    candidates, failed = collect(tiny_model, tiny_card, sources, read)
    assert candidates.image_ids == (1, 3, 4)
    assert [(item.source.image_id, item.exception) for item in failed] == [(2, "ImageError")]


def test_make_candidate_settings_keeps_batch_threads_and_canvas() -> None:
    asked = PredictorSettings(2, 3, (64, 96), score_threshold=0.5, nms_iou=0.3, max_detections=5)
    made = make_candidate_settings(asked, floor=0.02)
    assert (made.batch, made.threads, made.canvas) == (2, 3, (64, 96))
    assert (made.score_threshold, made.nms_kind, made.max_detections) == (0.02, "none", 3839)
