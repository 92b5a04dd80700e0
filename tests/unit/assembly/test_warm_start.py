"""A sweep's first trials."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from retinaray.anchoring.coverage import measure_coverage, select_boxes
from retinaray.assembly.training import TrainingInputs
from retinaray.assembly.warm_start import make_first_points
from retinaray.config.loading import load_from_dict, to_dict
from retinaray.config.schema import TrainJob
from retinaray.config.search_space import BASE_SCALE, NUM_SCALES, make_changes, parse_space
from retinaray.data.coco import load_coco
from retinaray.detector.anchors import DEFAULT_SCALES, AnchorSpec

JobFactory = Callable[..., TrainJob]
Points = list[tuple[str, dict[str, object]]]
FirstPoints = Callable[..., Points]


@pytest.fixture(scope="module")
def inputs() -> TrainingInputs:
    """64 squares of 12 px, each around the middle of a cell of 8 px of a 256x256 canvas."""
    corners = [(x + 4 - 6, y + 4 - 6) for x in range(16, 240, 32) for y in range(16, 256, 32)]
    coco: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 256, "width": 256}],
        "categories": [{"id": 1, "name": "car"}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 1, "bbox": [x, y, 12, 12], "area": 144}
            for n, (x, y) in enumerate(corners, start=1)
        ],
    }
    dataset = load_coco(json.dumps(coco).encode(), source="made.json")
    return TrainingInputs(train=dataset, val=None, canvas=(256, 256))


@pytest.fixture
def first_points(make_train_job: JobFactory, inputs: TrainingInputs) -> FirstPoints:
    """make_first_points(space, changes of the training)."""

    def make(space: dict[str, object], changes: dict[str, object] | None = None) -> Points:
        tree = to_dict(make_train_job(changes))
        return make_first_points(parse_space(space, TrainJob), tree, inputs)

    return make


def test_make_first_points_gives_default_halved_and_fitted(first_points: FirstPoints) -> None:
    points = first_points({BASE_SCALE: {"loguniform": [1.0, 8.0]}, NUM_SCALES: [1, 2, 3]})
    assert [name for name, _ in points] == ["default", "halved", "fitted"]
    assert points[0][1] == {BASE_SCALE: 4.0, NUM_SCALES: 3}
    assert points[1][1] == {BASE_SCALE: 2.0, NUM_SCALES: 3}
    # A square of 12 px in the middle of a cell of 8 px: scale 1.5 is the box itself, and the
    # cheapest that reaches it has one scale: side s with (12 / s)^2 >= 0.5 or (s / 12)^2 >= 0.5.
    fitted = points[2][1]
    assert fitted[NUM_SCALES] == 1
    assert 12 * 0.5**0.5 <= 8 * float(str(fitted[BASE_SCALE])) <= 12 / 0.5**0.5


def test_make_first_points_fits_what_reaches_most(
    first_points: FirstPoints, inputs: TrainingInputs, make_train_job: JobFactory
) -> None:
    space: dict[str, object] = {
        BASE_SCALE: {"uniform": [1.5, 6.0]},
        NUM_SCALES: [1, 2],
        "anchors.ratios": [[4.0], [0.25], [1.0]],
        "anchors.levels": ["2-7", "3-7"],
    }
    fitted = dict(first_points(space))["fitted"]
    tree = to_dict(make_train_job())
    anchors = load_from_dict(TrainJob, tree, make_changes(fitted, tree)).anchors
    spec = AnchorSpec(anchors.scales, anchors.ratios, anchors.strides)
    boxes = select_boxes(inputs.train, inputs.canvas)
    assert measure_coverage(boxes, spec).all.share_iou_50 == 1.0
    assert fitted["anchors.ratios"] == [1.0]
    # P2 costs four times the anchors and reaches nothing more.
    assert fitted["anchors.levels"] == "3-7"
    assert all(domain.holds(fitted[domain.key]) for domain in parse_space(space, TrainJob))


def test_make_first_points_leaves_out_what_is_outside_the_space(first_points: FirstPoints) -> None:
    points = first_points({BASE_SCALE: {"uniform": [1.0, 3.0]}})
    assert [name for name, _ in points] == ["halved", "fitted"]
    points = first_points({BASE_SCALE: [1.0, 1.5]})
    assert [name for name, _ in points] == ["fitted"]
    assert points[0][1] == {BASE_SCALE: 1.5}
    points = first_points({BASE_SCALE: {"uniform": [1.0, 8.0]}, NUM_SCALES: [2]})
    assert [name for name, _ in points] == ["fitted"]


def test_make_first_points_takes_whole_scales_from_the_choices(first_points: FirstPoints) -> None:
    halved = [scale / 2 for scale in DEFAULT_SCALES]
    choices = [[1.5], halved, list(DEFAULT_SCALES)]
    points = dict(first_points({"anchors.scales": choices}))
    assert points == {
        "default": {"anchors.scales": choices[2]},
        "halved": {"anchors.scales": choices[1]},
        "fitted": {"anchors.scales": choices[0]},
    }


def test_make_first_points_is_empty_when_no_anchors_are_searched(first_points: FirstPoints) -> None:
    assert first_points({"optim.peak_lr": {"loguniform": [1e-4, 1e-2]}, "run.seed": [1, 2]}) == []


@pytest.mark.parametrize("key", ["anchors.ratios", "anchors.levels"])
def test_make_first_points_repeats_no_point(first_points: FirstPoints, key: str) -> None:
    choices = {"anchors.ratios": [[1.0, 2.0, 0.5], [1.0]], "anchors.levels": ["3-7", "2-7"]}
    points = [point for _, point in first_points({key: choices[key]})]
    assert 1 <= len(points) <= 2
    assert points[0] == {key: choices[key][0]}
    assert all(point not in points[:index] for index, point in enumerate(points))


def test_make_first_points_have_the_training_s_own_value_at_every_other_key(
    first_points: FirstPoints,
) -> None:
    space = {
        "run.batch": {"quniform": [2, 16, 2]},
        BASE_SCALE: {"loguniform": [1.0, 8.0]},
        "optim.peak_lr": {"loguniform": [1e-4, 1e-2]},
        "model.backbone": ["ResNet18FPN", "ResNet10FPN"],
        "data.size": [None, [64, 96]],
    }
    points = first_points(space, {"run.batch": 12, "optim.peak_lr": 0.003})
    assert [name for name, _ in points] == ["default", "halved", "fitted"]
    for _, point in points:
        assert list(point) == list(space)
        others = {key: value for key, value in point.items() if key != BASE_SCALE}
        assert others == {
            "run.batch": 12,
            "optim.peak_lr": 0.003,
            "model.backbone": "ResNet10FPN",
            "data.size": None,
        }


def test_make_first_points_have_the_middle_when_the_training_s_value_is_not_in_the_space(
    first_points: FirstPoints,
) -> None:
    # The training's own learning rate is none, its batch 8.
    points = first_points(
        {
            BASE_SCALE: {"loguniform": [1.0, 8.0]},
            "optim.peak_lr": {"loguniform": [1e-4, 1e-2]},
            "run.batch": {"quniform": [10, 20, 2]},
        }
    )
    assert len(points) == 3
    for _, point in points:
        assert point["optim.peak_lr"] == pytest.approx(1e-3)
        assert point["run.batch"] in (14, 16)


def test_make_first_points_write_lists_as_the_space_does(first_points: FirstPoints) -> None:
    # Search algorithms compare texts: [1, 2, 0.5] and [1.0, 2.0, 0.5] are not the same choice.
    space: dict[str, object] = {"anchors.ratios": [[1, 2, 0.5], [1, 3]], BASE_SCALE: [4, 2, 8]}
    for _, point in first_points(space):
        assert repr(point["anchors.ratios"]) in ("[1, 2, 0.5]", "[1, 3]")
        assert repr(point[BASE_SCALE]) in ("4", "2", "8")


@pytest.mark.parametrize(
    ("domain", "wanted"),
    [
        # (1.5 - 0.1) / 0.1 is 13.999...: the last step must not be lost.
        ({"quniform": [0.1, 1.5, 0.1]}, 1.5),
        ({"uniform": [0.25, 1.5]}, 1.5),
        ([0.25, 1.5], 1.5),
    ],
)
def test_make_first_points_fit_up_to_the_end_of_the_range(
    first_points: FirstPoints, domain: object, wanted: float
) -> None:
    # Scale 1.5 is the box itself; others reach IoU 0.5 as well, but less of it.
    space = {BASE_SCALE: domain, NUM_SCALES: [1]}
    (fitted,) = [point for name, point in first_points(space) if name == "fitted"]
    assert fitted[BASE_SCALE] == pytest.approx(wanted)
