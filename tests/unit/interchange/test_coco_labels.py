from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from retinaray.errors import DatasetError
from retinaray.interchange.coco_labels import read_coco, read_coco_results, write_coco

Document = dict[str, list[dict[str, Any]]]


def test_read_coco_keeps_numbers_ids_and_order(street_file: Path, street: Document) -> None:
    labels = read_coco(street_file)
    assert [image.image_id for image in labels.images] == [42, 7, 99]
    # Classes by id, as everywhere in this package.
    assert (labels.names, labels.category_ids) == (("人", "Ampel rot"), (4, 9))
    assert [box.xywh for box in labels.boxes] == [tuple(a["bbox"]) for a in street["annotations"]]


def test_write_coco_gives_back_the_same_document(street_file: Path, street: Document) -> None:
    street["annotations"][0]["iscrowd"] = 1
    street["annotations"][1] |= {"attributes": {"difficult": True}, "score": 0.25}
    street_file.write_text(json.dumps(street))
    back = json.loads(write_coco(read_coco(street_file)))
    assert back["images"] == street["images"]
    assert back["annotations"] == street["annotations"]
    assert back["categories"] == street["categories"][::-1]


def test_read_coco_counts_what_it_leaves_out(street_file: Path, street: Document) -> None:
    street["annotations"][0]["segmentation"] = [[0, 0, 5, 0, 5, 5]]
    street["annotations"][1]["bbox"] = [3, 3, 0, 5]
    street_file.write_text(json.dumps(street))
    assert read_coco(street_file).notes == {
        "segmentations are left out": 1,
        "boxes that enclose nothing of their image are left out": 1,
    }


def test_read_coco_refuses_two_classes_of_one_name(street_file: Path, street: Document) -> None:
    street["categories"][0]["name"] = "人"
    street_file.write_text(json.dumps(street))
    with pytest.raises(DatasetError, match="two categories are called '人'"):
        read_coco(street_file)


def test_read_coco_results_puts_detections_on_the_images_of_the_reference(
    street_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "found.json"
    path.write_text('[{"image_id": 7, "category_id": 9, "bbox": [1, 2, 3, 4], "score": 0.5}]')
    labels = read_coco_results(path, read_coco(street_file))
    assert [len(image.boxes) for image in labels.images] == [0, 1, 0]
    (box,) = labels.boxes
    assert (box.name, box.xywh, box.score) == ("Ampel rot", (1, 2, 3, 4), 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 8}, r"entry 0: image_id 8 is not in the file of --reference"),
        ({"category_id": "x"}, r"entry 0: category_id 'x' is not in"),
        ({"bbox": [1, 2, 3]}, r"entry 0: expected bbox \[x, y, width, height\] and score"),
        ({"score": None}, r"entry 0: expected bbox .* found \[1, 2, 3, 4\] and None"),
        ({"bbox": [1, 2, 0, 4]}, r"entry 0: expected a box with width and height > 0"),
    ],
)
def test_read_coco_results_names_the_entry_when_input_is_bad(
    change: dict[str, Any], message: str, street_file: Path, tmp_path: Path
) -> None:
    entry = {"image_id": 7, "category_id": 9, "bbox": [1, 2, 3, 4], "score": 0.5}
    path = tmp_path / "found.json"
    path.write_text(json.dumps([entry | change]))
    with pytest.raises(DatasetError, match=message):
        read_coco_results(path, read_coco(street_file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "expected COCO results, a list; found a dict"),
        ("[1]", "entry 0: expected an object"),
        ("[", "cannot parse it"),
    ],
)
def test_read_coco_results_refuses_other_files(
    text: str, message: str, street_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "found.json"
    path.write_text(text)
    with pytest.raises(DatasetError, match=message):
        read_coco_results(path, read_coco(street_file))
