"""What is said of files that are no COCO."""

from __future__ import annotations

import io
import json
import struct
import zipfile

import pytest

from retinaray.data.annotation_formats import is_json_lines, list_keys
from retinaray.data.coco_columns import read_coco_tables
from retinaray.errors import DatasetError


def _zip(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, b"x")
    return stream.getvalue()


VOC = b'<?xml version="1.0"?>\n<annotation><filename>a.jpg</filename></annotation>'
SAFETENSORS = struct.pack("<Q", 12) + b'{"a": {}}   '


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(_zip("train.json"), "found a zip; unpack it", id="zip"),
        pytest.param(_zip("archive/data.pkl"), "found a weights file; it is the model", id="pth"),
        pytest.param(SAFETENSORS, "found a weights file", id="safetensors"),
        pytest.param(b"\x80\x02}q\x00", "found a weights file", id="old pth"),
        pytest.param(b"\x08\x08\x12\x07pytorch", "found an ONNX file; it is the model", id="onnx"),
        pytest.param(b"\xff\xd8\xff\xe0rest", "found an image; give the folder", id="jpeg"),
        pytest.param(b"\x89PNG\r\n\x1a\n", "found an image", id="png"),
        pytest.param(b"RIFF\x00\x00\x00\x00WEBPVP8 ", "found an image", id="webp"),
        pytest.param(b"\x00\x00\x00\x18ftypmp42", "found a video; cut it into images", id="mp4"),
        pytest.param(b"RIFF\x00\x00\x00\x00AVI LIST", "found a video", id="avi"),
        pytest.param(b"PAR1\x15\x04", "found Parquet", id="parquet"),
        pytest.param(
            b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull", id="lfs pointer"
        ),
        pytest.param(VOC, "found an annotation of Pascal VOC; .*--from voc", id="voc"),
        pytest.param(b"<annotations><version>1.1", "found XML of CVAT", id="cvat"),
        pytest.param(b"<!DOCTYPE html><html>", "found a web page", id="html"),
        pytest.param(b"<svg/>", "found XML;", id="xml"),
        pytest.param(b"0 0.5 0.5 0.1 0.2\n1 0.5 0.5 1 1\n", "label file of YOLO", id="yolo"),
        pytest.param(
            b"names: [car]\nnc: 1\ntrain: images\n", "description of YOLO", id="data.yaml"
        ),
        pytest.param(b"data:\n  resize: 3\n", "found YAML; settings are given with", id="yaml"),
        pytest.param(
            b"Car 0.00 0 -1.57 1.0 2.0 3.0 4.0 0 0 0 0 0 0 0\n", "file of KITTI", id="kitti"
        ),
        pytest.param(b"ImageID,Source,LabelName,Confidence\n", "--from open-images", id="openimg"),
        pytest.param(b"file,x,y,w,h\na.jpg,1,2,3,4\n", r"found a table \(CSV\)", id="csv"),
        pytest.param(b'{"id": 1}\n{"id": 2}\n', "found JSON Lines", id="jsonl"),
    ],
)
def test_read_coco_tables_names_a_file_that_is_no_json(data: bytes, words: str) -> None:
    with pytest.raises(DatasetError, match=f"^t.json: expected COCO JSON, .*{words}"):
        read_coco_tables(data, source="t.json")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([{"image_id": 1, "score": 0.5}], "retinaray evaluate t.json --annotations test.json"),
        ([{"data": {}, "annotations": []}], "tasks of Label Studio"),
        ([], "found a list$"),
        ("text", "found a text$"),
        (None, "found null$"),
        ({"shapes": [], "imagePath": "a.jpg"}, "LabelMe; .*--from labelme"),
        ({"a.jpg1": {"filename": "a.jpg", "regions": []}}, "VGG Image Annotator"),
        ({"type": "FeatureCollection", "features": []}, "GeoJSON"),
        ({"images": [], "categories": []}, "`annotations` is missing; .*without labels"),
        ({"job": {}, "run_id": "a"}, "the record of a run"),
        ({"foo": 1, "bar": 2}, "found foo, bar$"),
        ({}, "found no keys$"),
    ],
    ids=lambda entry: None if isinstance(entry, str) else str(entry)[:30],
)
def test_read_coco_tables_names_json_of_another_kind(document: object, words: str) -> None:
    with pytest.raises(DatasetError, match=f"^t.json: not COCO: .*{words}"):
        read_coco_tables(json.dumps(document).encode(), source="t.json")


def test_list_keys_is_cut_to_a_readable_length() -> None:
    assert list_keys({str(n) * 40: n for n in range(3)}) == f"{'0' * 30}, {'1' * 30}, {'2' * 30}"
    assert list_keys(dict.fromkeys("abcdefgh")) == "a, b, c, d, e, f, ..."


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b'{"a": 1}\r\n{"a": 2}\r\n', True),
        (b'{"a": 1}\n', False),
        (b'{\n"a": 1}\n', False),
        (b"", False),
    ],
)
def test_is_json_lines_wants_two_objects(data: bytes, answer: bool) -> None:
    assert is_json_lines(data) is answer
