"""Our scores against pycocotools run by itself on the same files."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retinaray.evaluation.coco_map import TWELVE, CocoScores, evaluate_detections
from retinaray.reporting.score_table import render_scores

Rows = list[dict[str, Any]]

REAL_SETS = ["bccd/test.json", "coco128/val.json", "aerial_cars/test.json"]


def make_detections(truth: dict[str, Any], seed: int = 0) -> Rows:
    """Ground truth shifted and resized, some of it lost, doubled or of a wrong class."""
    rng = np.random.default_rng(seed)
    classes = [category["id"] for category in truth["categories"]]
    detections = []
    for annotation in truth["annotations"]:
        for _ in range(int(rng.choice([0, 1, 1, 1, 2]))):
            x, y, width, height = annotation["bbox"]
            shift = rng.normal(0, 0.12, 4)
            is_wrong = rng.random() < 0.1
            category = int(rng.choice(classes)) if is_wrong else annotation["category_id"]
            detections.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": category,
                    "bbox": [
                        round(float(x + shift[0] * width), 2),
                        round(float(y + shift[1] * height), 2),
                        round(float(width * np.exp(shift[2])), 2),
                        round(float(height * np.exp(shift[3])), 2),
                    ],
                    # Two decimals: scores tie, and ties must fall as they do in pycocotools.
                    "score": round(float(rng.random()), 2),
                }
            )
    return detections


def run_pycocotools(
    truth: dict[str, Any], detections: Rows, category_id: int | None = None
) -> COCOeval:
    """COCOeval as its authors use it: ground truth from a file's content, results by loadRes."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        ground.dataset = copy.deepcopy(truth)
        ground.createIndex()
        evaluator = COCOeval(ground, ground.loadRes(copy.deepcopy(detections)), "bbox")
        if category_id is not None:
            evaluator.params.catIds = [category_id]
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def expect(value: float) -> float | None:
    return None if value == -1 else value


@pytest.fixture(scope="module", params=REAL_SETS)
def real_case(
    request: pytest.FixtureRequest, shared_data: Path
) -> tuple[dict[str, Any], Rows, CocoScores]:
    """Real ground truth, invented detections, and our scores of them."""
    truth = json.loads((shared_data / request.param).read_text())
    detections = make_detections(truth)
    return truth, detections, evaluate_detections(truth, detections)


@pytest.fixture
def small_truth() -> dict[str, Any]:
    """Two images, three classes of which the last has no box."""
    boxes = [(1, 1, [10, 10, 20, 20]), (1, 2, [50, 50, 40, 40]), (2, 1, [0, 0, 100, 100])]
    return {
        "images": [{"id": number, "height": 200, "width": 200} for number in (1, 2)],
        "categories": [{"id": number, "name": f"class {number}"} for number in (1, 2, 3)],
        "annotations": [
            {
                "id": number,
                "image_id": image,
                "category_id": category,
                "bbox": bbox,
                "area": bbox[2] * bbox[3],
                "iscrowd": 0,
            }
            for number, (image, category, bbox) in enumerate(boxes, start=1)
        ],
    }


def as_detections(truth: dict[str, Any]) -> Rows:
    keys = ("image_id", "category_id", "bbox")
    return [{**{k: a[k] for k in keys}, "score": 0.9} for a in truth["annotations"]]


def test_all_twelve_numbers_equal_pycocotools_on_real_annotations(
    real_case: tuple[dict[str, Any], Rows, CocoScores],
) -> None:
    truth, detections, scores = real_case
    expected = run_pycocotools(truth, detections).stats
    assert list(scores.summary) == list(TWELVE)
    assert list(scores.summary.values()) == [expect(value) for value in expected]
    assert 0.2 < scores.summary["AP50"] < 0.9
    assert scores.num_images == len(truth["images"])
    assert scores.num_detections == len(detections)


def test_each_class_equals_pycocotools_restricted_to_it(
    real_case: tuple[dict[str, Any], Rows, CocoScores],
) -> None:
    truth, detections, scores = real_case
    for entry in scores.classes[:12]:
        stats = run_pycocotools(truth, detections, int(entry.category_id)).stats
        named = dict(zip(TWELVE, map(expect, stats), strict=True))
        for name in ("AP", "AP50", "AP_small", "AP_medium", "AP_large", "AR_100"):
            assert getattr(entry, name) == named[name], (entry, name)
        assert entry.num_ground_truth == sum(
            a["category_id"] == entry.category_id and not a["iscrowd"] for a in truth["annotations"]
        )


def test_ground_truth_scored_against_itself_is_perfect(shared_data: Path) -> None:
    # No image of this set has more than 100 boxes, which is all that COCO counts.
    truth = json.loads((shared_data / "coco128" / "val.json").read_text())
    truth["annotations"] = [a for a in truth["annotations"] if not a["iscrowd"]]
    scores = evaluate_detections(truth, as_detections(truth))
    for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_100"):
        assert scores.summary[name] == pytest.approx(1.0, abs=1e-12)
    present = [entry for entry in scores.classes if entry.num_ground_truth]
    assert len(present) < len(scores.classes) == 80
    assert [entry.AP for entry in present] == pytest.approx([1.0] * len(present))
    assert {entry.AP for entry in scores.classes if not entry.num_ground_truth} == {None}


@pytest.mark.parametrize(
    "rename",
    [
        lambda number: f"Zürich/{number}.jpg",
        lambda number: 2**62 + number,
        lambda number: -number,
        lambda number: str(number),
        lambda number: number if number == 1 else str(number),
    ],
    ids=["names", "huge", "negative", "digits", "mixed"],
)
def test_scores_do_not_depend_on_what_the_ids_are(
    small_truth: dict[str, Any], rename: Callable[[int], int | str]
) -> None:
    detections = make_detections(small_truth, seed=2)
    renamed, renamed_detections = copy.deepcopy(small_truth), copy.deepcopy(detections)
    for record in [*renamed["images"], *renamed["categories"]]:
        record["id"] = rename(record["id"])
    for record in [*renamed["annotations"], *renamed_detections]:
        record["image_id"] = rename(record["image_id"])
        record["category_id"] = rename(record["category_id"])
    expected = evaluate_detections(small_truth, detections)
    found = evaluate_detections(renamed, renamed_detections)
    assert found.summary == expected.summary
    assert [entry.AP for entry in found.classes] == [entry.AP for entry in expected.classes]
    assert [entry.category_id for entry in found.classes] == [rename(n) for n in (1, 2, 3)]


def test_rows_belong_to_their_class_when_categories_are_not_sorted(
    small_truth: dict[str, Any],
) -> None:
    small_truth["categories"].reverse()
    detections = [row for row in as_detections(small_truth) if row["category_id"] == 2]
    scores = evaluate_detections(small_truth, detections)
    assert [entry.name for entry in scores.classes] == ["class 3", "class 2", "class 1"]
    assert scores.classes[0].AP is None
    assert [entry.AP for entry in scores.classes[1:]] == pytest.approx([1.0, 0.0])


def test_a_class_without_ground_truth_is_absent_and_does_not_lower_the_mean(
    small_truth: dict[str, Any],
) -> None:
    detections = as_detections(small_truth)
    detections.append({"image_id": 1, "category_id": 3, "bbox": [0, 0, 9, 9], "score": 1.0})
    scores = evaluate_detections(small_truth, detections)
    absent = scores.classes[2]
    assert absent.num_ground_truth == 0
    assert (absent.AP, absent.AP50, absent.AP_small, absent.AR_100) == (None,) * 4
    assert scores.summary["AP"] == 1.0
    assert scores.classes[0].AP_medium is None  # boxes of 20x20 and 100x100 only
    assert "absent" in render_scores(scores)


def test_no_detections_score_zero(small_truth: dict[str, Any]) -> None:
    scores = evaluate_detections(small_truth, [])
    assert scores.summary["AP"] == 0.0
    assert scores.summary["AR_100"] == 0.0
    assert [entry.AP for entry in scores.classes] == [0.0, 0.0, None]
    assert scores.num_detections == 0


@pytest.mark.parametrize("has_detections", [False, True])
def test_everything_is_absent_when_there_is_no_ground_truth(
    small_truth: dict[str, Any], has_detections: bool
) -> None:
    detections = as_detections(small_truth) if has_detections else []
    small_truth["annotations"] = []
    scores = evaluate_detections(small_truth, detections)
    assert set(scores.summary.values()) == {None}
    assert {entry.AP for entry in scores.classes} == {None}
    assert json.loads(json.dumps(scores.to_dict()))["AP"] is None


def test_crowds_are_ignored_regions_as_in_pycocotools(small_truth: dict[str, Any]) -> None:
    crowd = {"id": 9, "image_id": 1, "category_id": 1, "bbox": [60, 0, 140, 60], "iscrowd": 1}
    small_truth["annotations"].append(crowd | {"area": 8400})
    detections = as_detections(small_truth)[:-1]
    # Three boxes inside the crowd, better than anything else: no false positives.
    inside = [[70 + 20 * n, 5, 18, 30] for n in range(3)]
    detections += [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.99} for box in inside]
    scores = evaluate_detections(small_truth, detections)
    expected = run_pycocotools(small_truth, detections).stats
    assert list(scores.summary.values()) == [expect(value) for value in expected]
    assert scores.classes[0].AP == 1.0
    assert scores.classes[0].num_ground_truth == 2
    crowd["iscrowd"] = 0
    without = copy.deepcopy(small_truth)
    without["annotations"][-1]["iscrowd"] = 0
    assert evaluate_detections(without, detections).classes[0].AP < 0.8


@pytest.mark.parametrize("absent", [{}, {"area": None, "iscrowd": None}])
def test_missing_area_and_iscrowd_count_as_the_boxs_and_zero(
    small_truth: dict[str, Any], absent: dict[str, Any]
) -> None:
    detections = make_detections(small_truth, seed=3)
    expected = evaluate_detections(small_truth, detections)
    for annotation in small_truth["annotations"]:
        del annotation["area"], annotation["iscrowd"]
        annotation.update(absent)
    assert evaluate_detections(small_truth, detections) == expected


def test_annotations_with_id_zero_count(small_truth: dict[str, Any]) -> None:
    # pycocotools itself takes a match with annotation 0 for none.
    for annotation in small_truth["annotations"]:
        annotation["id"] -= 1
    detections = as_detections(small_truth)
    assert evaluate_detections(small_truth, detections).summary["AP"] == 1.0
    assert run_pycocotools(small_truth, detections).stats[0] < 1.0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"image_id": 3}, "detection 2 has image_id=3, which the ground truth does not have"),
        ({"image_id": "1"}, "detection 2 has image_id='1'"),
        ({"category_id": 0}, "detection 2 has category_id=0"),
    ],
)
def test_detections_of_an_unknown_image_or_class_are_refused(
    small_truth: dict[str, Any], change: dict[str, Any], text: str
) -> None:
    detections = as_detections(small_truth)
    detections[1] |= change
    with pytest.raises(ValueError, match=text):
        evaluate_detections(small_truth, detections)


@pytest.mark.parametrize("change", [{"image_id": 3}, {"category_id": "1"}])
def test_annotations_of_an_unknown_image_or_class_are_refused(
    small_truth: dict[str, Any], change: dict[str, Any]
) -> None:
    small_truth["annotations"][2] |= change
    ((key, value),) = change.items()
    with pytest.raises(ValueError, match=f"annotation 3 has {key}={value!r}"):
        evaluate_detections(small_truth, [])


def test_the_callers_values_are_left_as_they_are(small_truth: dict[str, Any]) -> None:
    detections = make_detections(small_truth)
    before = copy.deepcopy((small_truth, detections))
    evaluate_detections(small_truth, detections)
    assert (small_truth, detections) == before
