from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retinaray.data.dataset_doctor import examine_dataset
from retinaray.data.dataset_repair import repair_dataset
from retinaray.errors import DatasetError

Document = dict[str, Any]


def annotation(number: Any, image_id: Any, bbox: list[float], **values: Any) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image_id,
        "category_id": 1,
        "bbox": bbox,
        "area": bbox[2] * bbox[3],
        "iscrowd": 0,
        **values,
    }


def dataset(*annotations: dict[str, Any], image_ids: tuple[Any, ...] = (1, 2)) -> Document:
    return {
        "images": [
            {"id": value, "file_name": f"{value}.png", "height": 60, "width": 80}
            for value in image_ids
        ],
        "annotations": list(annotations),
        "categories": [{"id": 1, "name": "car"}],
    }


def repaired(folder: Path, document: Document, images_root: Path | None = None) -> Document:
    (folder / "in.json").write_text(json.dumps(document))
    repair_dataset(folder / "in.json", images_root, folder / "out.json")
    result: Document = json.loads((folder / "out.json").read_text())
    return result


def average_precision(path: Path, detections: list[dict[str, Any]]) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def test_repair_dataset_clips_and_keeps_what_it_does_not_know(tmp_path: Path) -> None:
    mask = {"segmentation": [[1, 2, 3, 4, 5, 6]], "area": 100, "track": {"id": 7}}
    document = dataset(
        annotation(1, 1, [70, 50.5, 20, 5.25]),  # 20 x 5.25 = 105, cut to 10 x 5.25
        annotation(2, 1, [-4, -6, 30, 20], **mask),  # cut to 26 x 14
        annotation(3, 2, [0.5, 0, 79.505, 60]),  # 5 thousandths past the edge: rounding
    )
    document["info"] = {"version": "3"}
    result = repaired(tmp_path, document)
    assert result["annotations"] == [
        annotation(1, 1, [70, 50.5, 10, 5.25], area=52.5),
        annotation(2, 1, [0, 0, 26, 14], **mask),
        document["annotations"][2],
    ]
    assert result["info"] == {"version": "3"}
    assert result["images"] == document["images"]


@pytest.mark.parametrize(
    "image_ids",
    [(5, 900_001), (2**31 + 5, 2**53 + 1), ("1", "b/7"), (0, -3)],
    ids=["sparse", "huge", "strings", "zero"],
)
def test_repair_dataset_keeps_ids_of_images_and_categories(
    tmp_path: Path, image_ids: tuple[Any, ...]
) -> None:
    document = dataset(
        annotation(9, image_ids[0], [1, 1, 9, 9], category_id="car-1"),
        annotation(4, image_ids[1], [1, 1, 9, 9], category_id="car-1", iscrowd=None),
        image_ids=image_ids,
    )
    document["categories"] = [{"id": "car-1", "name": "car"}]
    result = repaired(tmp_path, document)
    document["annotations"][1]["iscrowd"] = 0
    assert result == document


def test_repair_dataset_gives_free_ids_to_annotations_only_where_needed(tmp_path: Path) -> None:
    boxes = [[n, n, 9, 9] for n in range(1, 6)]
    ids = [7, None, 7, 0, 3]
    document = dataset(*(annotation(n, 1, box) for n, box in zip(ids, boxes, strict=True)))
    result = repaired(tmp_path, document)
    assert [entry["id"] for entry in result["annotations"]] == [7, 8, 9, 10, 3]
    assert [entry["bbox"] for entry in result["annotations"]] == boxes


@pytest.mark.parametrize("ids", [(0, 1), (5, 5)], ids=["id 0", "id twice"])
def test_repair_dataset_makes_pycocotools_count_every_match(
    tmp_path: Path, ids: tuple[int, int]
) -> None:
    document = dataset(
        annotation(ids[0], 1, [1, 1, 30, 30]), annotation(ids[1], 1, [40, 5, 30, 30])
    )
    perfect = [
        {"image_id": 1, "category_id": 1, "bbox": entry["bbox"], "score": 0.9}
        for entry in document["annotations"]
    ]
    repaired(tmp_path, document)
    assert average_precision(tmp_path / "in.json", perfect) < 0.9
    assert average_precision(tmp_path / "out.json", perfect) == pytest.approx(1.0)


def test_repair_dataset_writes_ids_in_the_type_of_their_table(tmp_path: Path) -> None:
    document = dataset(
        annotation(1, "1", [1, 1, 9, 9], category_id=1.0),
        annotation(2, 2.0, [1, 1, 9, 9], category_id="1"),
    )
    result = repaired(tmp_path, document)
    references = [(entry["image_id"], entry["category_id"]) for entry in result["annotations"]]
    assert references == [(1, 1), (2, 1)]
    assert all(type(value) is int for pair in references for value in pair)
    mixed = dataset(annotation(1, 3, [1, 1, 9, 9]), image_ids=("a", 3))
    result = repaired(tmp_path, mixed)
    assert [image["id"] for image in result["images"]] == ["a", "3"]
    assert result["annotations"][0]["image_id"] == "3"


def test_repair_dataset_drops_an_image_with_its_boxes_when_the_file_is_gone(tmp_path: Path) -> None:
    Image.new("RGB", (80, 60)).save(tmp_path / "1.png")
    document = dataset(*(annotation(n, 2 - (n == 7), [n, 1, 9, 9]) for n in range(1, 21)))
    (tmp_path / "in.json").write_text(json.dumps(document))
    report = repair_dataset(tmp_path / "in.json", tmp_path, tmp_path / "out.json")
    assert report.repairs == {"annotation_of_dropped_image": 19, "missing_file": 1}
    assert report.faults == ()
    result = json.loads((tmp_path / "out.json").read_text())
    assert result == {**document, "images": document["images"][:1], "annotations": [
        document["annotations"][6]
    ]}  # fmt: skip


def test_repair_dataset_judges_boxes_by_the_corrected_size(tmp_path: Path) -> None:
    for number in (1, 2):
        Image.new("RGB", (200, 61)).save(tmp_path / f"{number}.png")
    # Past the JSON's width of 80, inside the file's 200.
    document = dataset(annotation(1, 1, [100, 5, 50, 9]), annotation(2, 2, [60, 5, 50, 9]))
    result = repaired(tmp_path, document, tmp_path)
    assert [(image["height"], image["width"]) for image in result["images"]] == [(61, 200)] * 2
    assert result["annotations"] == document["annotations"]


def test_repair_dataset_leaves_boxes_alone_when_the_size_is_in_dispute(tmp_path: Path) -> None:
    for number in (1, 2):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{number}.png")  # half of 80 x 60
    document = dataset(annotation(1, 1, [70, 5, 50, 9]), annotation(2, 2, [60, 5, 10, 9]))
    assert repaired(tmp_path, document, tmp_path) == document


@pytest.mark.parametrize(
    ("num_faulty", "is_repaired"), [(10, True), (11, False)], ids=["half", "more than half"]
)
@pytest.mark.parametrize(
    ("code", "values"),
    [
        ("unknown_image", {"image_id": 99}),
        ("outside_box", {"bbox": [90, 70, 9, 9]}),
        ("partly_outside_box", {"bbox": [75, 55, 9, 9]}),
    ],
)
def test_repair_dataset_drops_and_cuts_nothing_that_most_annotations_share(
    tmp_path: Path, code: str, values: dict[str, Any], num_faulty: int, is_repaired: bool
) -> None:
    document = dataset(*(annotation(n, 1 + n % 2, [n, 1, 9, 9]) for n in range(1, 21)))
    for n, entry in enumerate(document["annotations"][:num_faulty]):
        entry.update(values)
        entry["bbox"] = [entry["bbox"][0], entry["bbox"][1], 9 + n, 9]
        entry["area"] = (9 + n) * 9
    result = repaired(tmp_path, document)
    assert (result != document) is is_repaired
    (fault,) = examine_dataset(tmp_path / "in.json", None).faults
    assert (fault.code, fault.count, fault.fixable) == (code, num_faulty, is_repaired)
    assert ("too many for --fix" in fault.advice) is not is_repaired


@pytest.mark.parametrize(
    "make_link",
    [
        pytest.param(lambda _source, _target: None, id="the same name"),
        pytest.param(lambda source, target: target.symlink_to(source), id="symbolic link"),
        pytest.param(lambda source, target: os.link(source, target), id="hard link"),
    ],
)
def test_repair_dataset_refuses_to_write_over_its_input(tmp_path: Path, make_link: Any) -> None:
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text(json.dumps(dataset(annotation(0, 1, [1, 1, 9, 9]))))
    before = source.read_bytes()
    make_link(source, target)
    output = target if target.exists() else tmp_path / "x" / ".." / "in.json"
    (tmp_path / "x").mkdir()
    with pytest.raises(DatasetError, match="is the file under repair; name another output"):
        repair_dataset(source, None, output)
    assert source.read_bytes() == before


def test_repair_dataset_leaves_the_old_output_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.json").write_text(json.dumps(dataset(annotation(0, 1, [1, 1, 9, 9]))))
    (tmp_path / "out.json").write_text("old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(DatasetError, match=r"cannot write .*out\.json: .*No space left"):
        repair_dataset(tmp_path / "in.json", None, tmp_path / "out.json")
    assert (tmp_path / "out.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.json", "out.json"]
    monkeypatch.undo()
    repair_dataset(tmp_path / "in.json", None, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["annotations"][0]["id"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.json", "out.json"]


def test_repair_dataset_names_the_input_when_it_is_absent(tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text("old")
    with pytest.raises(DatasetError, match=r"in\.json: cannot read the annotation file"):
        repair_dataset(tmp_path / "in.json", None, tmp_path / "out.json")
    assert (tmp_path / "out.json").read_text() == "old"


def test_repair_dataset_makes_the_folder_of_its_output(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps(dataset()))
    repair_dataset(tmp_path / "in.json", None, tmp_path / "new" / "folder" / "out.json")
    assert json.loads((tmp_path / "new" / "folder" / "out.json").read_text())["images"]


def test_repair_dataset_names_the_output_when_its_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps(dataset()))
    (tmp_path / "none").write_text("")
    with pytest.raises(DatasetError, match=r"cannot write .*none/out\.json"):
        repair_dataset(tmp_path / "in.json", None, tmp_path / "none" / "out.json")


def test_repair_dataset_changes_nothing_in_a_clean_real_set(
    tmp_path: Path, shared_data: Path
) -> None:
    path = shared_data / "bccd" / "test.json"
    report = repair_dataset(path, path.parent / "images", tmp_path / "out.json")
    assert report.repairs == {}
    assert report.faults == ()
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(path.read_text())
