from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from retinaray.cli import main
from retinaray.config.convert_schema import ConvertJob, SourceFormat, TargetFormat
from retinaray.config.loading import load_from_argv
from retinaray.errors import ConfigError, DatasetError
from retinaray.interchange.formats import ENDLESS, FORMATS

Convert = Callable[..., Any]
Document = dict[str, list[dict[str, Any]]]

TWO_WAY = sorted(set(get_args(SourceFormat)) & set(get_args(TargetFormat)) - {"coco"})


def test_formats_are_those_of_the_settings() -> None:
    assert set(FORMATS) == set(get_args(TargetFormat))
    assert TWO_WAY == ["kitti", "labelme", "open-images", "voc", "yolo"]


def test_formats_are_those_of_the_documentation() -> None:
    text = (Path(__file__).parents[3] / "docs" / "interchange.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    assert rows == set(FORMATS) | {"coco-results"}


@pytest.mark.parametrize("name", TWO_WAY)
def test_convert_gives_back_boxes_names_and_ids_when_the_way_back_has_a_reference(
    name: str, convert: Convert, street_file: Path, street: Document, tmp_path: Path
) -> None:
    out = convert(street_file, tmp_path / "labels", "--to", name)
    assert (out.num_images, out.num_boxes, out.names) == (3, 4, ("人", "Ampel rot"))
    back = tmp_path / "back.json"
    convert(tmp_path / "labels", back, "--from", name, "--reference", street_file)
    found = json.loads(back.read_text())
    assert found["images"] == street["images"]
    # Not nearly: to the last digit, ids included.
    assert found["annotations"] == street["annotations"]
    assert found["categories"] == street["categories"][::-1]


@pytest.mark.parametrize("name", TWO_WAY)
def test_convert_gives_back_images_and_boxes_when_there_is_no_reference(
    name: str,
    convert: Convert,
    street_file: Path,
    street: Document,
    street_images: Path,
    tmp_path: Path,
) -> None:
    convert(street_file, tmp_path / "labels", "--to", name)
    images = ["--images", street_images] if name in ENDLESS else []
    out = convert(tmp_path / "labels", tmp_path / "back.json", "--from", name, *images)
    back = json.loads((tmp_path / "back.json").read_text())
    assert out.notes == {}
    # Class order is kept by classes.txt; ids are new ones.
    assert back["categories"] == [{"id": 1, "name": "人"}, {"id": 2, "name": "Ampel rot"}]
    new_id = {image["file_name"]: image["id"] for image in back["images"]}
    for image in street["images"]:
        expected = {**image, "id": new_id[image["file_name"]]}
        assert expected in back["images"]
        boxes = [a["bbox"] for a in street["annotations"] if a["image_id"] == image["id"]]
        assert [a["bbox"] for a in back["annotations"] if a["image_id"] == expected["id"]] == boxes


def test_convert_says_what_a_format_does_not_hold(
    convert: Convert, street_file: Path, street: Document, tmp_path: Path
) -> None:
    street["annotations"][0]["iscrowd"] = 1
    street["annotations"][1]["attributes"] = {"difficult": True}
    street_file.write_text(json.dumps(street))
    out = convert(street_file, tmp_path / "labels", "--to", "yolo")
    assert out.losses == {
        "image ids are not held (convert back with --reference)": 3,
        "category ids are not held (convert back with --reference)": 2,
        "crowd regions are left out": 1,
        "attribute difficult is not held": 1,
    }
    assert json.loads(out.to_json())["losses"] == out.losses
    assert "written         1  crowd regions are left out" in out.to_text()
    # Nothing of the crowd region became a box.
    assert len((tmp_path / "labels/labels/Straße 1.txt").read_text().splitlines()) == 1


def test_convert_writes_a_data_yaml_for_yolo(
    convert: Convert, street_file: Path, tmp_path: Path
) -> None:
    convert(street_file, tmp_path / "labels", "--to", "yolo")
    tree = yaml.safe_load((tmp_path / "labels/data.yaml").read_text())
    assert tree["names"] == {0: "人", 1: "Ampel rot"}
    assert (tmp_path / "labels/labels/空.txt").read_text() == ""


@pytest.mark.parametrize("split", ["labels", "labels/val"])
def test_convert_reads_class_names_of_a_data_yaml(
    split: str,
    convert: Convert,
    write_files: Callable[..., Path],
    street_images: Path,
    tmp_path: Path,
) -> None:
    folder = write_files(
        {"data.yaml": "names:\n  0: cat\n  1: dog\n", f"{split}/空.txt": "1 0.5 0.5 0.2 0.2\n"}
    )
    arguments = ("--from", "yolo", "--images", street_images)
    out = convert(folder / split, tmp_path / "a.json", *arguments)
    assert out.names == ("cat", "dog")
    (entry,) = json.loads((tmp_path / "a.json").read_text())["annotations"]
    # Of 50 x 33: sides 10 x 6.6 around (25, 16.5).
    assert (entry["category_id"], entry["bbox"]) == (2, [20, 13.2, 10, 6.6])


@pytest.mark.parametrize(
    ("difficult", "crowds"), [("keep", [0, 0]), ("crowd", [1, 0]), ("drop", [0])]
)
def test_convert_settles_difficult_boxes(
    difficult: str,
    crowds: list[int],
    convert: Convert,
    street_file: Path,
    street: Document,
    tmp_path: Path,
) -> None:
    street["annotations"][0]["attributes"] = {"difficult": True}
    del street["annotations"][2:]
    street_file.write_text(json.dumps(street))
    convert(street_file, tmp_path / "voc", "--to", "voc")
    out = tmp_path / "back.json"
    convert(tmp_path / "voc", out, "--from", "voc", "--difficult", difficult)
    assert [a["iscrowd"] for a in json.loads(out.read_text())["annotations"]] == crowds


def test_convert_turns_detections_into_predictions_for_label_studio(
    convert: Convert, street_file: Path, tmp_path: Path
) -> None:
    found = tmp_path / "detections.json"
    found.write_text('[{"image_id": 7, "category_id": 9, "bbox": [1, 2, 3, 4], "score": 0.5}]')
    arguments = ("--from", "coco-results", "--reference", street_file, "--to", "label-studio")
    convert(found, tmp_path / "review", *arguments)
    tasks = json.loads((tmp_path / "review/tasks.json").read_text())
    assert [len(task.get("predictions", [])) for task in tasks] == [0, 1, 0]
    assert tasks[1]["data"]["image"] == "/data/local-files/?d=sub/b.png"


def test_convert_leaves_out_boxes_outside_their_image(
    convert: Convert, write_files: Callable[..., Path], street_images: Path, tmp_path: Path
) -> None:
    line = "car 0 0 -10 {} 5 {} 9 -1 -1 -1 -1000 -1000 -1000 -10\n"
    folder = write_files({"空.txt": line.format(1, 9) + line.format(50, 60) + line.format(-9, 0)})
    arguments = ("--from", "kitti", "--images", street_images)
    out = convert(folder, tmp_path / "a.json", *arguments)
    assert out.num_boxes == 1
    assert out.notes["boxes that lie outside their image are left out"] == 2


def test_convert_job_takes_a_folder_that_is_called_as_its_format() -> None:
    job = load_from_argv(ConvertJob, ["train.json", "--to", "yolo", "yolo", "--images", "photos"])
    assert (job.source, job.target_format, job.output) == ("train.json", "yolo", "yolo")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["a.json", "b.json"],
            r"source_format \(--from\) and target_format \(--to\) are both coco: give --from or",
        ),
        (
            ["VOC2012", "b.json"],
            "VOC2012 is no JSON file; say which labels it holds, such as --from",
        ),
        (["a", "b.json", "--from", "yolo"], "tells no image sizes: give images"),
        (["a", "b.json", "--from", "coco-results"], "coco-results names no images and classes"),
        (["a", "b", "--from", "voc"], "target_format=coco writes one file, NAME.json"),
        (["a.json", "b.json", "--to", "voc"], "target_format=voc writes a folder"),
        (["s3://x/a.json", "b", "--to", "voc"], "expected a path of this machine"),
        (["a.json", "b", "--to", "coc"], "one of coco, voc"),
    ],
)
def test_convert_refuses_settings_that_do_not_fit(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_from_argv(ConvertJob, argv)


def test_convert_refuses_labels_that_are_not_there(convert: Convert, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="none: expected labels to read, found nothing"):
        convert(tmp_path / "none", tmp_path / "a.json", "--from", "voc")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DatasetError, match="file: expected a folder of voc labels"):
        convert(tmp_path / "file", tmp_path / "a.json", "--from", "voc")


def test_convert_asks_for_class_names_when_yolo_has_none(
    convert: Convert, write_files: Callable[..., Path], street_images: Path, tmp_path: Path
) -> None:
    folder = write_files({"空.txt": ""})
    with pytest.raises(DatasetError, match=r"expected the class names .* give --class-names FILE"):
        convert(folder, tmp_path / "a.json", "--from", "yolo", "--images", street_images)


def test_convert_shows_one_line_and_writes_nothing_when_labels_are_broken(
    write_files: Callable[..., Path],
    street_images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write_files({"空.txt": "0 0.5 0.5\n", "classes.txt": "car\n"})
    before = sorted(tmp_path.iterdir())
    argv = [str(folder), str(tmp_path / "a.json"), "--from", "yolo", "--images", str(street_images)]
    assert main(["convert", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "空.txt, line 1: expected `class x_centre" in line
    assert sorted(tmp_path.iterdir()) == before


def test_convert_writes_over_nothing(convert: Convert, street_file: Path, tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/mine.txt").write_text("mine")
    with pytest.raises(DatasetError, match="labels: expected a new place to write to"):
        convert(street_file, tmp_path / "labels", "--to", "voc")
    assert (tmp_path / "labels/mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", TWO_WAY)
@pytest.mark.parametrize("folder", ["bccd", "coco128"])
def test_convert_gives_back_real_data_to_the_last_digit(
    folder: str, name: str, convert: Convert, shared_data: Path, tmp_path: Path
) -> None:
    source = shared_data / folder / "val.json"
    convert(source, tmp_path / "labels", "--to", name)
    convert(tmp_path / "labels", tmp_path / "b.json", "--from", name, "--reference", source)
    convert(source, tmp_path / "a.json", "--reference", source)
    before, after = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert before["images"] == after["images"]
    kept = [a for a in before["annotations"] if not a["iscrowd"]]
    assert len(kept) > 100
    found = [a for a in after["annotations"] if not a["iscrowd"]]
    keys = ("image_id", "category_id", "bbox")
    assert [[a[key] for key in keys] for a in found] == [[a[key] for key in keys] for a in kept]
