"""What other tools read of our files, and we of theirs; each is skipped where it is missing."""

from __future__ import annotations

import json
import shutil
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Convert = Callable[..., Any]
Document = dict[str, list[dict[str, Any]]]
Boxes = dict[str, list[tuple[str, tuple[float, ...]]]]


@pytest.fixture
def import_tool() -> Callable[[str], types.ModuleType]:
    """Import a tool's module, or skip; its own warnings at import are not ours."""

    def load(module: str) -> types.ModuleType:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: types.ModuleType = pytest.importorskip(
                module, reason=f"needs the package of {module}, which is not installed"
            )
        return loaded

    return load


@pytest.fixture
def flat_file(street: Document, street_images: Path, tmp_path: Path) -> Path:
    """`street` without its subfolder, which Globox and Supervision do not know."""
    street["images"][1]["file_name"] = "b.png"
    shutil.move(street_images / "sub" / "b.png", street_images / "b.png")
    (street_images / "sub").rmdir()
    path = tmp_path / "flat.json"
    path.write_text(json.dumps(street))
    return path


def list_boxes(document: Document) -> Boxes:
    names = {category["id"]: category["name"] for category in document["categories"]}
    return {
        image["file_name"]: [
            (names[a["category_id"]], tuple(round(side, 6) for side in a["bbox"]))
            for a in document["annotations"]
            if a["image_id"] == image["id"]
        ]
        for image in document["images"]
    }


def list_globox_boxes(found: Any, names: tuple[str, ...] = ()) -> Boxes:
    """Boxes of an AnnotationSet; with `names`, its labels are places in them."""
    return {
        image.image_id: [
            (names[int(box.label)] if names else box.label, tuple(round(x, 6) for x in box.ltwh))
            for box in image.boxes
        ]
        for image in found
    }


def test_globox_reads_our_voc_yolo_and_labelme_files(
    convert: Convert,
    flat_file: Path,
    street: Document,
    street_images: Path,
    tmp_path: Path,
    import_tool: Callable[[str], types.ModuleType],
) -> None:
    reader = import_tool("globox").AnnotationSet
    for name in ("voc", "yolo", "labelme"):
        convert(flat_file, tmp_path / name, "--to", name)
    expected = list_boxes(street)
    voc = reader.from_pascal_voc(tmp_path / "voc/Annotations")
    assert list_globox_boxes(voc) == expected
    assert list_globox_boxes(reader.from_labelme(tmp_path / "labelme")) == expected
    yolo = reader.from_yolo_v5(
        tmp_path / "yolo/labels", image_folder=street_images, image_extension=".png"
    )
    assert list_globox_boxes(yolo, ("人", "Ampel rot")) == expected


@pytest.mark.parametrize("name", ["voc", "labelme", "open-images"])
def test_convert_reads_the_files_that_globox_writes(
    name: str,
    convert: Convert,
    flat_file: Path,
    street: Document,
    street_images: Path,
    tmp_path: Path,
    import_tool: Callable[[str], types.ModuleType],
) -> None:
    labels = import_tool("globox").AnnotationSet.from_coco(flat_file)
    folder = tmp_path / "theirs"
    folder.mkdir()
    if name == "voc":
        labels.save_pascal_voc(folder)
    elif name == "labelme":
        labels.save_labelme(folder)
    else:
        labels.save_openimage(folder / "annotations-bbox.csv")
    out = tmp_path / "back.json"
    convert(folder, out, "--from", name, "--images", street_images)
    assert list_boxes(json.loads(out.read_text())) == list_boxes(street)


def test_supervision_reads_our_voc_files_when_pixels_count_from_one(
    convert: Convert,
    flat_file: Path,
    street: Document,
    street_images: Path,
    tmp_path: Path,
    import_tool: Callable[[str], types.ModuleType],
) -> None:
    tool = import_tool("supervision")
    convert(flat_file, tmp_path / "voc", "--to", "voc", "--voc-origin", "one")
    found = tool.DetectionDataset.from_pascal_voc(
        str(street_images), str(tmp_path / "voc/Annotations")
    )
    for name, boxes in list_boxes(street).items():
        theirs = found.annotations[str(street_images / name)]
        xywh = np.array([box for _, box in boxes]).reshape(-1, 4)
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        np.testing.assert_allclose(theirs.xyxy, xyxy, atol=1e-4)
        assert [found.classes[i] for i in theirs.class_id] == [label for label, _ in boxes]


def test_label_studio_accepts_our_tasks(
    convert: Convert,
    street_file: Path,
    tmp_path: Path,
    import_tool: Callable[[str], types.ModuleType],
) -> None:
    tool = import_tool("label_studio_sdk.label_interface")
    found = tmp_path / "detections.json"
    found.write_text('[{"image_id": 7, "category_id": 9, "bbox": [1, 2, 3, 4], "score": 0.5}]')
    reference = ("--from", "coco-results", "--reference", street_file)
    convert(found, tmp_path / "found", *reference, "--to", "label-studio")
    convert(street_file, tmp_path / "drawn", "--to", "label-studio")
    judge = tool.LabelInterface((tmp_path / "found/label_config.xml").read_text())
    judge.validate()
    tasks = json.loads((tmp_path / "found/tasks.json").read_text())
    assert judge.validate_prediction(tasks[1]["predictions"][0], return_errors=True) == []
    drawn = json.loads((tmp_path / "drawn/tasks.json").read_text())
    # Of a whole task this release (2.0) can judge only the data: it calls itself wrongly.
    assert all(judge.validate_task({"data": task["data"]}) for task in drawn)
    assert judge.validate_annotation(drawn[0]["annotations"][0])
    # The judge can say no.
    tasks[1]["predictions"][0]["result"][0]["value"]["rectanglelabels"] = ["no such class"]
    assert judge.validate_prediction(tasks[1]["predictions"][0], return_errors=True) != []


def test_label_studio_exports_our_boxes_as_the_same_coco(
    convert: Convert,
    street_file: Path,
    street: Document,
    tmp_path: Path,
    import_tool: Callable[[str], types.ModuleType],
) -> None:
    tool = import_tool("label_studio_sdk.converter")
    convert(street_file, tmp_path / "drawn", "--to", "label-studio", "--image-prefix", "")
    exporter = tool.Converter(
        (tmp_path / "drawn/label_config.xml").read_text(),
        project_dir=None,
        download_resources=False,
    )
    tasks = json.loads((tmp_path / "drawn/tasks.json").read_text())
    # A project gives its tasks and annotations ids and times when they are imported.
    for number, task in enumerate(tasks):
        task["id"] = number
        for annotation in task.get("annotations", []):
            annotation |= {"id": number, "completed_by": {}}
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    exporter.convert_to_coco(
        str(tmp_path / "export.json"), str(tmp_path / "coco"), str(tmp_path), is_dir=False
    )
    document = json.loads((tmp_path / "coco/result.json").read_text())
    exported = [box for boxes in list_boxes(document).values() for box in boxes]
    assert exported == [box for boxes in list_boxes(street).values() for box in boxes]
