from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retinaray.data.coco import (
    Category,
    CocoDataset,
    ImageRecord,
    coco_ground_truth,
    load_coco,
)
from retinaray.errors import DatasetError

Document = dict[str, Any]
VALID: Document = {
    "images": [
        {"id": 20, "file_name": "b.jpg", "height": 50, "width": 100},
        {"id": 10, "file_name": "sub/a.jpg", "height": 200, "width": 300},
        {"id": 30, "file_name": "c.jpg", "height": 60, "width": 60},
    ],
    "annotations": [
        {"id": 1, "image_id": 20, "category_id": 7, "bbox": [90, 40, 20, 30], "iscrowd": 1},
        {"id": 2, "image_id": 10, "category_id": 3, "bbox": [10.5, 20, 30, 40], "area": 600},
        {"id": 3, "image_id": 20, "category_id": 3, "bbox": [-5, 0, 10, 10], "area": 100},
    ],
    "categories": [{"id": 7, "name": "plate"}, {"id": 3, "name": "car"}],
}


def as_bytes(document: Document) -> bytes:
    return json.dumps(document).encode()


def changed(table: str, index: int, **values: Any) -> Document:
    document = copy.deepcopy(VALID)
    document[table][index].update(values)
    return document


def without(table: str, index: int, key: str) -> Document:
    document = copy.deepcopy(VALID)
    del document[table][index][key]
    return document


def renamed_ids(image_ids: dict[int, Any], category_ids: dict[int, Any]) -> Document:
    document = copy.deepcopy(VALID)
    for image in document["images"]:
        image["id"] = image_ids[image["id"]]
    for category in document["categories"]:
        category["id"] = category_ids[category["id"]]
    for annotation in document["annotations"]:
        annotation["image_id"] = image_ids[annotation["image_id"]]
        annotation["category_id"] = category_ids[annotation["category_id"]]
    return document


def load(document: Document, **options: Any) -> CocoDataset:
    return load_coco(as_bytes(document), source="train.json", **options)


def test_load_coco_orders_images_and_categories_by_id() -> None:
    dataset = load(VALID)
    assert dataset.images == (
        ImageRecord(10, "sub/a.jpg", 200, 300),
        ImageRecord(20, "b.jpg", 50, 100),
        ImageRecord(30, "c.jpg", 60, 60),
    )
    assert dataset.categories.categories == (Category(3, "car"), Category(7, "plate"))
    assert len(dataset) == 3


def test_load_coco_is_the_same_when_the_tables_are_shuffled() -> None:
    shuffled = {key: list(reversed(VALID[key])) for key in VALID}
    shuffled["annotations"] = VALID["annotations"]
    first, second = load(VALID), load(shuffled)
    assert first.images == second.images
    assert first.categories == second.categories
    np.testing.assert_array_equal(first.boxes_xyxy, second.boxes_xyxy)


def test_targets_are_clipped_corners_in_file_order() -> None:
    targets = load(VALID).targets(1)  # image 20: height 50, width 100
    # [90, 40, 20, 30] ends at (110, 70), cut to (100, 50); [-5, 0, 10, 10] starts at 0.
    np.testing.assert_array_equal(targets.boxes_xyxy, [[90, 40, 100, 50], [0, 0, 5, 10]])
    np.testing.assert_array_equal(targets.class_indices, [1, 0])
    np.testing.assert_array_equal(targets.is_crowd, [True, False])
    # No area given: what is left of the box, 10 x 10. The other keeps the file's 100.
    np.testing.assert_array_equal(targets.area, [100, 100])


def test_targets_keep_the_mask_area_of_the_file() -> None:
    targets = load(VALID).targets(0)
    np.testing.assert_array_equal(targets.boxes_xyxy, [[10.5, 20, 40.5, 60]])
    np.testing.assert_array_equal(targets.area, [600])


def test_targets_are_empty_with_their_dtypes_when_the_image_has_no_boxes() -> None:
    targets = load(VALID).targets(2)
    assert targets.boxes_xyxy.shape == (0, 4)
    assert targets.boxes_xyxy.dtype == np.float32
    assert targets.class_indices.dtype == np.int64
    assert targets.is_crowd.dtype == np.bool_
    assert targets.area.dtype == np.float32


def test_targets_may_be_changed_by_the_caller() -> None:
    dataset = load(VALID)
    dataset.targets(1).boxes_xyxy[:] = 0
    assert dataset.targets(1).boxes_xyxy[0, 0] == 90


@pytest.mark.parametrize("position", [-1, 3])
def test_targets_refuses_a_position_outside_the_data_set(position: int) -> None:
    with pytest.raises(IndexError, match=f"image {position} of 3"):
        load(VALID).targets(position)


@pytest.mark.parametrize(
    ("image_ids", "category_ids"),
    [
        pytest.param((1, 5, 900_000), (2, 99), id="sparse"),
        pytest.param((2**31 + 1, 2**53 + 1, 2**70), (2**31, 2**64), id="huge"),
        pytest.param((-3, 0, 4), (0, 1), id="zero and negative"),
        pytest.param(("7", "8", "a b"), ("cat-3", "dog"), id="strings"),
        pytest.param(("1", "10", "2"), (1, 2), id="string images, int categories"),
    ],
)
def test_load_coco_keeps_ids_as_they_are(
    image_ids: tuple[Any, ...], category_ids: tuple[Any, ...]
) -> None:
    document = renamed_ids(
        dict(zip((10, 20, 30), image_ids, strict=True)),
        dict(zip((3, 7), category_ids, strict=True)),
    )
    dataset = load(document)
    assert tuple(image.image_id for image in dataset.images) == image_ids
    assert dataset.categories.ids == category_ids
    assert [dataset.categories.index_of(value) for value in category_ids] == [0, 1]
    written = json.loads(json.dumps(coco_ground_truth(dataset)))
    assert {image["id"] for image in written["images"]} == set(image_ids)
    assert {entry["category_id"] for entry in written["annotations"]} == set(category_ids)


@pytest.mark.parametrize(
    ("name", "shown"), [(None, "3"), ("", "3"), ("car", "car")], ids=["null", "empty", "given"]
)
def test_category_name_is_its_id_when_absent(name: str | None, shown: str) -> None:
    assert load(changed("categories", 1, name=name)).categories.names == (shown, "plate")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        pytest.param(
            changed("annotations", 1, category_id="3"),
            r'annotation 2 of image 10: category_id is "3"; `retinaray doctor --fix`',
            id="string reference",
        ),
        pytest.param(
            changed("annotations", 1, image_id=10.0), "image_id is 10.0", id="float reference"
        ),
        pytest.param(
            changed("images", 2, id="30"), r'mixed_id_types, 1 in all: image "30"', id="mixed table"
        ),
        pytest.param(
            changed("annotations", 1, image_id=99),
            "unknown_image, 1 in all: annotation 2 of image 99",
            id="unknown image",
        ),
        pytest.param(
            changed("annotations", 1, category_id=4),
            "unknown_category, 1 in all: annotation 2 of image 10: category_id is 4",
            id="unknown category",
        ),
        pytest.param(without("annotations", 1, "image_id"), "image_id is null", id="no image_id"),
        pytest.param(without("annotations", 1, "bbox"), "missing_bbox, 1 in all", id="no bbox"),
        pytest.param(
            changed("annotations", 1, bbox=[1, 2, 3]), r"bbox is \[1, 2, 3\]", id="short bbox"
        ),
        pytest.param(
            changed("annotations", 1, bbox=["1", "2", "3", "4"]), "string_bbox", id="string bbox"
        ),
        pytest.param(
            changed("annotations", 1, bbox=[1, 2, 3, True]), "unusable_bbox", id="boolean in bbox"
        ),
        pytest.param(changed("annotations", 1, iscrowd=2), "iscrowd is 2", id="iscrowd 2"),
        pytest.param(without("images", 1, "height"), "missing_size, 1 in all", id="no height"),
        pytest.param(changed("images", 1, width="300"), "missing_size", id="string width"),
        pytest.param(changed("images", 1, width=0), "missing_size", id="zero width"),
        pytest.param(without("images", 1, "file_name"), "missing_file_name", id="no file_name"),
        pytest.param(
            changed("images", 1, file_name="../a.jpg"), "leads out of the image", id="escaping"
        ),
        pytest.param(without("images", 1, "id"), r"invalid_ids, 1 in all: images\[1\]", id="no id"),
        pytest.param(changed("images", 2, id=True), "invalid_ids", id="boolean id"),
        pytest.param(
            changed("images", 2, id=20), r"conflicting_image_ids.*image 20 \(c.jpg\)", id="image id"
        ),
        pytest.param(
            changed("images", 2, id=20, file_name="b.jpg"), "duplicate_image_ids", id="image twice"
        ),
        pytest.param(
            changed("categories", 1, id=7), "conflicting_category_ids, 1 in all", id="category id"
        ),
        pytest.param({**VALID, "categories": []}, "no_categories", id="no categories"),
    ],
)
def test_load_coco_refuses_a_file_without_one_meaning(document: Document, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load(document)


def test_load_coco_lists_every_kind_of_fault_with_counts_and_examples() -> None:
    document = copy.deepcopy(VALID)
    del document["images"][0]["width"]
    for number in range(4, 9):
        document["annotations"].append(
            {"id": number, "image_id": 77, "category_id": 3, "bbox": [0, 0, 5, 5]}
        )
    with pytest.raises(DatasetError) as caught:
        load(document, num_classes=5)
    lines = str(caught.value).splitlines()
    assert lines[0] == "train.json: 3 kinds of fault"
    assert lines[1].startswith("  - missing_size, 1 in all: image 20 (b.jpg);")
    assert lines[2].startswith("  - unknown_image, 5 in all: annotation 4 of image 77")
    assert lines[2].count("annotation ") == 3
    assert lines[3] == (
        "  - num_classes is 5, but `categories` has 2: 7 plate, 3 car; background is not counted: "
        "give --classes 2, or leave it out"
    )


BAD_BOXES = [
    pytest.param([10, 5, 0, 4], "zero", "box (10, 5, 0, 4) has zero width", id="zero width"),
    pytest.param([10, 5, 0, 0], "zero", "has zero width and height", id="zero both"),
    pytest.param([10, 5, -3, 4], "negative", "has negative width", id="negative"),
    pytest.param([10, float("nan"), 3, 4], "non_finite", "is not finite", id="nan"),
    pytest.param([10, 5, float("inf"), 4], "non_finite", "is not finite", id="infinite"),
    pytest.param([1e308, 5, 1e308, 4], "non_finite", "is not finite", id="overflow"),
    pytest.param(
        [300, 5, 3, 4],
        "outside",
        "lies outside its image (height 200, width 300)",
        id="right of it",
    ),
    pytest.param([-9, 5, 9, 4], "outside", "(height 200, width 300)", id="left of it"),
    pytest.param([200, 5, 1e-9, 4], "zero", "has zero size in single precision", id="vanishing"),
]


@pytest.mark.parametrize(("bbox", "reason", "text"), BAD_BOXES)
def test_load_coco_drops_bad_boxes_with_one_warning(
    bbox: list[float], reason: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        dataset = load(changed("annotations", 1, bbox=bbox))
    assert dataset.num_dropped_boxes == {reason: 1}
    assert dataset.targets(0).boxes_xyxy.shape == (0, 4)
    assert len(dataset) == 3
    (record,) = caplog.records
    assert "train.json: dropped 1 of 3 boxes: annotation 2 of image 10: box (" in record.message
    assert text in record.message


@pytest.mark.parametrize(("bbox", "reason", "text"), BAD_BOXES)
def test_load_coco_refuses_bad_boxes_when_asked(bbox: list[float], reason: str, text: str) -> None:
    with pytest.raises(DatasetError) as caught:
        load(changed("annotations", 1, bbox=bbox), on_bad_box="error")
    assert "annotation 2 of image 10: box (" in str(caught.value)
    assert f"{text}; fix or drop it (data.on_bad_box)" in str(caught.value)


def test_load_coco_says_nothing_when_all_boxes_are_good(caplog: pytest.LogCaptureFixture) -> None:
    assert load(VALID).num_dropped_boxes == {}
    assert not caplog.records


def test_load_coco_refuses_an_unknown_way_with_bad_boxes() -> None:
    with pytest.raises(ValueError, match="on_bad_box"):
        load(VALID, on_bad_box="keep")


@pytest.mark.parametrize("iscrowd", [1, True, 1.0, "1"])
def test_load_coco_reads_every_spelling_of_a_crowd_flag(iscrowd: object) -> None:
    assert load(changed("annotations", 1, iscrowd=iscrowd)).targets(0).is_crowd.tolist() == [True]


@pytest.mark.parametrize("area", [None, "600", float("nan"), -1, True])
def test_load_coco_computes_the_area_when_the_file_has_none(area: object) -> None:
    # bbox [10.5, 20, 30, 40]: 30 x 40
    assert load(changed("annotations", 1, area=area)).targets(0).area.tolist() == [1200]


def test_load_coco_refuses_boxes_of_another_notation() -> None:
    document = copy.deepcopy(VALID)
    document["annotations"] = [
        {"id": n, "image_id": 10, "category_id": 3, "bbox": [0.1, 0.2, 0.05 * n, 0.1]}
        for n in range(1, 11)
    ]
    with pytest.raises(DatasetError, match="boxes_look_normalised, 10 in all"):
        load(document)
    for n, annotation in enumerate(document["annotations"]):
        annotation["bbox"] = [150 + n, 90 + n, 250 + n, 180 + n]  # corners, in a 300 x 200 image
    with pytest.raises(DatasetError, match=r"boxes_look_xyxy, 10 in all.*x1, y1, x2, y2"):
        load(document)


def test_load_coco_accepts_the_right_number_of_classes_and_no_images() -> None:
    empty = {**VALID, "images": [], "annotations": []}
    dataset = load(empty, num_classes=2)
    assert len(dataset) == 0
    assert dataset.offsets.tolist() == [0]


def test_dataset_survives_pickling() -> None:
    dataset = load(VALID)
    again = pickle.loads(pickle.dumps(dataset))
    assert again.images == dataset.images
    assert again.categories == dataset.categories
    assert again.categories.index_of(7) == 1
    for name in ("boxes_xyxy", "class_indices", "is_crowd", "area", "offsets"):
        np.testing.assert_array_equal(getattr(again, name), getattr(dataset, name))


def test_dataset_pickles_in_few_bytes_per_box() -> None:
    document = copy.deepcopy(VALID)
    document["annotations"] = [
        {"id": n + 1, "image_id": 10, "category_id": 3, "bbox": [n % 200, 5, 9, 9 + n % 90]}
        for n in range(10_000)
    ]
    # 16 B corners + 8 B class + 1 B crowd + 4 B area = 29 B per box.
    assert len(pickle.dumps(load(document))) < 30 * 10_000


@pytest.fixture
def read_by_pycocotools(tmp_path: Path) -> Callable[[Document], COCO]:
    def read(document: Document) -> COCO:
        path = tmp_path / "oracle.json"
        path.write_bytes(as_bytes(document))
        with contextlib.redirect_stdout(io.StringIO()):
            return COCO(str(path))

    return read


@pytest.mark.parametrize("split", ["train", "val"])
def test_load_coco_agrees_with_pycocotools_on_coco128(
    split: str, shared_data: Path, read_by_pycocotools: Callable[[Document], COCO]
) -> None:
    path = shared_data / "coco128" / f"{split}.json"
    dataset = load_coco(path, num_classes=80)
    oracle = read_by_pycocotools(json.loads(path.read_bytes()))
    assert dataset.categories.ids == tuple(sorted(oracle.getCatIds()))
    assert len(dataset) == len(oracle.getImgIds()) == 128
    for position, image in enumerate(dataset.images):
        annotations = oracle.loadAnns(oracle.getAnnIds(imgIds=[image.image_id]))
        targets = dataset.targets(position)
        xywh = np.array([entry["bbox"] for entry in annotations], np.float64).reshape(-1, 4)
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        np.testing.assert_allclose(targets.boxes_xyxy, corners, atol=1e-4)
        ids = [dataset.categories.ids[index] for index in targets.class_indices]
        assert ids == [entry["category_id"] for entry in annotations]
        np.testing.assert_allclose(
            targets.area, [entry["area"] for entry in annotations], rtol=1e-6
        )


def test_coco_ground_truth_scores_one_against_itself(
    read_by_pycocotools: Callable[[Document], COCO],
) -> None:
    dataset = load(changed("annotations", 0, iscrowd=0, id=0))
    truth = read_by_pycocotools(coco_ground_truth(dataset))
    detections = [{**entry, "score": 0.5} for entry in coco_ground_truth(dataset)["annotations"]]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)
