"""AP by subsets of one matching against pycocotools on freshly applied settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retinaray.data.coco import CategoryTable
from retinaray.evaluation.ap_curves import AveragePrecision, average_precision
from retinaray.evaluation.candidates import CandidateSet, DetectionSetting, apply_setting
from retinaray.evaluation.coco_map import evaluate_detections
from retinaray.evaluation.detection_matches import (
    GroundTruth,
    MatchedDetections,
    index_ground_truth,
    match_candidates,
    match_results,
)

Scene = tuple[dict[str, Any], CandidateSet]
UNCAPPED = 100_000


def assert_equals_pycocotools(
    found: AveragePrecision, truth: dict[str, Any], results: list[dict[str, Any]]
) -> None:
    scores = evaluate_detections(truth, results)
    expected = [scores.summary[name] for name in ("AP", "AP50", "AP75")]
    expected += [entry.AP for entry in scores.classes]
    ours = [found.AP, found.AP50, found.AP75, *found.per_class]
    assert [value is None for value in ours] == [value is None for value in expected]
    assert [v for v in ours if v is not None] == pytest.approx(
        [v for v in expected if v is not None], abs=1e-12, rel=0
    )
    assert found.num_detections == len(results)


def match_all(
    scene: Scene, categories: CategoryTable, *, nms_iou: float, nms_kind: Any
) -> MatchedDetections:
    setting = DetectionSetting((0.01,) * 3, nms_iou, nms_kind, UNCAPPED)
    return match_candidates(scene[1], setting, categories, index_ground_truth(scene[0]))


@pytest.mark.parametrize("nms_kind", ["class", "agnostic", "none"])
@pytest.mark.parametrize(("seed", "nms_iou"), [(0, 0.5), (1, 0.3), (2, 0.8)])
def test_average_precision_equals_pycocotools_for_every_threshold_and_cap(
    draw_scene: Callable[..., Scene],
    three_classes: CategoryTable,
    nms_kind: Any,
    seed: int,
    nms_iou: float,
) -> None:
    scene = draw_scene(seed)
    matched = match_all(scene, three_classes, nms_iou=nms_iou, nms_kind=nms_kind)
    # 0.5 and 0.9 are scores that occur: they must be above, not at.
    for threshold, cap in [(0.01, UNCAPPED), (0.01, 5), (0.5, 9), (0.9, 100), (0.9985, 3)]:
        setting = DetectionSetting((threshold,) * 3, nms_iou, nms_kind, cap)
        found = average_precision(matched, score_thresholds=(threshold,) * 3, max_detections=cap)
        assert_equals_pycocotools(found, scene[0], apply_setting(scene[1], setting, three_classes))
    whole = average_precision(matched).AP
    assert whole is not None
    assert whole > 0.1


@pytest.mark.parametrize("nms_kind", ["class", "none"])
def test_average_precision_allows_thresholds_per_class_without_a_cap(
    draw_scene: Callable[..., Scene], three_classes: CategoryTable, nms_kind: Any
) -> None:
    scene = draw_scene(3)
    matched = match_all(scene, three_classes, nms_iou=0.5, nms_kind=nms_kind)
    by_id = {7: 0.2, "b": 0.61, 3: 0.4}
    setting = DetectionSetting(
        tuple(by_id[identity] for identity in three_classes.ids), 0.5, nms_kind, UNCAPPED
    )
    in_truth_order = [by_id[entry["id"]] for entry in scene[0]["categories"]]
    found = average_precision(matched, score_thresholds=in_truth_order)
    assert_equals_pycocotools(found, scene[0], apply_setting(scene[1], setting, three_classes))


def test_average_precision_stops_at_a_hundred_of_one_class_in_one_image(
    draw_scene: Callable[..., Scene], three_classes: CategoryTable
) -> None:
    scene = draw_scene(4, num_images=2, per_image=700, score_digits=6)
    matched = match_all(scene, three_classes, nms_iou=0.5, nms_kind="none")
    assert matched.class_ranks.max() > 150
    results = apply_setting(
        scene[1], DetectionSetting((0.01,) * 3, 0.5, "none", UNCAPPED), three_classes
    )
    assert_equals_pycocotools(average_precision(matched), scene[0], results)


def test_match_results_equals_pycocotools_whatever_the_order(
    draw_scene: Callable[..., Scene], three_classes: CategoryTable
) -> None:
    scene = draw_scene(5, score_digits=1)
    setting = DetectionSetting((0.01,) * 3, 0.6, "class", UNCAPPED)
    results = apply_setting(scene[1], setting, three_classes)
    np.random.default_rng(0).shuffle(results)  # type: ignore[arg-type]
    found = average_precision(match_results(results, index_ground_truth(scene[0])))
    assert_equals_pycocotools(found, scene[0], results)


def test_average_precision_is_none_without_ground_truth_and_zero_without_detections(
    draw_scene: Callable[..., Scene],
) -> None:
    truth, _ = draw_scene(6)
    assert_equals_pycocotools(
        average_precision(match_results([], index_ground_truth(truth))), truth, []
    )
    assert average_precision(match_results([], index_ground_truth(truth))).AP == 0
    truth["annotations"] = []
    found = average_precision(match_results([], index_ground_truth(truth)))
    assert found == AveragePrecision(None, None, None, (None,) * 3, 0)


def test_average_precision_by_hand() -> None:
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10]},
            {"image_id": 1, "category_id": 1, "bbox": [50, 0, 10, 10]},
        ],
    }
    found = [
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "score": 0.9},
        {"image_id": 1, "category_id": 1, "bbox": [0, 50, 10, 10], "score": 0.8},
        # Overlap 80 / 100 = 0.8: a hit at seven of the ten overlaps, 0.50 to 0.80.
        {"image_id": 1, "category_id": 1, "bbox": [50, 0, 10, 8], "score": 0.7},
    ]
    matched = match_results(found, index_ground_truth(truth))
    # Precision 1 for recalls 0.00 to 0.50 (51 values), then 2/3 (50 values).
    full, half = (51 + 50 * 2 / 3) / 101, 51 / 101
    result = average_precision(matched)
    cut = average_precision(matched, score_thresholds=[0.7])
    found_values = [result.AP50, result.AP, cut.AP]
    assert found_values == pytest.approx([full, (7 * full + 3 * half) / 10, half], abs=1e-12)
    assert average_precision(matched, max_detections=2).num_detections == 2


def test_average_precision_refuses_other_overlaps_and_counts(
    draw_scene: Callable[..., Scene],
) -> None:
    truth = index_ground_truth(draw_scene(0)[0])
    with pytest.raises(ValueError, match="2 score thresholds for 3 classes"):
        average_precision(match_results([], truth), score_thresholds=[0.1, 0.2])
    with pytest.raises(ValueError, match="COCO's 10 overlaps, got 1"):
        average_precision(match_results([], truth, ious=np.array([0.5])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 99}, "image_id=99"),
        ({"category_id": "x"}, "category_id='x'"),
    ],
)
def test_matching_refuses_what_the_ground_truth_does_not_have(
    draw_scene: Callable[..., Scene], change: dict[str, Any], message: str
) -> None:
    content, _ = draw_scene(0)
    found = {"image_id": 1000, "category_id": 7, "bbox": [0, 0, 1, 1], "score": 0.5}
    with pytest.raises(ValueError, match=message):
        match_results([found | change], index_ground_truth(content))
    content["annotations"].append(content["annotations"][0] | change)
    with pytest.raises(ValueError, match=message):
        index_ground_truth(content)


def test_match_candidates_refuses_a_class_that_the_ground_truth_does_not_have(
    draw_scene: Callable[..., Scene], three_classes: CategoryTable
) -> None:
    content, candidates = draw_scene(0)
    content["categories"] = [entry for entry in content["categories"] if entry["id"] != 3]
    with pytest.raises(ValueError, match="category_id=3"):
        match_candidates(
            candidates, DetectionSetting((0.01,) * 3), three_classes, index_ground_truth(content)
        )


def test_index_ground_truth_ignores_areas_that_coco_ignores() -> None:
    truth: GroundTruth = index_ground_truth(
        {
            "images": [{"id": 1}],
            "categories": [{"id": 1, "name": "a"}],
            "annotations": [
                {"image_id": 1, "category_id": 1, "bbox": [0, 0, 200_000, 100_000]},
                {"image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], "area": 20, "iscrowd": 0},
                {"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1},
            ],
        }
    )
    assert truth.num_boxes.tolist() == [1]
    group = truth.groups[0, 0]
    assert group.boxes_xywh[:, 2].tolist() == [5, 200_000, 9]
    assert group.is_ignored.tolist() == [False, True, True]
    assert group.is_crowd.tolist() == [0, 0, 1]


def test_average_precision_equals_pycocotools_when_areas_are_out_of_range() -> None:
    huge = [0, 0, 200_000, 100_000]
    boxes = [huge, [0, 0, 50, 50], [500, 500, 50, 50]]
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": box} for box in boxes],
    }
    # The huge box is hit once and cannot be hit again; other huge detections hit nothing.
    places = [huge, huge, [9e5, 0, 2e5, 1e5], [0, 0, 50, 45], [700, 700, 9, 9], [500, 500, 50, 50]]
    results = [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9 - 0.1 * number}
        for number, box in enumerate(places)
    ]
    found = average_precision(match_results(results, index_ground_truth(truth)))
    assert_equals_pycocotools(found, truth, results)


def test_average_precision_equals_pycocotools_on_real_ground_truth(shared_data: Path) -> None:
    content = json.loads((shared_data / "bccd" / "val.json").read_text())
    rng = np.random.default_rng(0)
    results = []
    for annotation in content["annotations"]:
        for _ in range(2):
            moved = np.array(annotation["bbox"]) + rng.normal(0, 6, 4)
            results.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": annotation["category_id"],
                    "bbox": moved.clip(1).round(2).tolist(),
                    "score": float(rng.random().__round__(3)),
                }
            )
    matched = match_results(results, index_ground_truth(content))
    assert_equals_pycocotools(average_precision(matched), content, results)
    kept = [found for found in results if found["score"] > 0.5]
    found = average_precision(matched, score_thresholds=[0.5] * len(content["categories"]))
    assert_equals_pycocotools(found, content, kept)


@pytest.mark.parametrize("start", [0, 4])
def test_average_precision_equals_pycocotools_when_two_boxes_overlap_equally(start: int) -> None:
    # The first detection overlaps both boxes by 80 / 120 and takes the last one, so that the second
    # hits only where it lies on the first box: with the other box its overlap is 60 / 140.
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [x, 0, 10, 10]} for x in (0, 4)],
    }
    results: list[dict[str, Any]] = [
        {"image_id": 1, "category_id": 1, "bbox": [x, 0, 10, 10], "score": score}
        for x, score in ((2, 0.9), (start, 0.8))
    ]
    found = average_precision(match_results(results, index_ground_truth(truth)))
    assert_equals_pycocotools(found, truth, results)
    ap50 = found.AP50
    assert ap50 == pytest.approx(1.0 if start == 0 else 51 / 101)
