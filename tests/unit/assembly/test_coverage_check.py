"""What is said before a training about boxes that its anchors cannot reach."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest

from retinaray.assembly.coverage_check import check_coverage
from retinaray.assembly.training import TrainingInputs, read_inputs
from retinaray.config.schema import TrainJob
from retinaray.data.coco import load_coco
from retinaray.errors import ConfigError

JobFactory = Callable[..., TrainJob]
MakeInputs = Callable[..., TrainingInputs]

# A square of 32 px around (36, 36), the middle of a cell of 8 px, is the default's own anchor;
# of 8 px it shares 64 px with an anchor of 1024: IoU 0.06.
FITTING = [20, 20, 32, 32]
TINY = [32, 32, 8, 8]


@pytest.fixture
def make_inputs() -> MakeInputs:
    """One image of 256x256 with these boxes per class, on a canvas of its own size."""

    def make(**boxes_of_class: list[list[int]]) -> TrainingInputs:
        boxes = [(k, b) for k, rows in enumerate(boxes_of_class.values(), start=1) for b in rows]
        coco: dict[str, Any] = {
            "images": [{"id": 1, "file_name": "1.jpg", "height": 256, "width": 256}],
            "categories": [{"id": k, "name": name} for k, name in enumerate(boxes_of_class, 1)],
            "annotations": [
                {
                    "id": number,
                    "image_id": 1,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
                for number, (category, box) in enumerate(boxes, start=1)
            ],
        }
        dataset = load_coco(json.dumps(coco).encode(), source="made.json")
        return TrainingInputs(train=dataset, val=None, canvas=(256, 256))

    return make


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_check_coverage_is_silent_when_every_box_is_reached(
    make_train_job: JobFactory, make_inputs: MakeInputs, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    job = make_train_job({"run.strict_anchors": True})
    report = check_coverage(job, make_inputs(car=[FITTING] * 3))
    assert (report.all.count, report.all.num_iou_50) == (3, 3)
    assert report.all.mean_best_iou == pytest.approx(1.0)
    assert _warnings(caplog) == []
    assert "anchors reach 100.0 % of 3 boxes at IoU 0.5" in caplog.text


def test_check_coverage_warns_with_names_and_counts(
    make_train_job: JobFactory, make_inputs: MakeInputs, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = make_inputs(car=[FITTING] * 5 + [TINY], bus=[FITTING], cyclist=[TINY] * 3)
    report = check_coverage(make_train_job(), inputs)
    assert report.all.count - report.all.num_iou_50 == 4
    (text,) = _warnings(caplog)
    # 4 of 10; most first; a class that lost nothing is not named.
    assert text.startswith(
        "4 of 10 boxes (40.0 %) have no anchor with IoU 0.5 (cyclist 3 of 3, car 1 of 6): "
        "they are learnt through their best anchor only. Find better anchors with "
        "`retinaray anchors --annotations "
    )
    assert text.endswith("annotations.json --resize 64 --max-size 96 --fit`")


def test_check_coverage_says_background_when_best_anchors_do_not_count(
    make_train_job: JobFactory, make_inputs: MakeInputs, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_train_job({"loss.keep_best_anchor": False, "data.size": [256, 320]})
    check_coverage(job, make_inputs(car=[TINY]))
    (text,) = _warnings(caplog)
    assert "without loss.keep_best_anchor they are trained as BACKGROUND" in text
    assert "--size 256 320 --fit`" in text


def test_check_coverage_refuses_when_it_is_strict(
    make_train_job: JobFactory, make_inputs: MakeInputs
) -> None:
    job = make_train_job({"run.strict_anchors": True})
    with pytest.raises(
        ConfigError, match=r"^run\.strict_anchors=true: 1 of 2 boxes \(50\.0 %\).*\(car 1 of 2\)"
    ):
        check_coverage(job, make_inputs(car=[FITTING, TINY]))


@pytest.mark.parametrize(("num_fitting", "is_warned"), [(99, False), (98, True)])
def test_check_coverage_lets_one_box_in_a_hundred_go(
    make_train_job: JobFactory,
    make_inputs: MakeInputs,
    caplog: pytest.LogCaptureFixture,
    num_fitting: int,
    is_warned: bool,
) -> None:
    check_coverage(make_train_job(), make_inputs(car=[FITTING] * num_fitting + [TINY]))
    assert bool(_warnings(caplog)) is is_warned


def test_check_coverage_measures_the_anchors_of_the_job(
    make_train_job: JobFactory, make_inputs: MakeInputs, caplog: pytest.LogCaptureFixture
) -> None:
    # Scale 1 at stride 8: an anchor of 8 px in the middle of each cell, here the box itself.
    job = make_train_job({"anchors.scales": [1.0, 4.0]})
    report = check_coverage(job, make_inputs(car=[TINY, FITTING]))
    assert report.all.num_iou_50 == 2
    assert _warnings(caplog) == []


def test_check_coverage_counts_classes_beyond_a_dozen(
    make_train_job: JobFactory, make_inputs: MakeInputs, caplog: pytest.LogCaptureFixture
) -> None:
    check_coverage(make_train_job(), make_inputs(**{f"class{n}": [TINY] for n in range(15)}))
    (text,) = _warnings(caplog)
    assert len(re.findall(r"class\d+ 1 of 1", text)) == 12
    assert " and 3 more classes)" in text


def test_check_coverage_takes_a_set_without_boxes(
    make_train_job: JobFactory, make_inputs: MakeInputs, caplog: pytest.LogCaptureFixture
) -> None:
    report = check_coverage(make_train_job({"run.strict_anchors": True}), make_inputs(car=[]))
    assert report.all.count == 0
    assert _warnings(caplog) == []


def test_check_coverage_reads_what_a_training_reads(make_train_job: JobFactory) -> None:
    job = make_train_job({"anchors.scales": [1.0, 2.0, 4.0]})
    inputs = read_inputs(job)
    assert check_coverage(job, inputs).all.count == len(inputs.train.boxes_xyxy)
