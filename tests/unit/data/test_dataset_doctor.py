from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pycocotools.coco import COCO

from retinaray.data.coco import load_coco
from retinaray.data.dataset_doctor import DoctorReport, Fault, examine_dataset
from retinaray.data.dataset_repair import repair_dataset
from retinaray.data.faults import FAULT_KINDS
from retinaray.errors import DatasetError

Document = dict[str, Any]
Edit = Callable[[Document, Path], None]


class Sample:
    """A clean data set of four images on disk, and what the doctor says of it after an edit."""

    def __init__(self, folder: Path) -> None:
        self.images = folder / "images"
        self.path = folder / "train.json"
        self.output = folder / "repaired.json"
        self.images.mkdir()
        # Image k is "k.jpg", height 60, width 80, one box of each class, ids as COCO likes them.
        for number in range(1, 5):
            Image.new("RGB", (80, 60), (40 * number, 90, 10)).save(self.images / f"{number}.jpg")
        self.document: Document = {
            "info": {"year": 2024},
            "images": [
                {"id": k, "file_name": f"{k}.jpg", "height": 60, "width": 80} for k in range(1, 5)
            ],
            "annotations": [
                {
                    "id": 2 * image + place - 2,
                    "image_id": image,
                    "category_id": place,
                    "bbox": [10 * place, 5 * image, 20, 12],
                    "area": 240,
                    "iscrowd": 0,
                }
                for image in range(1, 5)
                for place in (1, 2)
            ],
            "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "bus"}],
        }
        self.write()

    def write(self, *edits: Edit) -> None:
        for edit in edits:
            edit(self.document, self.images)
        self.path.write_text(json.dumps(self.document))

    def examine(self, path: Path | None = None) -> DoctorReport:
        return examine_dataset(path or self.path, self.images, num_threads=2)

    def repair(self) -> DoctorReport:
        return repair_dataset(self.path, self.images, self.output, num_threads=2)


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    return Sample(tmp_path)


def put(table: str, index: int, **values: Any) -> Edit:
    return lambda document, _: document[table][index].update(values)


def remove(table: str, index: int, key: str) -> Edit:
    return lambda document, _: document[table][index].pop(key, None)


def copied(table: str, index: int, **values: Any) -> Edit:
    """Append a copy of an entry with other values."""
    return lambda document, _: document[table].append({**document[table][index], **values})


def save(name: str, width: int, height: int, orientation: int = 1) -> Edit:
    """Write an image file of this stored size, perhaps with an EXIF orientation."""

    def edit(_: Document, folder: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (width, height)).save(folder / name, exif=exif)

    return edit


def write_file(name: str, data: bytes) -> Edit:
    def edit(_: Document, folder: Path) -> None:
        (folder / name).write_bytes(data)

    return edit


def both(*edits: Edit) -> Edit:
    def edit(document: Document, folder: Path) -> None:
        for single in edits:
            single(document, folder)

    return edit


def for_all(table: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Edit:
    def edit(document: Document, _: Path) -> None:
        for entry in document[table]:
            entry.update(change(entry))

    return edit


def strings(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda entry: {key: f"n{entry.get(key)}" for key in keys}


def as_floats(entry: dict[str, Any]) -> dict[str, Any]:
    return {"id": float(entry["id"])} if type(entry["id"]) is int else {}


def box(*bbox: Any) -> Edit:
    return put("annotations", 0, bbox=list(bbox))


def no_images(document: Document, _: Path) -> None:
    document["images"], document["annotations"] = [], []


def no_categories(document: Document, _: Path) -> None:
    document["categories"], document["annotations"] = [], []


NO_BOXES = "images_without_boxes"
NO_CLASSES = "classes_without_boxes"
NAN, INF = float("nan"), float("inf")

# code, edit, count, severity, fixable, other codes that the same edit brings
FAULTS = [
    ("no_images", no_images, 1, "error", False, {NO_CLASSES}),
    ("no_categories", no_categories, 1, "error", False, {NO_BOXES}),
    ("invalid_ids", put("images", 3, id=None), 1, "error", False, {"unknown_image", NO_BOXES}),
    ("invalid_ids", copied("categories", 0, id=True), 1, "error", False,
     {NO_CLASSES, "duplicate_category_names"}),
    ("mixed_id_types", put("annotations", 0, image_id="1"), 1, "error", True, set()),
    ("mixed_id_types", put("annotations", 0, category_id=1.0), 1, "error", True, set()),
    ("mixed_id_types", put("images", 0, id="1"), 1, "error", True, {"string_ids"}),
    ("mixed_id_types", for_all("images", as_floats), 4, "error", True, set()),
    ("duplicate_image_ids", copied("images", 0), 1, "error", True, {NO_BOXES}),
    ("conflicting_image_ids", put("images", 1, id=1), 1, "error", False,
     {NO_BOXES, "unknown_image"}),
    ("duplicate_category_ids", copied("categories", 1), 1, "error", True,
     {NO_CLASSES, "duplicate_category_names"}),
    ("conflicting_category_ids", copied("categories", 1, name="van"), 1, "error", False,
     {NO_CLASSES}),
    ("missing_file_name", remove("images", 0, "file_name"), 1, "error", False, set()),
    ("unsafe_file_name", put("images", 0, file_name="../1.jpg"), 1, "error", False, set()),
    ("duplicate_file_names", put("images", 1, file_name="1.jpg"), 1, "error", False, set()),
    ("missing_size", remove("images", 0, "height"), 1, "error", True, set()),
    ("missing_size", put("images", 0, width=80.5), 1, "error", True, set()),
    ("unknown_image", put("annotations", 0, image_id=99), 1, "error", True, set()),
    ("unknown_image", remove("annotations", 0, "image_id"), 1, "error", True, set()),
    ("unknown_category", put("annotations", 0, category_id=9), 1, "error", False, set()),
    ("missing_bbox", remove("annotations", 0, "bbox"), 1, "error", True, set()),
    ("unusable_bbox", box(1, 2, 3), 1, "error", True, set()),
    ("unusable_bbox", box(1, 2, 3, "x"), 1, "error", True, set()),
    ("string_bbox", box("10", "5", 20, "12.0"), 1, "error", True, set()),
    ("non_finite_box", box(NAN, 2, 3, 4), 1, "error", True, set()),
    ("non_finite_box", box(1, 2, INF, 4), 1, "error", True, set()),
    ("negative_size_box", box(10, 5, -20, 12), 1, "error", True, set()),
    ("zero_size_box", box(10, 5, 0, 12), 1, "error", True, set()),
    ("outside_box", box(80, 5, 20, 12), 1, "error", True, set()),
    ("duplicate_boxes", copied("annotations", 0, id=99), 1, "error", True, set()),
    ("boxes_look_xyxy", for_all("annotations", lambda _: {"bbox": [39, 31, 70, 58]}), 12,
     "error", False, set()),
    ("boxes_look_normalised", for_all("annotations", lambda _: {"bbox": [0.5, 0.5, 0.2, 0.1]}), 8,
     "error", False, set()),
    ("invalid_iscrowd", put("annotations", 0, iscrowd="yes"), 1, "error", False, set()),
    ("missing_annotation_ids", remove("annotations", 0, "id"), 1, "error", True, set()),
    ("missing_annotation_ids", put("annotations", 0, id="a1"), 1, "error", True, set()),
    ("duplicate_annotation_ids", put("annotations", 0, id=2), 1, "error", True, set()),
    ("zero_annotation_id", put("annotations", 0, id=0), 1, "error", True, set()),
    ("partly_outside_box", box(70, 5, 20, 12), 1, "warning", True, set()),
    ("tiny_box", put("annotations", 0, bbox=[10, 5, 0.5, 12], area=6), 1, "warning", False, set()),
    ("missing_area", remove("annotations", 0, "area"), 1, "warning", True, set()),
    ("missing_area", put("annotations", 0, area="big"), 1, "warning", True, set()),
    ("contradicting_area", put("annotations", 0, area=361), 1, "warning", True, set()),
    ("contradicting_area", put("annotations", 0, area=2), 1, "warning", True, set()),
    ("missing_iscrowd", remove("annotations", 0, "iscrowd"), 1, "warning", True, set()),
    ("iscrowd_not_integer", put("annotations", 0, iscrowd="0"), 1, "warning", True, set()),
    ("iscrowd_not_integer", put("annotations", 0, iscrowd=False), 1, "warning", True, set()),
    ("crowd_boxes", put("annotations", 0, iscrowd=1), 1, "warning", False, set()),
    ("string_ids", both(for_all("images", strings("id")), for_all("annotations",
     strings("image_id"))), 4, "warning", False, set()),
    ("huge_ids", both(put("images", 0, id=2**31), copied("annotations", 0, id=99, image_id=2**31),
     lambda document, _: document["annotations"].__delitem__(slice(0, 2))), 1, "warning", False,
     set()),
    ("unsorted_categories", lambda document, _: document["categories"].reverse(), 1, "warning",
     True, set()),
    ("missing_category_name", remove("categories", 0, "name"), 1, "warning", True, set()),
    ("missing_category_name", put("categories", 0, name=5), 1, "warning", True, set()),
    ("duplicate_category_names", put("categories", 0, name="bus"), 1, "warning", False, set()),
    (NO_BOXES, lambda document, _: document["annotations"].__delitem__(slice(0, 2)), 1, "warning",
     False, set()),
    (NO_CLASSES, copied("categories", 0, id=3, name="van"), 1, "warning", False, set()),
    ("missing_file", lambda _, folder: (folder / "1.jpg").unlink(missing_ok=True), 1, "error", True,
     set()),
    ("unreadable_file", write_file("1.jpg", b"not an image"), 1, "error", True, set()),
    ("unreadable_file", write_file("1.jpg", b""), 1, "error", True, set()),
    ("unreadable_file", write_file("1.jpg", b"\xff\xd8\xff\xe0\0\x10JF"), 1, "error", True, set()),
    ("size_mismatch", save("1.jpg", 90, 61), 1, "error", True, set()),
    ("size_swapped", put("images", 0, height=80, width=60), 1, "error", True, set()),
    # Stored 60 wide and 80 high, turned to height 60, width 80; the box fits only that.
    ("exif_unrotated_size", both(save("1.jpg", 60, 80, 6), put("images", 0, height=80, width=60),
     box(61, 5, 15, 16)), 1, "error", True, set()),
    # As before, but the boxes fit both ways.
    ("exif_size_unclear", both(save("1.jpg", 60, 80, 6), put("images", 0, height=80, width=60)), 1,
     "error", False, set()),
    ("size_unclear", save("1.jpg", 160, 120), 1, "error", False, set()),
    ("size_unclear", save("1.jpg", 25, 61), 1, "error", False, set()),
    ("exif_orientation", save("1.jpg", 60, 80, 6), 1, "warning", False, set()),
]  # fmt: skip
CASES = [pytest.param(case, id=f"{index}-{case[0]}") for index, case in enumerate(FAULTS)]


def more_boxes(document: Document, _: Path) -> None:
    """Four more boxes, for what shows only in a crowd of at least ten."""
    for number in range(20, 24):
        document["annotations"].append({**document["annotations"][0], "id": number})


def prepared(sample: Sample, code: str, edit: Edit) -> Sample:
    if code == "boxes_look_xyxy":
        sample.write(more_boxes)
    sample.write(edit)
    return sample


def by_code(report: DoctorReport) -> dict[str, Fault]:
    faults = {fault.code: fault for fault in report.faults}
    assert len(faults) == len(report.faults)
    return faults


def test_fault_table_covers_every_fault_of_the_catalogue() -> None:
    assert {case[0] for case in FAULTS} == set(FAULT_KINDS)


def test_examine_dataset_finds_nothing_in_a_clean_set(sample: Sample) -> None:
    report = sample.examine()
    assert report == DoctorReport(4, 8, 2, ())
    assert report.is_clean
    assert report.to_text() == "4 images, 8 annotations, 2 categories\nno faults"


@pytest.mark.parametrize("case", CASES)
def test_examine_dataset_finds_each_fault(
    sample: Sample, case: tuple[str, Edit, int, str, bool, set[str]]
) -> None:
    code, edit, count, severity, fixable, others = case
    report = prepared(sample, code, edit).examine()
    faults = by_code(report)
    assert set(faults) == {code} | others
    assert (faults[code].count, faults[code].severity) == (count, severity)
    assert faults[code].fixable is fixable
    assert 1 <= len(faults[code].examples) <= min(count, 3)
    assert all(faults[code].examples)
    assert report.is_clean == (severity == "warning" and "error" not in {
        faults[other].severity for other in others
    })  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_repair_dataset_leaves_nothing_fixable(
    sample: Sample, case: tuple[str, Edit, int, str, bool, set[str]]
) -> None:
    code, edit, count, _, fixable, _ = case
    before = prepared(sample, code, edit).path.read_bytes()
    report = sample.repair()
    again = sample.examine(sample.output)
    assert again.faults == report.faults
    assert not [fault.code for fault in again.faults if fault.fixable]
    assert (code in by_code(again)) is not fixable
    if fixable:
        assert report.repairs[code] == count
    assert sample.path.read_bytes() == before
    assert json.loads(sample.output.read_text())["info"] == {"year": 2024}


# The edits that empty a table leave nothing for the others to change.
SOME_FAULTS = [case for case in FAULTS if case[0] not in ("no_images", "no_categories")]


@pytest.mark.parametrize("seed", range(20))
def test_repair_dataset_leaves_nothing_fixable_when_faults_come_together(
    sample: Sample, seed: int
) -> None:
    sample.write(*(case[1] for case in random.Random(seed).sample(SOME_FAULTS, 6)))
    report = sample.repair()
    again = sample.examine(sample.output)
    assert again.faults == report.faults
    assert not [fault.code for fault in again.faults if fault.fixable]


@pytest.mark.parametrize("seed", range(20))
def test_repair_dataset_makes_a_readable_file_of_any_fixable_faults(
    sample: Sample, seed: int
) -> None:
    # Which size is right is told by boxes that another edit may take away.
    of_boxes = {"size_mismatch", "size_swapped", "exif_unrotated_size"}
    fixable = [case for case in FAULTS if case[4] and case[0] not in of_boxes]
    sample.write(*(case[1] for case in random.Random(seed).sample(fixable, 6)))
    report = sample.repair()
    assert report.is_clean, report.to_text()
    assert len(load_coco(sample.output, on_bad_box="error")) == report.num_images
    with contextlib.redirect_stdout(io.StringIO()):
        oracle = COCO(str(sample.output))
    assert len(oracle.anns) == report.num_annotations
    assert len(oracle.imgs) == report.num_images


def test_examine_dataset_shows_the_box_and_counts_all(sample: Sample) -> None:
    sample.write(*(put("annotations", i, bbox=[10, 5, 0, 4]) for i in range(5)))
    fault = by_code(sample.examine())["zero_size_box"]
    assert fault.count == 5
    assert fault.examples == tuple(
        f"annotation {n} of image {image}: box (10, 5, 0, 4) has zero width"
        for n, image in ((1, 1), (2, 1), (3, 2))
    )


def test_examine_dataset_looks_at_no_file_when_told_so(sample: Sample) -> None:
    sample.write(lambda _, folder: (folder / "1.jpg").unlink(), remove("images", 1, "width"))
    unchecked = by_code(examine_dataset(sample.path, sample.images, check_files=False))
    assert set(unchecked) == {"missing_size"}
    assert unchecked["missing_size"].fixable
    alone = by_code(examine_dataset(sample.path, None))
    assert set(alone) == {"missing_size"}
    assert not alone["missing_size"].fixable


def test_examine_dataset_calls_nothing_fixable_when_the_folder_is_wrong(sample: Sample) -> None:
    sample.write(*(save(f"{n}.jpg", 90, 61) for n in (1, 2)), remove("images", 2, "width"))
    for number in (2, 3, 4):
        (sample.images / f"{number}.jpg").unlink()
    faults = by_code(sample.examine())
    assert set(faults) == {"missing_file", "size_mismatch", "missing_size"}
    assert not any(fault.fixable for fault in faults.values())
    repaired = sample.repair()
    assert repaired.num_images == 4
    assert repaired.repairs == {}


def test_examine_dataset_shows_no_control_characters_of_names(sample: Sample) -> None:
    sample.write(put("images", 0, file_name="\x1b[2J.jpg"))
    (fault,) = sample.examine().faults
    assert fault.examples == (r"image 1 (\u001b[2J.jpg)",)


def test_examine_dataset_refuses_a_file_it_cannot_parse(sample: Sample) -> None:
    sample.path.write_text('{"images": [')
    with pytest.raises(DatasetError, match=r"train\.json: expected COCO JSON"):
        sample.examine()


def test_report_goes_to_text_and_json(sample: Sample) -> None:
    sample.write(box(10, 5, 0, 12), put("annotations", 1, iscrowd=1))
    report = sample.examine()
    assert report.to_text().splitlines() == [
        "4 images, 8 annotations, 2 categories",
        "severity fault          count  fix",
        "error    zero_size_box      1  yes  --fix drops the annotation",
        "                                    annotation 1 of image 1: "
        "box (10, 5, 0, 12) has zero width",
        "warning  crowd_boxes        1  no   ignored in training and scoring, as COCO defines",
        "                                    annotation 2 of image 1",
    ]
    written = json.loads(json.dumps(report.to_json()))
    assert written["is_clean"] is False
    assert [fault["code"] for fault in written["faults"]] == ["zero_size_box", "crowd_boxes"]
    assert written["faults"][0]["examples"] == [
        "annotation 1 of image 1: box (10, 5, 0, 12) has zero width"
    ]


# What the real sets are known to have (their stats.json and SOURCE.md); everything else is clean.
REAL_FAULTS = {
    **{f"bccd/{split}": set() for split in ("train", "val", "test")},
    **{f"plates_vehicles/{split}": set() for split in ("train", "val", "test")},
    **{f"aerial_cars/{split}": {NO_CLASSES} for split in ("train", "val", "test")},
    "coco128/train": {NO_BOXES, NO_CLASSES},
    "coco128/val": {NO_CLASSES},
    "coco128/test": {"no_images", NO_CLASSES},
}


@pytest.mark.parametrize("name", REAL_FAULTS)
def test_examine_dataset_finds_only_the_known_faults_of_real_sets(
    name: str, shared_data: Path
) -> None:
    path = shared_data / f"{name}.json"
    report = examine_dataset(path, path.parent / "images")
    assert set(by_code(report)) == REAL_FAULTS[name]
    assert report.is_clean == ("no_images" not in REAL_FAULTS[name])
